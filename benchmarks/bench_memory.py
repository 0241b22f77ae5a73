"""Does the memory of a run grow with the number of blocks? Two random models that differ in nothing else, and a ratio.

    python benchmarks/bench_memory.py                        8 and 64 blocks of hidden size 256, GPTQ at 4 bits
    python benchmarks/bench_memory.py --hidden 1024 --blocks 4 16 --json memory.json

Each model is written block by block, and each run is a process of its own: the peak is that of quantizing alone. A leak
shows as a slope: bytes per additional block, to be compared with the bytes of a block in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGET = 1.15
N_HEADS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, nargs=2, default=[8, 64], metavar=("FEW", "MANY"))
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--n-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--offload", default="cpu", choices=["none", "cpu", "disk"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # the two kinds of processes that main starts
    arguments = parser.parse_args()
    steps = {"make": make_model, "quantize": quantize}
    if arguments.step:
        print(json.dumps(steps[arguments.step](arguments, Path.cwd())))
        return
    few, many = (measure(arguments, n_blocks) for n_blocks in arguments.blocks)
    for n_blocks, run in zip(arguments.blocks, (few, many), strict=True):
        peak, planned, model = (run[key] / 2**20 for key in ("peak_rss_bytes", "planned_bytes", "original_bytes"))
        print(
            f"{n_blocks:4} blocks, {model:7.1f} MiB: peak {peak:.1f} MiB, planned {planned:.1f}, {run['seconds']:.1f} s"
        )
    ratio = many["peak_rss_bytes"] / few["peak_rss_bytes"]
    added = arguments.blocks[1] - arguments.blocks[0]
    slope = (many["peak_rss_bytes"] - few["peak_rss_bytes"]) / added
    print(f"ratio {ratio:.3f}, target {TARGET}")
    print(f"{slope / 2**20:.3f} MiB per additional block; a block in float32 has {few['block_bytes'] / 2**20:.1f} MiB")
    settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "step")}
    result = {"settings": settings, "few": few, "many": many, "ratio": ratio, "bytes_per_added_block": slope}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(ratio > TARGET)


def measure(arguments: argparse.Namespace, n_blocks: int) -> dict[str, Any]:
    """Make a model and quantize it, each in a process of its own (which inherits none of this one's memory)."""
    command = [sys.executable, str(Path(__file__).resolve()), "--blocks", str(n_blocks), str(n_blocks)]
    for name in ("hidden", "method", "bits", "n_samples", "seq_len", "offload"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    for setting in arguments.settings:
        command += ["--set", setting]
    with tempfile.TemporaryDirectory() as folder:
        for step in ("make", "quantize"):
            done = subprocess.run([*command, "--step", step], cwd=folder, stdout=subprocess.PIPE, check=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def make_model(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A random Llama in bfloat16, one shard per block, with a tokenizer of bytes and a calibration text."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from quantkit.formats.files import write_json
    from quantkit.formats.safetensors_io import INDEX_FILE, write_tensors

    hidden, n_blocks, generator = arguments.hidden, arguments.blocks[0], torch.Generator().manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=N_HEADS,
        num_hidden_layers=n_blocks,
        vocab_size=len(alphabet),
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder / "model")

    def matrix(out_features: int, in_features: int) -> torch.Tensor:
        return (torch.randn(out_features, in_features, generator=generator) / in_features**0.5).bfloat16()

    weight_map: dict[str, str] = {}
    for index in range(n_blocks + 1):
        if index == n_blocks:
            around = {
                "model.embed_tokens.weight": matrix(len(alphabet), hidden),
                "lm_head.weight": matrix(len(alphabet), hidden),
            }
            tensors = around | {"model.norm.weight": torch.ones(hidden).bfloat16()}
        else:
            shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
            shapes |= {f"mlp.{name}_proj": (4 * hidden, hidden) for name in ("gate", "up")}
            shapes |= {"mlp.down_proj": (hidden, 4 * hidden)}
            tensors = {f"{name}.weight": matrix(*shape) for name, shape in shapes.items()}
            norms = ("input_layernorm", "post_attention_layernorm")
            tensors |= {f"{name}.weight": torch.ones(hidden).bfloat16() for name in norms}
            tensors = {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}
        shard = f"model-{index + 1:05d}-of-{n_blocks + 1:05d}.safetensors"
        write_tensors(folder / "model" / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
    write_json(folder / "model" / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    letters = torch.randint(32, 127, (arguments.n_samples * arguments.seq_len,), generator=generator)
    (folder / "calibration.txt").write_bytes(bytes(letters.tolist()))
    return {}


def quantize(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch

    from quantkit.pipeline import QuantizeRequest, dry_run, run
    from quantkit.recipe import resolve

    torch.set_num_threads(1)
    request = QuantizeRequest(
        model=str(folder / "model"),
        output=folder / "out",
        recipe=resolve(arguments.method, bits=arguments.bits, group_size=64, settings=arguments.settings),
        calib=str(folder / "calibration.txt"),
        n_samples=arguments.n_samples,
        seq_len=arguments.seq_len,
        offload=arguments.offload,
        device="cpu",
    )
    plan = dry_run(request)
    result = run(request)
    answer = {key: value for key, value in result.to_json().items() if key.endswith("bytes") or key == "seconds"}
    hidden = arguments.hidden
    return answer | {"planned_bytes": plan.peak_memory_bytes, "block_bytes": 4 * 16 * hidden * hidden}


if __name__ == "__main__":
    main()
