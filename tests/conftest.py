"""Fixtures that more than one room's tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data to measure on: QUANTKIT_SHARED, or ../shared beside the repository."""
    folder = Path(os.environ.get("QUANTKIT_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "models").is_dir():
        pytest.skip(f"no models in {folder}; set QUANTKIT_SHARED to the folder that holds them")
    return folder
