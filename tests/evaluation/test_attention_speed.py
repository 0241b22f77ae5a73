"""The measurement of attention: what can be checked without a GPU, and one small cell with one."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import RequestError
from quantkit.evaluation.attention_speed import bench_attention


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device() -> None:
    with pytest.raises(RequestError, match="bench attention needs a CUDA device"):
        bench_attention()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_small_cell() -> None:
    told: list[object] = []
    report = bench_attention(contexts=(1024,), groups=(4,), specs=("int4",), replays=3, progress=told.append)
    (cell,) = report["cells"]
    assert told == [cell]
    names = [each["name"] for each in cell["results"]]
    assert names[-1] == "int4"
    assert all(each["microseconds"] > 0 and each["p10"] <= each["p90"] for each in cell["results"])
