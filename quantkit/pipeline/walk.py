"""The loop over blocks: load, calibrate, solve, pack, write, release; then the next block sees the quantized prefix."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calib.datasets import Calibration, load_calibration
from quantkit.calib.hidden_states import BlockCalls, HiddenStates, capture_block_inputs
from quantkit.calib.statistics import StatisticsRecorder
from quantkit.errors import RequestError
from quantkit.formats.checkpoint import TRIPWIRE, has_tripwire
from quantkit.formats.grouped_int import NAME, GroupedIntSpec, pack, unpack
from quantkit.formats.safetensors_io import read_header, read_tensor
from quantkit.models.hub import download
from quantkit.models.skeleton import Skeleton
from quantkit.models.structure import Block, Linear
from quantkit.pipeline.journal import Journal, refuse_existing
from quantkit.pipeline.output import assemble
from quantkit.pipeline.plan import Plan, check_room, make_plan
from quantkit.pipeline.request import Listener, ModuleReport, QuantizeRequest, QuantizeResult
from quantkit.pipeline.solve import SAMPLE_ROWS, Solved, solve_linear
from quantkit.recipe import Recipe, resolve
from quantkit.runtime.loading import load_tokenizer
from quantkit.runtime.loading import resolve as resolve_model


def quantize(
    model: str | Path,
    output: str | Path | None = None,
    *,
    method: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    settings: Sequence[str] = (),
    recipe_file: str | Path | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> QuantizeResult:
    """Quantize a model folder, a hub id or ``"demo"`` into a packed folder.

    Args:
        output: the new folder; None: ``MODEL-METHOD-Bb`` in the current folder.
        method, bits, group_size, settings, recipe_file: see `quantkit.recipe.resolve`.
        options: further fields of `QuantizeRequest`: calib, n_samples, seq_len, seed, device, offload, ...

    Raises:
        RequestError, FileError, NumericalError: see their messages. Finished blocks survive; the same call resumes.

    >>> quantize("demo", method="gtpq")
    Traceback (most recent call last):
        ...
    quantkit.errors.RequestError: unknown method 'gtpq'; did you mean 'gptq'? known: gptq, rtn, slim
    """
    file = Path(recipe_file) if recipe_file is not None else None
    recipe = resolve(method, bits=bits, group_size=group_size, settings=settings, file=file)
    target = Path(output) if output is not None else default_output(str(model), recipe)
    return run(QuantizeRequest(model=str(model), output=target, recipe=recipe, **options), listener)


def default_output(model: str, recipe: Recipe) -> Path:
    """``NAME-METHOD-Bb`` in the current folder."""
    return Path(f"{Path(model).name}-{recipe.method}-{recipe.bits}b")


def dry_run(request: QuantizeRequest) -> Plan:
    """Check the whole request and say what it would do, without reading a weight or writing a file."""
    skeleton, device = _open(request)
    return make_plan(skeleton, request, _seq_len(skeleton, request), device)


def run(request: QuantizeRequest, listener: Listener | None = None) -> QuantizeResult:
    """Carry out a request; see `quantize`."""
    began = time.perf_counter()
    refuse_existing(request.output, request.overwrite)
    skeleton, device = _open(request)
    seq_len = _seq_len(skeleton, request)
    plan = make_plan(skeleton, request, seq_len, device)
    check_room(plan, request.output, device)
    calibration = _load_calibration(request, skeleton, seq_len) if request.recipe.needs_calibration else None
    dtype = _compute_dtype(request, skeleton, device)
    settings = _settings(request, skeleton, calibration, device, dtype)
    journal = Journal(request.output, settings, overwrite=request.overwrite)
    resumed = len(journal.finished)
    with _terminable(), torch.no_grad():
        walk = _Walk(request, skeleton, calibration, journal, listener or Listener(), device, dtype)
        walk.run()
        size = assemble(skeleton, journal, request, calibration)
    modules = [item for block in journal.finished for item in block.modules.items()]
    specs = [GroupedIntSpec.from_json(entry["spec"]) for _, entry in modules]
    return QuantizeResult(
        output=request.output,
        method=request.recipe.method,
        bpw=8 * sum(spec.n_bytes for spec in specs) / sum(spec.n_weights for spec in specs),
        size_bytes=size,
        original_bytes=plan.original_bytes,
        seconds=time.perf_counter() - began,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        resumed_blocks=resumed,
        modules=tuple(_report(name, entry) for name, entry in modules),
    )


class _Walk:
    """State of one run's loop over blocks."""

    def __init__(
        self,
        request: QuantizeRequest,
        skeleton: Skeleton,
        calibration: Calibration | None,
        journal: Journal,
        listener: Listener,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.recipe = request.recipe
        self.skeleton, self.journal, self.listener = skeleton, journal, listener
        self.device, self.dtype = device, dtype
        self.calibration = calibration
        offload = "cpu" if device.type == "cpu" and request.offload == "none" else request.offload
        self.hidden = HiddenStates(offload, journal.folder)
        self.calls: BlockCalls | None = None

    def run(self) -> None:
        blocks, n_finished = self.skeleton.blocks, len(self.journal.finished)
        self.listener.started(len(blocks), n_finished)
        if self.calibration is not None and n_finished < len(blocks):
            self._capture(self.calibration.input_ids)
        for index, block in enumerate(blocks):
            if index >= n_finished:
                self._quantize_block(index, block)
            elif self.calls is not None:
                self._replay_block(index, block)

    def _capture(self, input_ids: Tensor) -> None:
        self.skeleton.load_surroundings(self.device, self.dtype)
        modules = [self.skeleton.block_module(index) for index in range(len(self.skeleton.blocks))]
        samples = iter(row.unsqueeze(0).to(self.device) for row in input_ids)
        model = self.skeleton.model
        self.calls = capture_block_inputs(lambda ids: model(input_ids=ids, use_cache=False), samples, modules, self.hidden)
        self.skeleton.release_surroundings()

    def _quantize_block(self, index: int, block: Block) -> None:
        began = time.perf_counter()
        self.listener.block_started(index, len(block.linears))
        module = self.skeleton.load_block(index, self.device, self.dtype)
        tensors: dict[str, Tensor] = {}
        entries: dict[str, dict[str, Any]] = {}
        for stage in self._stages(index, block, module):
            recorder = self._record(index, module, stage)
            for linear in stage:
                solved = self._solve(linear, module, recorder)
                self._store(linear, solved, tensors, entries)
                _set_weight(module, linear, solved.weight.dequantize())
        if index + 1 < len(self.skeleton.blocks):
            self._advance(index, module)
        self.skeleton.release_block(index)
        seconds = time.perf_counter() - began
        self.journal.finish_block(index, tensors, seconds, entries)
        self.listener.block_done(index, seconds)

    def _replay_block(self, index: int, block: Block) -> None:
        """A finished block, run again from its packed tensors: the same bytes give the same hidden states."""
        module = self.skeleton.load_block(index, self.device, self.dtype)
        refs = read_header(self.journal.block_path(index))
        for linear in block.linears:
            spec = GroupedIntSpec.from_json(self.journal.finished[index].modules[linear.name]["spec"])
            prefix = self._prefix(linear)
            tensors = {key: read_tensor(refs[f"{prefix}.{key}"]).to(self.device) for key in spec.tensor_layout()}
            _set_weight(module, linear, unpack(spec, tensors).dequantize())
        self._advance(index, module)
        self.skeleton.release_block(index)

    def _stages(self, index: int, block: Block, module: nn.Module) -> list[list[Linear]]:
        """All linears at once, or, sequentially, one stage for each distinct input in running order."""
        if not (self.recipe.sequential and self.calls is not None):
            return [list(block.linears)]
        probe = StatisticsRecorder({linear.path: module.get_submodule(linear.path) for linear in block.linears})
        with probe.recording():
            self._call(index, module, 0)
        stages: dict[str, list[Linear]] = {}
        order = {path: position for position, path in enumerate(probe.first_calls())}
        for linear in sorted(block.linears, key=lambda linear: order.get(linear.path, len(order))):
            stages.setdefault(probe.leader(linear.path), []).append(linear)
        return list(stages.values())

    def _record(self, index: int, module: nn.Module, stage: list[Linear]) -> StatisticsRecorder | None:
        if self.calls is None:
            return None
        wants_rows = self.recipe.allocator == "sba" and self.recipe.criterion == "kl"
        rows = -(-SAMPLE_ROWS // len(self.hidden)) if wants_rows else 0
        recorder = StatisticsRecorder({linear.path: module.get_submodule(linear.path) for linear in stage}, rows)
        with recorder.recording():
            for sample in range(len(self.hidden)):
                self._call(index, module, sample)
                recorder.next_call()
        return recorder

    def _advance(self, index: int, module: nn.Module) -> None:
        for sample in range(len(self.hidden)):
            self.hidden[sample] = self._call(index, module, sample)

    def _call(self, index: int, module: nn.Module, sample: int) -> Tensor:
        assert self.calls is not None
        output = module(self.hidden[sample].to(self.device), **self.calls[index][sample])
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def _solve(self, linear: Linear, module: nn.Module, recorder: StatisticsRecorder | None) -> Solved:
        statistics = recorder.statistics(linear.path) if recorder else None
        if statistics is not None and statistics.n_tokens == 0:
            self.listener.note(f"{linear.name}: no calibration token reached it; its inputs are taken as equally important")
        solved = solve_linear(linear, module.get_submodule(linear.path).weight, statistics, self.recipe)  # type: ignore[arg-type]
        if solved.damping > self.recipe.damping:
            self.listener.note(f"{linear.name}: Hessian not positive definite; damping raised to {solved.damping:g}")
        return solved

    def _store(
        self, linear: Linear, solved: Solved, tensors: dict[str, Tensor], entries: dict[str, dict[str, Any]]
    ) -> None:
        prefix, spec = self._prefix(linear), solved.weight.spec()
        for key, tensor in pack(solved.weight).items():
            tensors[f"{prefix}.{key}"] = tensor.cpu()
        if has_tripwire(linear.name):
            tensors[f"{prefix}.{TRIPWIRE}"] = torch.empty(0, dtype=torch.float16)
        entry = {"prefix": prefix, "spec": spec.to_json(), "relative_error": solved.relative_error}
        if solved.damping:
            entry["damping"] = solved.damping
        entries[linear.name] = entry
        self.listener.linear_done(_report(linear.name, entry))

    def _prefix(self, linear: Linear) -> str:
        return self.skeleton.source_name(f"{linear.name}.weight").removesuffix(".weight")


def _set_weight(module: nn.Module, linear: Linear, weight: Tensor) -> None:
    target = module.get_submodule(linear.path)
    target.weight.data = weight.to(target.weight.dtype)  # type: ignore[union-attr]


def _report(name: str, entry: dict[str, Any]) -> ModuleReport:
    return ModuleReport(name, NAME, GroupedIntSpec.from_json(entry["spec"]).bpw, entry["relative_error"])


def _open(request: QuantizeRequest) -> tuple[Skeleton, torch.device]:
    device = _device(request.device)
    found = resolve_model(request.model)
    folder = found if isinstance(found, Path) else download(found)
    return Skeleton(folder, trust_remote_code=request.trust_remote_code), device


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"unknown device {name!r}; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RequestError("device cuda: this machine has no usable CUDA device; use --device cpu")
    return device


def _compute_dtype(request: QuantizeRequest, skeleton: Skeleton, device: torch.device) -> torch.dtype:
    if request.dtype != "auto":
        return getattr(torch, request.dtype)  # type: ignore[no-any-return]
    stored = getattr(skeleton.config, "dtype", None)
    return stored if device.type != "cpu" and isinstance(stored, torch.dtype) else torch.float32


def _seq_len(skeleton: Skeleton, request: QuantizeRequest) -> int:
    limit = getattr(skeleton.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2048
    if request.seq_len is not None and request.seq_len > limit:
        raise RequestError(f"seq_len {request.seq_len} exceeds the model's context of {limit} tokens")
    return request.seq_len or min(2048, limit)


def _load_calibration(request: QuantizeRequest, skeleton: Skeleton, seq_len: int) -> Calibration:
    return load_calibration(
        request.calib,
        load_tokenizer(skeleton.folder, trust_remote_code=request.trust_remote_code),
        n_samples=request.n_samples,
        seq_len=seq_len,
        seed=request.seed,
        shuffle=request.calib_shuffle,
        vocab_size=skeleton.config.get_text_config(decoder=True).vocab_size,
    )


def _settings(
    request: QuantizeRequest,
    skeleton: Skeleton,
    calibration: Calibration | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Everything that determines the bytes of the packed tensors; files by size and time, not by hash (they are large)."""
    files = sorted({ref.path for ref in skeleton.tensors.values()})
    return {
        "recipe": request.recipe.to_json(),
        "calibration": calibration.to_json() if calibration else None,
        "seed": request.seed,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__},
        "source": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
    }


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a run like Ctrl-C: through ``finally``, with the finished blocks kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
