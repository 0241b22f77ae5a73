"""`evaluate`: load a model, measure it on texts and tasks, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.algorithms.kv.registry import parse_kv_spec
from quantkit.calib.datasets import load_evaluation
from quantkit.calib.sources import source_name
from quantkit.errors import FileError, RequestError, first_line
from quantkit.evaluation.kv import BATCH_SIZE as KV_BATCH_SIZE
from quantkit.evaluation.kv import STEPS, KvResult, check_window, evaluate_kv
from quantkit.evaluation.perplexity import TextResult, evaluate_windows
from quantkit.evaluation.tasks import evaluate_tasks
from quantkit.evaluation.vqa import BATCH_SIZE, MAX_NEW_TOKENS, VqaResult, evaluate_vqa, read_answered
from quantkit.models.modality import sees_images

MAX_DEFAULT_SEQ_LEN = 2048  # what the papers use, where the model reaches that far

TextProgress = Callable[[str, int, int], None]  # (name of the text or folder, windows or questions done, in all)


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """What was measured: texts and tasks by name. `seconds` is wall time, loading included."""

    model: str
    perplexity: Mapping[str, TextResult]
    vqa: Mapping[str, VqaResult] = field(default_factory=dict)  # by folder, as given
    kv: Mapping[str, KvResult] = field(default_factory=dict)  # by text
    kv_spec: str | None = None
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The object that ``quantkit eval --json`` prints; without pictures or tasks there is no entry for them."""
        perplexity = {name: result.to_json() for name, result in self.perplexity.items()}
        vqa = {"vqa": {name: result.to_json() for name, result in self.vqa.items()}} if self.vqa else {}
        tasks = {"tasks": {name: dict(metrics) for name, metrics in self.tasks.items()}} if self.tasks else {}
        kv = {"kv": self._kv_json()} if self.kv else {}
        return {"model": self.model, "perplexity": perplexity, **vqa, **kv, **tasks, "seconds": self.seconds}

    def _kv_json(self) -> dict[str, Any]:
        results = self.kv.values()
        scored = sum(result.scored for result in results)

        def mean(name: str) -> float:
            return sum(float(getattr(result, name)) * result.scored for result in results) / scored

        return {
            "spec": self.kv_spec,
            "bytes_per_token": mean("bytes_per_token"),
            "bf16_bytes_per_token": mean("bf16_bytes_per_token"),
            "decode_ppl": {name: result.ppl for name, result in self.kv.items()},
            "reference_ppl": {name: result.reference_ppl for name, result in self.kv.items()},
            "kl_mean": mean("kl_mean"),
        }


def evaluate(
    model: str | Path | nn.Module,
    *,
    data: str | Path | Sequence[str | Path] = ("builtin",),
    seq_len: int | None = None,
    limit: int | None = None,
    reference: str | Path | nn.Module | None = None,
    vqa: str | Path | Sequence[str | Path] = (),
    template: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    kv: str | None = None,
    kv_steps: int = STEPS,
    tasks: Sequence[str] = (),
    tasks_path: str | Path | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
    progress: TextProgress | None = None,
) -> EvalReport:
    """Measure perplexity, the distance to a reference model, and task accuracies.

    Args:
        model: a folder (packed or not), a hub id, ``demo``, or a loaded transformers model.
        data: texts, as in `quantkit.calib.datasets.load_evaluation`; empty for pictures or tasks only.
        seq_len: tokens of a window; None: min(2048, the model's limit).
        limit: windows of each text, questions of each folder, documents of each task; None takes all.
        reference: the model to measure KL divergence and top-1 agreement against. It stays in memory beside `model`.
        vqa: folders with ``metadata.jsonl`` and pictures.
        template: how a question about a picture is put; see `quantkit.calib.pictures.Prompt`.
        max_new_tokens: of an answer about a picture.
        kv: also decode the texts, and decode the answers, with a quantized KV cache, such as ``akvq-vl``; see
            `quantkit.kv_cache`.
        kv_steps: tokens of each window that are decoded one by one.
        tasks: names of lm-eval tasks.
        tasks_path: a folder with lm-eval task files of your own.
        tokenizer: needed with a loaded model; otherwise the model folder's own.
        processor: needed for `vqa` with a loaded model; otherwise the model folder's own.
        device: for models that are loaded here; ``auto`` is CUDA where there is one, else the CPU.
        dtype: of activations and unpacked weights; None: float32 on a CPU, on a GPU what the model's config says.
        batch_size: per forward pass; None: one window or task document, eight questions.
        trust_remote_code: allow code from the folders of `model` and `reference` to run.
        progress: called after each batch of each text and folder.

    Raises:
        RequestError: nothing to do, an unknown source, two texts of one name, a window beyond the model's limit.
        FileError: a model or text that is missing or damaged.
        NumericalError: logits that are not finite.
    """
    started = time.perf_counter()
    sources = [str(source) for source in ([data] if isinstance(data, str | Path) else data)]
    folders = [str(folder) for folder in ([vqa] if isinstance(vqa, str | Path) else vqa)]
    if not sources and not folders and not tasks:
        raise RequestError("nothing to evaluate; name a text (data), a folder of pictures (vqa) or a task (tasks)")
    _check_names(sources)
    config = _config_of(model, trust_remote_code)
    if reference is not None:
        _check_vocabularies(config, _config_of(reference, trust_remote_code))
    questions = {folder: read_answered(folder, limit) for folder in folders}
    if folders and not sees_images(config):
        raise RequestError(f"{_name_of(model)}: this model takes no pictures, so vqa cannot be measured")
    if processor is None and (folders or (tasks and sees_images(config) and not isinstance(model, nn.Module))):
        processor = _processor_of(model, trust_remote_code)
    if tokenizer is None and (sources or tasks):
        tokenizer = _tokenizer_of(model, trust_remote_code)
    window = _window(config, seq_len)
    if kv is not None:
        _check_kv(kv, window, kv_steps, sources, folders)
    vocab_size = config.get_text_config().vocab_size
    # All texts before any weight: a text that cannot be read should not cost a model's loading time.
    texts = [load_evaluation(source, tokenizer, window, limit, vocab_size=vocab_size) for source in sources]
    loaded = _load(model, device, dtype, trust_remote_code)
    other = None if reference is None else _load(reference, device, dtype, trust_remote_code)
    results = {
        text.name: evaluate_windows(
            loaded, text, reference=other, batch_size=batch_size or 1, progress=_named(progress, text.name)
        )
        for text in texts
    }
    decoded = {
        text.name: evaluate_kv(
            loaded,
            text,
            kv,
            steps=kv_steps,
            batch_size=batch_size or KV_BATCH_SIZE,
            progress=_named(progress, f"{text.name}, {kv}"),
        )
        for text in texts
        if kv is not None
    }
    answers = {
        folder: evaluate_vqa(
            loaded,
            processor,
            asked,
            name=Path(folder).name,
            reference=other,
            template=template,
            max_new_tokens=max_new_tokens,
            kv=kv,
            batch_size=batch_size or BATCH_SIZE,
            progress=_named(progress, Path(folder).name),
        )
        for folder, asked in questions.items()
    }
    options = {"batch_size": batch_size or 1, "processor": processor}
    scores = evaluate_tasks(loaded, tokenizer, tasks, limit, tasks_path, **options) if tasks else {}
    return EvalReport(
        model=_name_of(model),
        perplexity=results,
        vqa=answers,
        kv=decoded,
        kv_spec=kv,
        tasks=scores,
        seconds=time.perf_counter() - started,
    )


