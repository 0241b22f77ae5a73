"""What a quantized KV cache costs: perplexity and KL divergence of decoding with it, and its bytes.

Protocol   half of each window is prefilled; then `steps` true tokens are scored, one by one, each after the one before
           was fed through the cache. The first is predicted by the prompt itself, whose attention is exact.
Distance   KL(16 bits || quantized) in nats, over the scored tokens, where the same model decodes with the stock cache.
Bytes      all tensors that the cache holds after the last step, per cached token; bf16 is what a stock cache of
           bfloat16 holds. Sliding-window layers count on both sides as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.calib.datasets import EvalWindows
from quantkit.errors import NumericalError, RequestError

STEPS = 128
BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class KvResult:
    """Decoding of one text; `nll` and `kl_mean` in nats per scored token, bytes per cached token of a sequence."""

    ppl: float
    reference_ppl: float  # with the stock cache
    kl_mean: float
    scored: int
    bytes_per_token: float
    bf16_bytes_per_token: float
    reason: str | None  # why the model's attention gets dequantized tensors, or None


def check_window(seq_len: int, steps: int) -> None:
    """Refuse windows that are too short. Raises `RequestError`."""
    if steps < 1:
        raise RequestError(f"kv_steps is {steps}; it must be at least 1")
    if seq_len // 2 + steps > seq_len:
        raise RequestError(
            f"half a window of {seq_len} tokens is prefilled, so {steps} steps do not fit; "
            f"use kv_steps of at most {seq_len - seq_len // 2}, or a longer seq_len"
        )


def evaluate_kv(
    model: Any,
    windows: EvalWindows,
    spec: str,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> KvResult:
    """Decode windows of text with a quantized cache and with the stock one, side by side.

    Args:
        model: a transformers causal language model, in evaluation mode.
        windows: from `quantkit.calib.datasets.load_evaluation`.
        spec: of the cache, as in `quantkit.kv_cache`.
        steps: tokens of each window that are scored.
        batch_size: windows at a time.
        progress: called after each batch.

    Raises:
        RequestError: an unknown policy, a window too short for the steps.
        NumericalError: logits that are not finite.
    """
    from transformers import DynamicCache  # imported here: `import quantkit` must not import transformers

    from quantkit.runtime.kv_cache import kv_cache

    n_windows, seq_len = windows.input_ids.shape
    check_window(seq_len, steps)
    device = next(model.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64)
    nbytes = stock_bytes = tokens = 0
    reason = None
    with torch.inference_mode():
        for start in range(0, n_windows, batch_size):
            ids = windows.input_ids[start : start + batch_size, : seq_len // 2 + steps].to(device)
            cache, stock = kv_cache(model, spec), DynamicCache(config=model.config.get_text_config(decoder=True))
            totals += _decode(model, ids, steps, cache, stock)
            reason = cache.reason
            nbytes += cache.nbytes
            stock_bytes += sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in stock.layers)
            tokens += len(ids) * (ids.shape[1] - 1)
            if progress is not None:
                progress(start + len(ids), n_windows)
    nll, reference_nll, kl = (totals / (n_windows * steps)).tolist()
    if not math.isfinite(nll + kl):
        raise NumericalError(f"{windows.name}: decoding with {spec} gave numbers that are not finite; use more bits")
    return KvResult(
        ppl=math.exp(nll),
        reference_ppl=math.exp(reference_nll),
        kl_mean=kl,
        scored=n_windows * steps,
        bytes_per_token=nbytes / tokens,
        bf16_bytes_per_token=stock_bytes / tokens,
        reason=reason,
    )


def _decode(model: Any, ids: Tensor, steps: int, cache: Any, stock: Any) -> Tensor:
    """Sums over windows and steps, float64: cross entropy with the cache, with the stock one, and KL."""
    prompt = ids.shape[1] - steps
    totals = torch.zeros(3, dtype=torch.float64, device=ids.device)
    fed = ids[:, :prompt]
    for step in range(steps):
        log_q, log_p = (
            model(input_ids=fed, past_key_values=each, use_cache=True, logits_to_keep=1).logits[:, -1].float()
            for each in (cache, stock)
        )
        log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
        target = ids[:, prompt + step, None]
        totals[0] -= log_q.gather(1, target).double().sum()
        totals[1] -= log_p.gather(1, target).double().sum()
        p = log_p.exp()
        totals[2] += torch.where(p == 0, 0.0, p * (log_p - log_q)).double().sum()
        fed = target
    return totals.cpu()
