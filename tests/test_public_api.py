"""What `import quantkit` gives, and what it must not cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

import quantkit


def test_names() -> None:
    assert quantkit.__all__ == ["__version__", "evaluate", "kv_cache", "load", "quantize"]
    assert dir(quantkit) == quantkit.__all__
    assert quantkit.load.__module__ == "quantkit.runtime.loading"
    with pytest.raises(AttributeError, match="module 'quantkit' has no attribute 'qantize'"):
        _ = quantkit.qantize


def test_import_is_light() -> None:
    """Nothing heavy, optional or with side effects comes along in a fresh interpreter."""
    program = (
        "import sys, quantkit, quantkit.errors\n"
        "heavy = {'torch', 'transformers', 'triton', 'datasets', 'accelerate', 'typer', 'rich', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)), quantkit.__version__)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"[] {quantkit.__version__}"


def test_kernels_and_formats_need_neither_transformers_nor_triton() -> None:
    program = (
        "import sys, quantkit.formats.checkpoint, quantkit.kernels.grouped_int, quantkit.runtime.packed_linear\n"
        "print(sorted({'transformers', 'triton'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
