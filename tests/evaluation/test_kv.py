"""Decode-time evaluation of a quantized KV cache."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_models import build

from quantkit.calib.datasets import EvalWindows, load_evaluation
from quantkit.errors import RequestError
from quantkit.evaluation.kv import check_window, evaluate_kv
from quantkit.runtime.loading import load, load_tokenizer


def windows(n: int = 3, seq_len: int = 120) -> EvalWindows:
    ids = torch.randint(4, 260, (n, seq_len), generator=torch.Generator().manual_seed(0))
    return EvalWindows(input_ids=ids, name="text", sha256="", protocol="none")


def test_sixteen_bits_are_the_models_own_perplexity_on_the_scored_tokens() -> None:
    """Teacher forcing through the cache is one pass without it: tokens 60 to 79 of each window."""
    model = build("llama")
    seen: list[tuple[int, int]] = []
    result = evaluate_kv(model, windows(), "fp16", steps=20, batch_size=2, progress=lambda *done: seen.append(done))
    with torch.inference_mode():
        log = model(windows().input_ids).logits[:, 59:79].log_softmax(-1)
    nll = -log.gather(-1, windows().input_ids[:, 60:80, None]).mean()
    assert result.reference_ppl == pytest.approx(math.exp(float(nll)), rel=1e-5)
    assert result.ppl == pytest.approx(result.reference_ppl, rel=1e-3)
    assert 0 <= result.kl_mean < 1e-4
    assert result.scored == 60
    assert seen == [(2, 3), (3, 3)]


def test_fewer_bits_are_further_away_and_smaller() -> None:
    model = build("llama")
    results = [evaluate_kv(model, windows(2), f"int{bits}:window=8", steps=40) for bits in (8, 4, 2)]
    distances = [result.kl_mean for result in results]
    assert distances == sorted(distances)
    assert results[0].bytes_per_token > results[1].bytes_per_token > results[2].bytes_per_token
    layers, heads, head_dim = 2, 2, 16
    assert all(result.bf16_bytes_per_token == layers * heads * head_dim * 2 * 2 for result in results)


@pytest.mark.parametrize(
    ("seq_len", "steps", "message"),
    [
        (100, 51, "half a window of 100 tokens is prefilled, so 51 steps do not fit; use kv_steps of at most 50"),
        (100, 0, "kv_steps is 0; it must be at least 1"),
    ],
)
def test_windows_that_are_too_short(seq_len: int, steps: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_window(seq_len, steps)
    check_window(101, 51)


@pytest.mark.shared
@pytest.mark.slow
def test_a_trained_model(shared: Path) -> None:
    """Four bits cost next to nothing; two bits by AKVQ-VL less than a quarter of what plain two-bit integers cost."""
    folder = shared / "models/llama-28m"
    text = load_evaluation(str(shared / "data/eval_docs.txt"), load_tokenizer(folder), 1024, 2)
    model = load(folder, dtype="float32")
    distances = [evaluate_kv(model, text, spec, steps=32).kl_mean for spec in ("akvq-vl:bits=4", "akvq-vl", "int2")]
    assert distances[0] < 0.01
    assert distances[0] < distances[1] < distances[2] / 4
