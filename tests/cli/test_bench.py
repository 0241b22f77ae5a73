"""``quantkit bench`` where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from cli_runs import quantkit


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_attention_needs_a_gpu() -> None:
    result = quantkit("bench", "attention", "--json")
    assert result.exit_code == 2
    assert "bench attention needs a CUDA device" in result.stderr


def test_an_unknown_subject_is_refused() -> None:
    result = quantkit("bench", "attentoin")
    assert result.exit_code == 2
    assert "attention" in result.stderr
