"""Compiling Triton kernels for an H100/H200 (sm_90) without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest


class Sm90:
    """Stands where Triton expects the driver of a device: compiling asks for the target only."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compile_for_sm90(tmp_path, monkeypatch):
    """A function that compiles a kernel for the arguments of a launch and returns (metadata, SASS, resources)."""
    triton = pytest.importorskip("triton")
    tool = shutil.which("cuobjdump") or str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    if not Path(tool).exists():
        pytest.skip("no cuobjdump, in this Triton or on the PATH")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    had_driver = triton.runtime.driver._active
    triton.runtime.driver.set_active(Sm90())

    def compile_kernel(kernel, grid, arguments, **constants):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Triton's own, about its defaults
            compiled = kernel.warmup(grid=grid, **arguments, **constants)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])

        def dump(option: str) -> str:
            return subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout

        resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("-res-usage"))}
        return compiled.metadata, dump("-sass"), resources

    yield compile_kernel
    triton.runtime.driver._active = had_driver
