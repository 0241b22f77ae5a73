"""`bench tune`: refusals without a device; on one, that what wins is what runs afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantkit.errors import RequestError
from quantkit.evaluation.launch_tuning import tune
from quantkit.evaluation.random_weights import random_spec
from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.gemv import GemvConfig, launch_config

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_requests_are_refused_before_the_device_is_asked_for():
    with pytest.raises(RequestError, match="unknown format 'int9'"):
        tune(widths=[9])
    with pytest.raises(RequestError, match="4096 tokens have no launch shape to choose; use 1 to"):
        tune(tokens=[4096])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device():
    with pytest.raises(RequestError, match="bench tune needs a CUDA device"):
        tune()


@pytest.mark.gpu
@on_gpu
def test_what_wins_runs_from_then_on(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_CACHE_DIR", str(tmp_path))
    seen = []
    report = tune([(2048, 1024)], [4, 3, 8], progress=seen.append)  # 4 bits run in a computed shape
    assert [row["bits"] for row in seen] == [3, 8]
    assert report["rows"] == seen
    assert Path(report["file"]).parent == tmp_path
    for row, written in zip(seen, json.loads(Path(report["file"]).read_text())["shapes"], strict=True):
        assert 0 < row["microseconds"] <= row["computed_microseconds"]
        assert row["candidates"] > 1
        assert row.items() >= written.items()
        spec = random_spec(f"int{row['bits']}", 2048, 1024)
        assert isinstance(spec, GroupedIntSpec)
        assert launch_config(spec, report["device"]) == GemvConfig(**row["shape"])


@pytest.mark.gpu
@on_gpu
def test_bit_products_have_no_shape_to_choose(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_CACHE_DIR", str(tmp_path))
    with pytest.raises(RequestError, match="nothing to choose: the tensor core's kernels for few tokens"):
        tune([(2048, 1024)], [4, 1], tokens=[2])
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@on_gpu
def test_nothing_is_measured_inside_a_graph(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_CACHE_DIR", str(tmp_path))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ones(1, device="cuda")  # torch warns of an empty graph
        with pytest.raises(RequestError, match="cannot be measured while a CUDA graph is captured; run bench tune"):
            tune([(2048, 1024)], [3])
    assert not list(tmp_path.iterdir())
