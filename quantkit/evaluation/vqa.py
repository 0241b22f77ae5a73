"""Questions about pictures: exact match of the greedy answer, and the distance to a reference model on true answers.

Protocol   One prompt per question (`quantkit.calib.pictures.Prompt`: no special tokens but those of the template),
           greedy decoding, the generated text stripped of surrounding space must equal the answer. Batches are padded
           on the left.
Distance   KL(reference || model) in nats, mean over the tokens of all true answers, end of text included, each given
           the prompt and the true answer before it. It shows differences that exact match is too coarse for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calib.pictures import Prompt, Question, encode, for_forward, read_questions
from quantkit.errors import FileError, NumericalError, RequestError
from quantkit.evaluation.perplexity import divergence, eval_mode
from quantkit.models.modality import sees_images

MAX_NEW_TOKENS = 24
BATCH_SIZE = 8

Progress = Callable[[int, int], None]  # (questions done, questions in all)


@dataclass(frozen=True, kw_only=True)
class VqaResult:
    """What one folder gives: the share of questions answered exactly, of `n`; `kl_mean` in nats, with a reference.

    With a quantized KV cache the answers were decoded with it: its spec, and its bytes per cached token at their ends.
    """

    exact_match: float
    n: int
    protocol: str
    kl_mean: float | None = None
    kv: str | None = None
    kv_bytes_per_token: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry of a folder in the report; what was not measured has no field."""
        entry: dict[str, Any] = {"exact_match": self.exact_match, "n": self.n}
        more = {"kl_mean": self.kl_mean, "kv": self.kv, "kv_bytes_per_token": self.kv_bytes_per_token}
        return entry | {name: value for name, value in more.items() if value is not None}


def read_answered(folder: str, limit: int | None = None) -> list[Question]:
    """The questions of a folder in file order, the first ``limit`` of them.

    Raises:
        RequestError, FileError: see `quantkit.calib.pictures.read_questions`; no question has an answer.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"limit is {limit}; evaluate at least 1 question, or leave the limit out")
    questions = [item for line in read_questions(folder) for item in line if item.picture and item.answer is not None]
    if not questions:
        raise FileError(f"{Path(folder).name}: metadata.jsonl holds no questions with answers (qa) to evaluate on")
    return questions[:limit]


def evaluate_vqa(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    name: str,
    reference: Any = None,
    template: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    kv: str | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> VqaResult:
    """Ask a vision-language model questions about pictures.

    Args:
        model: a loaded transformers model that takes pictures.
        processor: its processor.
        questions: from `read_answered`.
        name: of the folder, for messages and the protocol line.
        reference: a model of the same vocabulary, on its own device.
        template: see `Prompt`.
        max_new_tokens: of an answer, at least 1.
        kv: decode the answers with a quantized KV cache, as in `quantkit.kv_cache`; it does not enter `kl_mean`.
        batch_size: questions per forward pass, at least 1.
        progress: called after each batch.

    Raises:
        RequestError: a model without vision, a template without its places, numbers below 1.
        FileError: a picture that cannot be read.
        NumericalError: logits that are not finite.
    """
    for setting, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise RequestError(f"{setting} is {value}; it must be at least 1")
    if not sees_images(model.config):
        raise RequestError(
            f"{name}: {type(model).__name__} takes no pictures; questions about pictures need one that does"
        )
    prompt = Prompt(processor, template)
    n_right, kls, cached = 0, [], _Cached(model, kv)
    with torch.inference_mode(), eval_mode(model), eval_mode(reference):
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            answers = _answers(model, processor, prompt, batch, max_new_tokens, cached)
            n_right += sum(given == str(item.answer).strip() for given, item in zip(answers, batch, strict=True))
            if reference is not None:
                kls += _distances(model, reference, processor, prompt, batch)
            if progress is not None:
                progress(start + len(batch), len(questions))
    if not all(map(math.isfinite, kls)):
        raise NumericalError(f"{name}: logits of an answer are not finite; load the model in float32")
    return VqaResult(
        exact_match=n_right / len(questions),
        n=len(questions),
        protocol=f"{name}: exact match of {len(questions)} greedy answers of at most {max_new_tokens} tokens"
        f"{_too_long(processor, questions, max_new_tokens)}"
        f"{f', KV cache {kv}' if kv else ''}; prompt {prompt.description}",
        kl_mean=math.fsum(kls) / len(kls) if kls else None,
        kv=kv,
        kv_bytes_per_token=cached.bytes_per_token,
    )


def _too_long(processor: Any, questions: Sequence[Question], max_new_tokens: int) -> str:
    """How many true answers no answer of that length can equal, as a part of the protocol line."""
    texts = [f" {str(item.answer).strip()}" for item in questions]
    lengths = [len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    n_longer = sum(length > max_new_tokens for length in lengths)
    return f" ({n_longer} true answers are longer and count as wrong)" if n_longer else ""


class _Cached:
    """Makes the cache of each batch, and counts what the caches hold when the answers are there."""

    def __init__(self, model: Any, spec: str | None) -> None:
        self._model, self._spec = model, spec
        self._n_bytes = self._n_tokens = 0

    def generate(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        if self._spec is None:
            tokens: Tensor = self._model.generate(**inputs, **options)
            return tokens
        from quantkit.runtime.kv_cache import kv_cache  # imported here: it imports transformers

        cache = kv_cache(self._model, self._spec)
        tokens = self._model.generate(**inputs, past_key_values=cache, **options)
        padding = int((inputs["attention_mask"] == 0).sum())
        self._n_bytes += cache.nbytes
        self._n_tokens += tokens.shape[0] * (tokens.shape[1] - 1) - padding  # the last token is not fed back
        return tokens

    @property
    def bytes_per_token(self) -> float | None:
        return self._n_bytes / self._n_tokens if self._n_tokens else None


def _answers(
    model: Any, processor: Any, prompt: Prompt, batch: Sequence[Question], max_new_tokens: int, cached: _Cached
) -> list[str]:
    inputs = _inputs(processor, batch, [prompt.ask(item.text) for item in batch])
    known = for_forward(model, inputs, model.device, model.dtype)
    with _unlimited(model):
        tokens = cached.generate(known, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


@contextmanager
def _unlimited(model: Any) -> Iterator[None]:
    """A ``max_length`` in the model's own generation settings would cut prompts with pictures, and warn about it."""
    config = model.generation_config
    kept, config.max_length = config.max_length, None
    try:
        yield
    finally:
        config.max_length = kept


