"""What a quantization run is asked for, what it returns, and whom it tells about its progress."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import RequestError
from quantkit.recipe import Recipe

OFFLOADS = ("none", "cpu", "disk")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """Everything that determines the output folder, and where it goes."""

    model: str  # a folder, a hub id, or "demo"
    output: Path
    recipe: Recipe
    calib: str = "builtin"
    n_samples: int = 128
    seq_len: int | None = None  # tokens per sample; None: min(2048, the model's limit)
    calib_shuffle: bool = False
    template: str | None = None  # how a question about a picture is put; None: the model's own way
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"  # of the calibration forward; auto: float32 on the CPU, the model's own on a GPU
    offload: str = "cpu"  # where hidden states wait: none (on the device), cpu, disk
    overwrite: bool = False
    trust_remote_code: bool = False
    max_shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        if self.n_samples < 1:
            raise RequestError(f"n_samples must be at least 1, not {self.n_samples}")
        if self.seq_len is not None and self.seq_len < 2:
            raise RequestError(f"seq_len must be at least 2, not {self.seq_len}")
        if self.offload not in OFFLOADS:
            raise RequestError(f"unknown offload {self.offload!r}; one of {', '.join(OFFLOADS)}")
        if self.dtype not in DTYPES:
            raise RequestError(f"unknown dtype {self.dtype!r}; one of {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One quantized linear."""

    name: str
    format: str
    bpw: float  # stored bits per weight
    relative_error: float  # ||X (W - Q)^T|| / ||X W^T|| on calibration inputs; of the weights themselves without data

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "format": self.format, "bpw": self.bpw, "relative_error": self.relative_error}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """What a run reports. Bytes are those of the safetensors files' tensors."""

    output: Path
    method: str
    bpw: float  # stored bits per weight of the blocks' quantized linears
    size_bytes: int
    bytes: dict[str, int]  # where they went: quantized, embeddings, head, norms, other
    bits_per_parameter: float  # of the whole model
    original_bytes: int
    seconds: float
    peak_rss_bytes: int
    resumed_blocks: int
    modules: tuple[ModuleReport, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "method": self.method,
            "bpw": self.bpw,
            "size_bytes": self.size_bytes,
            "bytes": self.bytes,
            "bits_per_parameter": self.bits_per_parameter,
            "original_bytes": self.original_bytes,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "resumed_blocks": self.resumed_blocks,
            "modules": [module.to_json() for module in self.modules],
        }


class Listener:
    """Told what happens; every method may be overridden, none must be."""

    def started(self, n_blocks: int, n_resumed: int) -> None:
        """The walk begins; ``n_resumed`` blocks are finished already."""

    def block_started(self, index: int, n_linears: int) -> None:
        """A block is loaded and its calibration begins."""

    def linear_done(self, report: ModuleReport) -> None:
        """One linear has its codes."""

    def scales_trained(self, step: int, n_steps: int, loss: float) -> None:
        """Of the block in hand: gradient steps done, how many there are at most, and the loss on held-out samples."""

    def block_done(self, index: int, seconds: float) -> None:
        """The block's packed tensors are on disk."""

    def training_started(self, n_steps: int) -> None:
        """All blocks are packed; the training of the whole model begins."""

    def trained(self, step: int, n_steps: int, loss: float, held_out_loss: float) -> None:
        """``step`` steps are done and kept on disk; ``loss`` is the mean since the last time."""

    def note(self, text: str) -> None:
        """Something the user should know."""
