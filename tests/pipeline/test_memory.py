"""One block at a time: what a run holds does not grow with their number (benchmarks/bench_memory.py measures it)."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from quantized_models import calibration_text, small_run
from tiny_models import tiny_model

from quantkit.formats.checkpoint import find_tensors
from quantkit.pipeline import Listener
from quantkit.pipeline.request import ModuleReport


def float_bytes() -> int:
    """Of all floating point tensors that exist in this process, each storage once; none on the meta device."""
    plain = (torch.Tensor, torch.nn.Parameter)  # other tests leave fake tensors behind; isinstance wakes up proxies
    found = [item for item in gc.get_objects() if type(item) in plain]
    real = [tensor for tensor in found if tensor.device.type == "cpu" and tensor.is_floating_point()]
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in real}.values())


class Watch(Listener):
    """What is held beyond what was there before the run: when a block's last linear is solved, and between blocks."""

    def __init__(self) -> None:
        gc.collect()
        self.before = float_bytes()
        self.in_blocks: list[int] = []
        self.between_blocks: list[int] = []

    def block_started(self, index: int, n_linears: int) -> None:
        self.between_blocks.append(float_bytes() - self.before)

    def linear_done(self, report: ModuleReport) -> None:
        if report.name.endswith("down_proj"):
            self.in_blocks.append(float_bytes() - self.before)


@pytest.mark.slow  # half a million objects are looked at, ten times
@pytest.mark.parametrize(
    ("settings", "n_streams", "held"),
    [
        ([], 1, 0),
        (["sequential=true"], 1, 0),
        (["correction=0.5"], 2, 0),
        (["allocator=lim", "lo=2", "hi=4"], 1, 0),
        (["transform=hadamard"], 1, 8 * 65 * 64),
    ],
    ids=["gptq", "sequential", "correction", "allocator", "transform"],
)
def test_one_block_at_a_time(settings: list[str], n_streams: int, held: int, tmp_path: Path) -> None:
    """`held` bytes are those of a rotation: its signs and its factors."""
    n_blocks, n_samples, seq_len = 5, 4, 32
    source = tiny_model("llama", tmp_path, num_hidden_layers=n_blocks)
    block = sum(ref.n_bytes for name, ref in find_tensors(source).items() if ".layers.0." in name)
    hessians = 4 * (3 * 64 * 64 + 128 * 128)  # before q, o, gate and down
    states = 4 * n_samples * seq_len * 64
    shared = 4 * seq_len * (2 * 16 + seq_len)  # rotary tables and perhaps a mask: the same for all samples and blocks
    solving = 4 * 6 * 64 * 128  # of the last linear: its weight, codes, dequantized weight and their like
    watch = Watch()
    run_settings = {"settings": settings, "n_samples": n_samples, "seq_len": seq_len}
    small_run(source, tmp_path / "out", calibration_text(tmp_path), listener=watch, **run_settings)
    assert len(watch.in_blocks) == len(watch.between_blocks) == n_blocks
    assert max(watch.between_blocks) <= n_streams * states + shared + held
    # the float model that runs along is one more block, and its inputs are one more statistic
    assert max(watch.in_blocks) <= n_streams * (block + hessians + states) + shared + solving + held
    assert max(watch.between_blocks) < block
