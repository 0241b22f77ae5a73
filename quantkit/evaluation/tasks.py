"""Task accuracies through lm-evaluation-harness, for a model that is already loaded."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from quantkit.errors import FileError, RequestError, did_you_mean, first_line


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    include_path: str | Path | None = None,
    *,
    batch_size: int = 1,
    processor: Any = None,
) -> dict[str, dict[str, float]]:
    """Run lm-eval tasks without few-shot changes and without bootstrapped errors.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        tasks: names of tasks, groups or tags, as lm-eval knows them.
        limit: documents of each task, the first ones; None takes all.
        include_path: a folder with task files (YAML) of your own. Where it holds all of `tasks`, lm-eval's own
            thousands are not indexed, which starts faster and needs no network.
        batch_size: requests per forward pass, at least 1.
        processor: of a vision-language model; with it tasks may show pictures (``doc_to_image``).

    Returns:
        For every task, and for every group with an aggregate, its metrics by name, such as ``{"acc": 0.71}``. A metric
        behind a filter keeps the filter's name: ``"exact_match,strict-match"``.

    Raises:
        RequestError: lm-eval is not installed, an unknown task, a limit or batch size below 1.
        FileError: the folder is missing, or a task's data cannot be fetched.
    """
    for setting, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise RequestError(f"{setting} is {value}; it must be at least 1")
    if include_path is not None and not Path(include_path).is_dir():
        raise FileError(f"{include_path}: no such folder; include_path must hold lm-eval task files (YAML)")
    lm_eval = _import("lm_eval")
    manager = _task_manager(tasks, include_path)
    wrapped = _wrap(model, tokenizer, processor, batch_size)
    wrapped.get_model_info = dict  # for its log, it would ask the hub for the revision of a model that is here
    try:
        outcome = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    except OSError as error:
        raise FileError(
            f"tasks {', '.join(tasks)}: their data cannot be read ({first_line(error)}); connect once to fill the "
            "cache, or pass tasks of your own with include_path"
        ) from error
    return {name: _metrics(entry) for name, entry in (outcome["results"] | outcome.get("groups", {})).items()}


def _wrap(model: nn.Module, tokenizer: Any, processor: Any, batch_size: int) -> Any:
    """lm-eval's adapter for a model that is loaded; the multimodal one, where there is a processor, does text too."""
    if processor is None:
        adapter = _import("lm_eval.models.huggingface").HFLM
        return adapter(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    class Seeing(_import("lm_eval.models.hf_vlms").HFMultimodalLM):  # type: ignore[misc]  # known when it is imported
        """The base class reads the processor from disk, by the model's name."""

        def _create_tokenizer(self, *args: Any, **kwargs: Any) -> None:
            self.processor, self.tokenizer = processor, tokenizer or processor.tokenizer

    return Seeing(pretrained=model, batch_size=batch_size)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequestError('tasks need the package lm-eval; pip install "quantkit[eval]"') from error


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """A task manager that knows all of `tasks`; lm-eval's own folder (seconds to index) only if it is needed."""
    create = _import("lm_eval.tasks").TaskManager
    if include_path is not None:
        manager = create(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = create(include_path=None if include_path is None else str(include_path))
    _require_known(tasks, manager.all_tasks)
    return manager


def _require_known(tasks: Sequence[str], known: Collection[str]) -> None:
    for name in sorted(set(tasks) - set(known)):
        # Only the nearest: the whole list has more than ten thousand names.
        hint, _, _ = did_you_mean(name, known).partition("known: ")
        raise RequestError(
            f"unknown task {name!r}; {hint or 'see `lm-eval ls tasks`, '}or pass its folder with include_path"
        )


def _metrics(entry: dict[str, Any]) -> dict[str, float]:
    """Numbers of a result, under the metric's name; lm-eval writes ``acc,none`` for a metric without filter."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in entry.items()
        if "," in key and isinstance(value, int | float)
    }
