"""A tiny model and its packed form, which the tests of the command line share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from cli_runs import Inputs, quantkit
from tiny_models import tiny_model


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    words = random.Random(0).choices(["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs"], k=2000)
    (folder / "calib.txt").write_text(" ".join(words))
    return Inputs(tiny_model("llama", folder), folder / "calib.txt")


@pytest.fixture(scope="session")
def packed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `inputs` at 4 bits; not to be changed."""
    folder = tmp_path_factory.mktemp("packed") / "model-4bit"
    assert quantkit("quantize", inputs.model, *inputs.flags, "--output", folder).exit_code == 0
    return folder