def _distances(model: Any, reference: Any, processor: Any, prompt: Prompt, batch: Sequence[Question]) -> list[float]:
    """KL at every token of the batch's true answers."""
    asked = [prompt.ask(item.text) for item in batch]
    told = [text + prompt.answer(str(item.answer)) for text, item in zip(asked, batch, strict=True)]
    inputs = _inputs(processor, batch, told)
    lengths = inputs["attention_mask"].sum(1) - _inputs(processor, batch, asked)["attention_mask"].sum(1)
    keep = int(lengths.max()) + 1
    ours = _last_logits(model, inputs, keep)
    theirs = _last_logits(reference, inputs, keep).to(ours.device)
    kls: list[float] = []
    for row, length in enumerate(lengths.tolist()):
        here = slice(keep - 1 - length, keep - 1)  # position i predicts token i + 1; padding is on the left
        kl, _ = divergence(ours[row, here].float().log_softmax(-1), theirs[row, here].float().log_softmax(-1))
        kls += kl.tolist()
    return kls


def _inputs(processor: Any, batch: Sequence[Question], texts: list[str]) -> dict[str, Tensor]:
    return encode(processor, [item.picture for item in batch], texts, batch[0].where)


def _last_logits(model: Any, inputs: dict[str, Tensor], keep: int) -> Tensor:
    """Logits ``[batch, keep, vocabulary]`` of the last positions."""
    known = for_forward(model, inputs, model.device, model.dtype)
    some = "logits_to_keep" in inspect.signature(model.forward).parameters  # all of a long prompt can be gigabytes
    logits: Tensor = model(**known, use_cache=False, **({"logits_to_keep": keep} if some else {})).logits
    return logits[:, -keep:]
