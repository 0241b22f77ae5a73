"""Settings of the pipeline's tests, and what most of them start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from quantized_models import calibration_text


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of 64 columns: several threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the small models of a test file lie."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def text(models: Path) -> Path:
    """A calibration text."""
    return calibration_text(models)
