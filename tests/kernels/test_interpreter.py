"""Runs the interpreter cases where Triton is imported in interpreter mode: in a fresh process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
FILES = [
    "interpreter_cases.py",
    "gemv_interpreter_cases.py",
    "mixed_rows_interpreter_cases.py",
    "few_rows_interpreter_cases.py",
    "bit_interpreter_cases.py",
    "mma_gemv_interpreter_cases.py",
    "sign_rows_interpreter_cases.py",
    "sign_product_interpreter_cases.py",
    "interpreter_sign_cases.py",
    "kv_interpreter_cases.py",
    "decode_interpreter_cases.py",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name):
    cases = Path(__file__).with_name(name)
    root = cases.parents[2]
    path = os.pathsep.join((str(root), str(cases.parent)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
