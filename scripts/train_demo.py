r"""Train the demo model: a byte-level BPE tokenizer and a Llama of four million parameters, on the standard library.

    python scripts/train_demo.py                          the model that ships, into quantkit/demo/model
    python scripts/train_demo.py --max-bytes 400000 --steps 20 --vocab-size 512 --layers 1 --eval-windows 20 \
        --output out/smoke                                a smoke run, on a CPU in a minute

The text is `quantkit.demo.corpus` of the interpreter that runs this (``--export-text`` and ``--text`` carry it to
another machine). One module in forty is a validation slice: it picks the checkpoint that is kept. The held-out modules
are read once, at the end. Printed and written to ``--report``: perplexity on the held-out text (joined by blank lines,
no special tokens, consecutive windows of 512 tokens, remainder dropped, mean over windows) of the saved model, of
plain rounding to 4, 3 and 2 bits, and of unigram and bigram models estimated on the same training tokens.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from quantkit.demo import corpus

PAD, BOS, EOS = 0, 1, 2  # ids of the special tokens, in the order they are given to the trainer
WINDOW = 512  # tokens of an evaluation window
MAX_MODEL_BYTES = 8_000_000


@dataclass(frozen=True)
class Text:
    """The corpus as trained on. Validation shares no module (nor a module's tests) with train."""

    train: list[str]
    validation: list[str]
    heldout: list[str]


def main() -> None:
    options = parse_options()
    named = {split: corpus_documents(split, options.text) for split in ("train", "heldout")}
    if options.export_text:
        export_text(options.export_text, named)
        return
    torch.manual_seed(options.seed)
    started = time.monotonic()
    text = split_text(named, options.max_bytes)
    tokenizer = train_tokenizer(text.train, options.vocab_size)
    generator = torch.Generator().manual_seed(options.seed)
    train_ids = encode_documents(tokenizer, text.train, generator).to(options.device)
    validation_ids = encode_joined(tokenizer, text.validation).to(options.device)
    print(
        f"text: {n_bytes(text.train):,} bytes = {len(train_ids):,} tokens to train on, "
        f"{n_bytes(text.validation):,} bytes = {len(validation_ids):,} tokens to validate"
    )
    model = LlamaForCausalLM(model_config(options)).to(options.device)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {n_parameters:,} parameters; {time.monotonic() - started:.0f} s of preparation", flush=True)
    bits_per_nat = len(validation_ids) / n_bytes(text.validation) / math.log(2)
    history = train(model, train_ids, validation_ids, bits_per_nat, options)
    save(model, tokenizer, options)

    heldout_ids = encode_joined(tokenizer, text.heldout).to(options.device)
    bytes_per_token = n_bytes(text.heldout) / len(heldout_ids)
    if options.eval_windows:
        heldout_ids = heldout_ids[: options.eval_windows * WINDOW]
    report = {
        "python": None if options.text else platform.python_version(),  # whose text it is
        "text_sha256": hashlib.sha256("\0".join(text.train).encode()).hexdigest(),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "parameters": n_parameters,
        "train_tokens": len(train_ids),
        "model_bytes": (options.output / "model.safetensors").stat().st_size,
        "history": history,
        **measure(options.output, train_ids, validation_ids, heldout_ids, bytes_per_token),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps({key: value for key, value in report.items() if key != "history"}, indent=2))
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(json.dumps(report, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quantkit/demo/model"))
    parser.add_argument("--report", type=Path, help="JSON file for the measurements")
    parser.add_argument("--text", type=Path, help="read the corpus from a file that --export-text wrote")
    parser.add_argument("--export-text", type=Path, help="write the corpus to this .jsonl.gz file and stop")
    parser.add_argument("--max-bytes", type=int, help="train on the beginning of the text only")
    parser.add_argument("--eval-windows", type=int, help="measure on the first windows of the held-out text only")
    parser.add_argument("--vocab-size", type=int, default=1536)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a training sequence")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step")
    parser.add_argument("--epochs", type=float, default=20.0)
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    return parser.parse_args()


# Text


def corpus_documents(split: corpus.Split, path: Path | None) -> list[corpus.Document]:
    if path is None:
        return corpus.named_documents(split)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [corpus.Document(row["kind"], row["name"], row["text"]) for row in rows if row["split"] == split]


def export_text(path: Path, named: dict[str, list[corpus.Document]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as out:
        for split, documents in named.items():
            for document in documents:
                out.write(json.dumps({"split": split, **asdict(document)}) + "\n")


def split_text(named: dict[str, list[corpus.Document]], max_bytes: int | None) -> Text:
    train: list[str] = []
    validation: list[str] = []
    total = 0
    for document in named["train"]:
        total += len(document.text)
        if max_bytes and total > max_bytes:
            break
        # A module and its tests ("json.decoder", "test.test_json.test_decode") fall on the same side.
        parts = [part.removeprefix("test_") for part in document.name.split(".")]
        owner = parts[1] if parts[0] == "test" and len(parts) > 1 else parts[0]
        (validation if hashlib.sha256(owner.encode()).digest()[0] % 40 == 0 else train).append(document.text)
    if not validation:
        raise SystemExit(f"--max-bytes {max_bytes}: no module of the validation slice in so little text; use 400000")
    return Text(train, validation, [document.text for document in named["heldout"]])


def n_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text round-trips, nothing is normalized, no special token is added by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str], generator: torch.Generator) -> Tensor:
    """Documents one after the other, int64 [n_tokens]: each ends in </s>; every second one, by chance, starts with <s>.

    Half and half, because both ways are in use: prompts with <s>, and calibration or evaluation text without.
    """
    with_bos = (torch.rand(len(texts), generator=generator) < 0.5).tolist()
    order = torch.randperm(len(texts), generator=generator).tolist()
    ids: list[int] = []
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    for index in order:
        ids += [BOS] * with_bos[index] + encodings[index].ids + [EOS]
    return torch.tensor(ids)


def encode_joined(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """The evaluation protocol: documents joined by a blank line, no special tokens, int64 [n_tokens]."""
    return torch.tensor(tokenizer.encode("\n\n".join(texts), add_special_tokens=False).ids)


# Model


def model_config(options: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=options.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def batches(ids: Tensor, seq_len: int, n_sequences: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless epochs of int64 [n_sequences, seq_len + 1], shuffled; the cuts lie elsewhere in every epoch."""
    offsets = torch.arange(seq_len + 1, device=ids.device)
    while True:
        phase = int(torch.randint(min(seq_len, len(ids) - seq_len), (1,), generator=generator))
        starts = phase + seq_len * torch.randperm((len(ids) - phase - 1) // seq_len, generator=generator)
        for first in range(0, max(1, len(starts) - n_sequences + 1), n_sequences):
            yield ids[starts[first : first + n_sequences, None].to(ids.device) + offsets]


def train(
    model: LlamaForCausalLM, ids: Tensor, validation_ids: Tensor, bits_per_nat: float, options: argparse.Namespace
) -> list[dict[str, float]]:
    """AdamW, linear warm-up, cosine to zero. Leaves the weights that were best on the validation slice in `model`."""
    steps = options.steps or math.ceil(options.epochs * len(ids) / (options.batch * options.context))
    warm_up = min(300, max(1, steps // 10))
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )

    def loss_of(batch: Tensor) -> Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    compiled = torch.compile(loss_of) if options.compile else loss_of
    stream = batches(ids, options.context, options.batch, torch.Generator().manual_seed(options.seed))
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    started = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
            loss = compiled(next(stream))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(1, steps // 30) == 0 or step == steps:
            bits = window_nll(model, validation_ids).mean().item() * bits_per_nat
            row = {"step": step, "train_nats": loss.item(), "validation_bits_per_byte": bits}
            print(json.dumps({**row, "seconds": round(time.monotonic() - started, 1)}), flush=True)
            if not history or bits < min(past["validation_bits_per_byte"] for past in history):
                best = {name: value.detach().clone() for name, value in model.state_dict().items()}
            history.append(row)
    model.load_state_dict(best)
    return history


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.to(torch.bfloat16).save_pretrained(options.output)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=options.context,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(options.output)
    size = (options.output / "model.safetensors").stat().st_size
    if size > MAX_MODEL_BYTES:
        print(f"warning: model.safetensors has {size:,} bytes, more than the {MAX_MODEL_BYTES:,} that may ship")


# Measurements


def windows_of(ids: Tensor) -> Tensor:
    """Consecutive windows, int64 [n_windows, WINDOW]; the remainder is dropped."""
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def window_nll(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of each window's tokens 1 .. WINDOW - 1, in nats: float32 [n_windows]."""
    model.eval()
    losses = []
    windows = windows_of(ids)
    for first in range(0, len(windows), 16):
        part = windows[first : first + 16]
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").mean(1))
    model.train()
    return torch.cat(losses)


def round_to_nearest(weight: Tensor, bits: int, group_size: int = 128) -> Tensor:
    """Asymmetric min-max rounding of [out_features, in_features], a scale and an integer zero for each group."""
    groups = weight.float().view(weight.shape[0], -1, group_size)
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    zeros = (-low / scales).round()
    codes = ((groups / scales).round() + zeros).clamp(0, 2**bits - 1)
    rounded: Tensor = (codes - zeros) * scales
    return rounded.view_as(weight).to(weight.dtype)


def bigram_counts(ids: Tensor, vocab_size: int) -> Tensor:
    """How often token j follows token i: float32 [vocab_size, vocab_size]."""
    pairs = ids[:-1] * vocab_size + ids[1:]
    return torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size).float()


def bigram_nll(counts: Tensor, ids: Tensor, discount: float) -> float:
    """Interpolated Kneser-Ney bigram, in nats per token, on the positions that `window_nll` scores."""
    windows = windows_of(ids)
    previous, following = windows[:, :-1].flatten(), windows[:, 1:].flatten()
    seen = counts > 0
    continuation = seen.sum(0) + 0.5
    continuation = continuation / continuation.sum()
    totals = counts.sum(1).clamp(min=1.0)
    backoff = torch.where(counts.sum(1) > 0, discount * seen.sum(1) / totals, 1.0)
    direct = (counts[previous, following] - discount).clamp(min=0) / totals[previous]
    return -(direct + backoff[previous] * continuation[following]).log().mean().item()


def unigram_nll(counts: Tensor, ids: Tensor, added: float) -> float:
    """Token frequencies with `added` pseudo-counts, in nats per token, on the same positions."""
    frequencies = counts.sum(0) + added
    return -(frequencies / frequencies.sum()).log()[windows_of(ids)[:, 1:]].mean().item()


def measure(
    folder: Path, train_ids: Tensor, validation_ids: Tensor, heldout_ids: Tensor, bytes_per_token: float
) -> dict[str, float]:
    """Held-out perplexities. The smoothing of both n-gram models is tuned on the validation slice."""
    device = train_ids.device
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    counts = bigram_counts(train_ids, model.config.vocab_size)
    discount = min((0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95), key=lambda d: bigram_nll(counts, validation_ids, d))
    added = min((0.1, 0.5, 1.0, 2.0, 5.0, 20.0), key=lambda k: unigram_nll(counts, validation_ids, k))
    nll = window_nll(model, heldout_ids).mean().item()
    found = {
        "heldout_windows": len(windows_of(heldout_ids)),
        "heldout_bits_per_byte": nll / bytes_per_token / math.log(2),
        "heldout_ppl": math.exp(nll),
        "bigram_discount": discount,
        "bigram_ppl": math.exp(bigram_nll(counts, heldout_ids, discount)),
        "unigram_ppl": math.exp(unigram_nll(counts, heldout_ids, added)),
    }
    for bits in (4, 3, 2):
        rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        for layer in rounded.model.layers.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = round_to_nearest(layer.weight.data, bits)
        found[f"rtn_{bits}bit_g128_ppl"] = math.exp(window_nll(rounded, heldout_ids).mean().item())
    return found


if __name__ == "__main__":
    main()
