"""Perplexity on windows of text, and the distance to a reference model on the same windows.

Protocol   the GPTQ line of papers: per window the mean cross entropy of the seq_len - 1 predicted positions, the mean
           over windows, its exponential. Not lm-eval's word perplexity.
Distance   KL(reference || model) in nats and the agreement of the most likely token, over all predicted positions.
Precision  log-softmax in float32 on the logits that the model returns, sums in float64.
Memory     the logits of one batch of windows in the model's dtype (twice with a reference), and float32 copies of a few
           positions at a time. With a reference both models are resident.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calib.datasets import EvalWindows
from quantkit.errors import NumericalError, RequestError

CHUNK_ELEMENTS = 1 << 24  # logits in float32 at a time: 64 MiB for each temporary, whatever the vocabulary

Progress = Callable[[int, int], None]  # (windows done, windows in all)


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """What one text gives: `nll` is in nats per token and `ppl` its exponential.

    The last three are None without a reference: `kl_mean` and `kl_p99` (the 99th percentile) in nats over all
    predicted positions, `top1_agreement` as a fraction of them.
    """

    ppl: float
    nll: float
    windows: int
    seq_len: int
    protocol: str
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry of a text in the report: ppl, windows, seq_len, and with a reference kl_mean, top1_agreement."""
        entry: dict[str, Any] = {"ppl": self.ppl, "windows": self.windows, "seq_len": self.seq_len}
        if self.kl_mean is not None:
            entry |= {"kl_mean": self.kl_mean, "top1_agreement": self.top1_agreement}
        return entry


@dataclass(frozen=True)
class _Scores:
    """Per predicted position of one window, float32 [seq_len - 1] on the CPU; the last two None without reference."""

    nll: Tensor
    kl: Tensor | None
    agreement: Tensor | None


def evaluate_windows(
    model: nn.Module,
    windows: EvalWindows,
    *,
    reference: nn.Module | None = None,
    batch_size: int = 1,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> TextResult:
    """Score a causal language model on windows of text.

    Args:
        model: called as ``model(input_ids=..., use_cache=False)`` on int64 [batch, seq_len]; returns an object with
            `logits` [batch, seq_len, vocabulary], of any float dtype. Evaluated in eval mode; its mode is restored.
        windows: from `quantkit.calib.datasets.load_evaluation`.
        reference: a model to measure the distance to, usually the one before quantization; on its own device.
        batch_size: windows per forward pass, at least 1.
        device: where the model takes its input; None: the device of its first parameter.
        progress: called after each batch.

    Raises:
        RequestError: the two models have vocabularies of different sizes; batch_size below 1.
        NumericalError: logits that are NaN or infinite, with the window and the position.
    """
    if batch_size < 1:
        raise RequestError(f"batch_size is {batch_size}; it must be at least 1")
    n_windows, seq_len = windows.input_ids.shape
    nlls: list[float] = []
    kls: list[Tensor] = []
    agreements: list[Tensor] = []
    place = _device_of(model) if device is None else torch.device(device)
    with torch.inference_mode(), eval_mode(model), eval_mode(reference):
        for start in range(0, n_windows, batch_size):
            ids = windows.input_ids[start : start + batch_size]
            logits = _logits(model, ids, place)
            other = None if reference is None else _logits(reference, ids, _device_of(reference)).to(logits.device)
            for row in range(len(ids)):
                scores = _score_window(logits[row], ids[row], None if other is None else other[row])
                _check_finite(scores, f"{windows.name}, window {start + row}")
                nlls.append(float(scores.nll.double().mean()))
                if scores.kl is not None and scores.agreement is not None:
                    kls.append(scores.kl)
                    agreements.append(scores.agreement)
            if progress is not None:
                progress(start + len(ids), n_windows)
    nll = math.fsum(nlls) / n_windows
    distance = _distance(torch.cat(kls), torch.cat(agreements)) if kls else {}
    return TextResult(
        ppl=_exp(nll, windows.name),
        nll=nll,
        windows=n_windows,
        seq_len=seq_len,
        protocol=windows.protocol,
        **distance,
    )


def _device_of(model: nn.Module) -> torch.device:
    """Where the model takes its input: a model that is spread over devices starts with its first parameter."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def eval_mode(model: nn.Module | None) -> Iterator[None]:
    training = model is not None and model.training
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        if model is not None:
            model.train(training)


def _logits(model: nn.Module, ids: Tensor, device: torch.device) -> Tensor:
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits


def _score_window(logits: Tensor, ids: Tensor, reference: Tensor | None) -> _Scores:
    """Scores of one window: logits [seq_len, vocabulary] of the model and of the reference, ids [seq_len]."""
    vocab_size = logits.shape[-1]
    if reference is not None and reference.shape[-1] != vocab_size:
        raise RequestError(
            f"the reference has a vocabulary of {reference.shape[-1]} tokens, the model of {vocab_size}; "
            "pass the model that this one was made from"
        )
    targets = ids[1:].to(logits.device)
    positions = max(1, CHUNK_ELEMENTS // vocab_size)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(targets), positions):
        here = slice(start, min(start + positions, len(targets)))  # the last position predicts nothing
        log_q = logits[here].float().log_softmax(-1)
        nll = -log_q.gather(-1, targets[here, None]).squeeze(-1)
        if reference is None:
            parts.append((nll,))
        else:
            parts.append((nll, *divergence(log_q, reference[here].float().log_softmax(-1))))
    columns = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
    return _Scores(columns[0], *(columns[1:] or (None, None)))


def divergence(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) and whether both have the same most likely token, per row of [positions, vocabulary]."""
    p = log_p.exp()
    # A token that p rules out counts 0, also where its logarithm is -inf. NaN is not 0 and stays.
    kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    return kl, (log_p.argmax(-1) == log_q.argmax(-1)).float()


def _check_finite(scores: _Scores, where: str) -> None:
    bad = (~scores.nll.isfinite()).nonzero()
    if len(bad):
        raise NumericalError(
            f"{where}: the model's logits are not finite at position {int(bad[0])}; "
            "load it in a wider dtype (bfloat16 or float32), or quantize it with more bits"
        )
    if scores.kl is not None and not bool(scores.kl.isfinite().all()):
        position = int((~scores.kl.isfinite()).nonzero()[0])
        raise NumericalError(
            f"{where}: the KL divergence to the reference is not finite at position {position}; "
            "the reference's logits hold NaN or infinity: load it in a wider dtype"
        )


def _distance(kl: Tensor, agreement: Tensor) -> dict[str, float]:
    # By rank, since torch.quantile refuses more than 2^24 values.
    rank = math.ceil(0.99 * len(kl))
    return {
        "kl_mean": float(kl.double().mean()),
        "kl_p99": float(kl.kthvalue(rank).values),
        "top1_agreement": float(agreement.double().mean()),
    }


def _exp(nll: float, name: str) -> float:
    try:
        return math.exp(nll)
    except OverflowError as error:
        raise NumericalError(
            f"{name}: the mean cross entropy is {nll:.4g} nats, so the perplexity overflows; the model is broken"
        ) from error