def _check_kv(spec: str, window: int, steps: int, sources: Sequence[str], folders: Sequence[str]) -> None:
    """What can be known about a KV cache before a model is."""
    if not sources and not folders:
        raise RequestError("kv is measured on texts or pictures; name some (data or vqa)")
    parse_kv_spec(spec)
    if sources:
        check_window(window, steps)


def _check_names(sources: Sequence[str]) -> None:
    """Results are kept by the texts' names, so these must differ."""
    seen: dict[str, str] = {}
    for source in sources:
        name = source_name(source)
        if name in seen:
            raise RequestError(
                f"two texts are called {name!r} ({seen[name]} and {source}); results are kept by name, so rename one"
            )
        seen[name] = source


def _config_of(model: str | Path | nn.Module, trust: bool) -> Any:
    if isinstance(model, nn.Module):
        return model.config
    from transformers import AutoConfig  # imported here: `import quantkit` must not import transformers

    from quantkit.runtime.loading import resolve

    source = resolve(model)
    if isinstance(source, Path) and not (source / "config.json").is_file():
        raise FileError(f"{source}: no config.json; give the folder of a model")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        raise FileError(f"{source}: config.json cannot be used: {first_line(error)}") from error


def _tokenizer_of(model: str | Path | nn.Module, trust: bool) -> Any:
    from quantkit.runtime.loading import load_tokenizer

    if isinstance(model, nn.Module):
        raise RequestError("a loaded model comes without its tokenizer; pass tokenizer=")
    return load_tokenizer(model, trust_remote_code=trust)


def _processor_of(model: str | Path | nn.Module, trust: bool) -> Any:
    from quantkit.runtime.loading import load_processor

    if isinstance(model, nn.Module):
        raise RequestError("a loaded model comes without its processor; pass processor=")
    return load_processor(model, trust_remote_code=trust)


def _check_vocabularies(config: Any, reference: Any) -> None:
    sizes = [each.get_text_config().vocab_size for each in (config, reference)]
    if sizes[0] != sizes[1]:
        raise RequestError(
            f"the reference has a vocabulary of {sizes[1]} tokens, the model of {sizes[0]}; "
            "pass the model that this one was made from"
        )


def _window(config: Any, seq_len: int | None) -> int:
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if seq_len is None:
        return min(MAX_DEFAULT_SEQ_LEN, limit or MAX_DEFAULT_SEQ_LEN)
    if limit is not None and seq_len > limit:
        raise RequestError(f"seq_len is {seq_len}, the model's limit is {limit} tokens; use {limit} or less")
    return seq_len


def _load(model: str | Path | nn.Module, device: str, dtype: str | torch.dtype | None, trust: bool) -> nn.Module:
    from quantkit.runtime.loading import load

    if isinstance(model, nn.Module):
        return model
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None and device == "cpu":
        dtype = torch.float32  # half precision is slow on a CPU and blurs small differences
    loaded: nn.Module = load(model, device=device, dtype=dtype, trust_remote_code=trust)
    return loaded


def _named(progress: TextProgress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def _name_of(model: str | Path | nn.Module) -> str:
    return (getattr(model, "name_or_path", "") or type(model).__name__) if isinstance(model, nn.Module) else str(model)
