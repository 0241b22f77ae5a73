"""``quantkit bench`` where there is no GPU, and how its results are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import quantkit

from quantkit.cli.bench import _attention_line, _show_decode, _show_kernels, _tell


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("subject", ["attention", "kernels", "tune", "decode"])
def test_every_subject_needs_a_gpu(subject: str) -> None:
    result = quantkit("bench", subject, "--json")
    assert result.exit_code == 2
    assert result.error == f"bench {subject} needs a CUDA device"


def test_an_unknown_subject_is_refused() -> None:
    result = quantkit("bench", "attentoin")
    assert result.exit_code == 2
    assert "attention" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "4096"), "a shape is rows x columns, such as 14336x4096, not '4096'"),
        (("--bits", "9"), "unknown format 'int9'"),
        (("--format", "gptq"), "unknown format 'gptq'"),
        (("--peers", "tinygem"), "unknown peer 'tinygem'; did you mean 'tinygemm'"),
    ],
)
def test_bad_requests_for_kernels(arguments: tuple[str, ...], message: str) -> None:
    assert message in quantkit("bench", "kernels", *arguments).error


def test_a_journal_gets_a_line_for_each_result(tmp_path: Path) -> None:
    file = tmp_path / "speed.jsonl"
    for number in (1, 2):
        _tell("told", {"number": number}, file)
    _tell("told", {"number": 3}, None)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"number": 1}, {"number": 2}]


def test_a_line_for_a_cell_of_attention() -> None:
    results = [{"name": "sdpa flash", "microseconds": 48.44}, {"name": "int4", "microseconds": 19.25}]
    line = _attention_line({"context": 32768, "group": 8, "results": results})
    assert line == "32768 tokens, 8 query heads: sdpa flash 48.4, int4 19.2 µs"


def test_tables_begin_with_losses(capsys: pytest.CaptureFixture[str]) -> None:
    def cell(name: str, ours: float, failed: dict[str, str]) -> dict[str, Any]:
        times = {"microseconds": ours, "p10": ours, "p90": ours}
        return {
            "out_features": 8,
            "in_features": 1024,
            "format": name,
            "tokens": 1,
            "fraction_of_floor": 0.5,
            "best_peer": "cublas",
            "ratio_to_best_peer": ours / 10,
            "results": [{"name": "quantkit", **times}, {"name": "cublas", "microseconds": 10.0}],
            "failed": failed,
        }

    limits = {"copy_tb_s": 4.3, "read_tb_s": 4.5, "bf16_tflop_s": 790.0, "t0_us": 0.7}
    cells = [cell("int2", 5.0, {}), cell("int4", 20.0, {"humming": "no compiler"})]
    peers = {"gemlite": "not there", "tinygemm": None}
    _show_kernels({"environment": {"device": "a GPU"}, "ceilings": limits, "peers": peers, "cells": cells})
    shown = capsys.readouterr().out
    assert shown.index("0.50x") < shown.index("2.00x")
    assert "gemlite: absent (not there)" in shown
    assert "tinygemm" not in shown
    assert "humming: no compiler" in shown
    rows = [
        {"name": name, "step": "graph", "milliseconds": 4 / speed, "p10": 1.0, "p90": 1.0, "tokens_per_second": 250.0,
         "gigabytes": 2.0, "speedup": speed}
        for name, speed in (("bf16", 1.0), ("int2", 3.0), ("int4", 0.8))
    ]  # fmt: skip
    _show_decode({"environment": {"device": "a GPU"}, "rows": rows})
    shown = capsys.readouterr().out
    assert shown.index("0.80x") < shown.index("1.00x") < shown.index("3.00x")
