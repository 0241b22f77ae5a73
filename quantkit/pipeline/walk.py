"""The loop over blocks: load, calibrate, solve, pack, write, release; then the next block sees the quantized prefix."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.algorithms.littlebit import Rank
from quantkit.calib.attention import HeadFactors
from quantkit.calib.hidden_states import BlockCalls, HiddenStates, capture_block_inputs
from quantkit.calib.pictures import CalibrationSet, for_forward
from quantkit.calib.statistics import StatisticsRecorder, inputs_of
from quantkit.formats.checkpoint import TRIPWIRE, has_tripwire
from quantkit.formats.safetensors_io import read_header, read_tensor
from quantkit.formats.sign_salient import SignSalient
from quantkit.formats.storage import pack, spec_from_json, unpack
from quantkit.models.skeleton import Skeleton
from quantkit.models.structure import Block, Linear, kind_of
from quantkit.pipeline.allocate import Allocator, needs_activations
from quantkit.pipeline.attend import AttentionWatch
from quantkit.pipeline.budget import Choice
from quantkit.pipeline.factorize import factorize_linear, ranks_of
from quantkit.pipeline.journal import Journal
from quantkit.pipeline.modality import modality_errors, probes, token_weights
from quantkit.pipeline.outside import OutsideMatrix, set_embedding
from quantkit.pipeline.request import Listener, ModuleReport, QuantizeRequest
from quantkit.pipeline.scored import ScoredBlock, predicting
from quantkit.pipeline.solve import SAMPLE_ROWS, Solved, relative_error, solve_linear
from quantkit.pipeline.tune import BlockTuning
from quantkit.pipeline.vision import round_vision, solve_vision


class Walk:
    """State of one run's loop over blocks."""

    def __init__(
        self,
        request: QuantizeRequest,
        skeleton: Skeleton,
        calibration: CalibrationSet | None,
        journal: Journal,
        listener: Listener,
        device: torch.device,
        dtype: torch.dtype,
        outside: Sequence[OutsideMatrix] = (),
    ) -> None:
        self.recipe = request.recipe
        self.skeleton, self.journal, self.listener = skeleton, journal, listener
        self.device, self.dtype = device, dtype
        self.calibration = calibration
        self.image_masks = calibration.image_masks if calibration is not None else None
        self.outside = outside  # quantized already: the blocks see the stored embedding
        self.seed = request.seed
        self.offload = "cpu" if device.type == "cpu" and request.offload == "none" else request.offload
        self.hidden = HiddenStates(self.offload, journal.folder)
        self.float_hidden: HiddenStates | None = None  # the float model's, where the recipe aims at its outputs
        self.calls: BlockCalls | None = None
        self.choices: dict[str, Choice] = {}  # of each linear, where the recipe mixes widths
        self.ranks: dict[str, Rank] = {}  # of each linear, where weights become factors
        self.heads: dict[str, list[HeadFactors]] = {}  # solver=boa: what attention does with a linear's outputs

    def run(self) -> None:
        blocks, n_finished = self.skeleton.blocks, len(self.journal.finished)
        self.listener.started(len(blocks) + (self.recipe.vision_bits is not None), n_finished)
        transform = self.skeleton.transform
        if transform is not None and transform.extra_bytes:
            self.listener.note(
                f"transform={self.recipe.transform}: the output head no longer shares the embedding: "
                f"{transform.extra_bytes / 1e6:.1f} MB more"
            )
        if not n_finished:
            self.skeleton.check_surroundings()
        if self.recipe.mixes_widths:
            allocator = Allocator(self.recipe, blocks, self.seed, self.listener)
            behind = partial(predicting, self.skeleton, self.calibration, self.device, self.dtype)  # type: ignore[arg-type]
            self.choices = allocator.choices(self.journal.folder, self._original_blocks(), behind)
        if self.recipe.stores_signs:
            self.ranks = ranks_of([linear for block in blocks for linear in block.linears], self.recipe)
        if self.calibration is not None and n_finished < len(blocks):
            if self.recipe.follows_float_model:
                self._capture(self.calibration, original=True)
                self._fork_float_stream()
            if self.outside or self.recipe.vision_bits is not None or not self.recipe.follows_float_model:
                self._capture(self.calibration)
        for index, block in enumerate(blocks):
            if index >= n_finished:
                self._quantize_block(index, block)
            elif self.calls is not None:
                self._replay_block(index, block)
        if self.recipe.vision_bits is not None and n_finished <= len(blocks):
            self._quantize_vision()

    def _original_blocks(self) -> Iterator[ScoredBlock]:
        """The unquantized model block by block, for an allocator to look at."""
        if needs_activations(self.recipe):
            assert self.calibration is not None
            self._capture(self.calibration, original=True)
        for index in range(len(self.skeleton.blocks)):
            module = self.skeleton.load_block(index, self.device, self.dtype)
            outcomes, forward = self._outcomes(index, module), partial(self._forward, index, module)
            yield ScoredBlock(module, len(self.hidden), outcomes, forward, self.image_masks, self.hidden.__getitem__)
            self.skeleton.release_block(index)
        self.calls = None

    def _outcomes(self, index: int, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """What enters and what leaves a block, sample by sample; the hidden states advance on the way."""
        for sample in range(len(self.hidden)):
            after = self._call(index, module, sample)
            yield self.hidden[sample], after
            self.hidden[sample] = after

    def _capture(self, calibration: CalibrationSet, original: bool = False) -> None:
        """What enters the first block: of the source, or with what is rounded around the blocks as it is stored."""
        self.hidden = HiddenStates(self.offload, self.journal.folder)
        self.skeleton.load_surroundings(self.device, self.dtype)
        if not original:
            round_vision(self.skeleton, self.recipe)
            set_embedding(self.skeleton.model.get_input_embeddings().weight, self.outside, self.journal.folder)
        modules = [self.skeleton.block_module(index) for index in range(len(self.skeleton.blocks))]
        model = self.skeleton.model
        samples = (for_forward(model, inputs, self.device, self.dtype) for inputs in calibration.inputs())
        self.calls = capture_block_inputs(
            lambda inputs: model(**inputs, use_cache=False), samples, modules, self.hidden
        )
        self.skeleton.release_surroundings()

    def _fork_float_stream(self) -> None:
        """Until the first block is quantized, the float model's hidden states are the same."""
        self.float_hidden = HiddenStates(self.offload, self.journal.folder, name="float")
        for sample in range(len(self.hidden)):
            self.float_hidden.append(self.hidden[sample])

    def _quantize_block(self, index: int, block: Block) -> None:
        began = time.perf_counter()
        self.listener.block_started(index, len(block.linears))
        module = self.skeleton.load_block(index, self.device, self.dtype)
        float_module = copy.deepcopy(module) if self.float_hidden is not None else None
        before = self._probe(index, module)
        tensors: dict[str, Tensor] = {}
        entries: dict[str, dict[str, Any]] = {}
        untrained: list[tuple[Linear, Solved, Tensor | None]] = []
        for stage in self._stages(index, block, module):
            recorder = self._record(index, module, stage, float_module)
            for linear in stage:
                solved = self._solve(linear, module, recorder)
                _set_weight(module, linear, solved.weight.dequantize())
                if self.recipe.block_steps and float_module is not None:
                    hessian = recorder.statistics(linear.path).hessian() if recorder else None
                    untrained.append((linear, solved, hessian))
                else:
                    self._store(linear, solved, tensors, entries)
        if untrained and float_module is not None:
            for linear, solved in self._train(index, module, float_module, untrained):
                self._store(linear, solved, tensors, entries)
                _set_weight(module, linear, solved.weight.dequantize())
        errors = self._modality_errors(before, self._probe(index, module))
        if index + 1 < len(self.skeleton.blocks):
            self._advance(index, module)
            self._advance_float(index, float_module)
        self.skeleton.release_block(index)
        seconds = time.perf_counter() - began
        if self.skeleton.transform is not None:
            tensors |= self.skeleton.transform.block_tensors(index)
        self.journal.finish_block(index, tensors, seconds, entries, errors)
        self.listener.block_done(index, seconds)

    def _quantize_vision(self) -> None:
        """The last entry of the journal: it needs no statistics, and nothing comes after it."""
        index, began = len(self.skeleton.blocks), time.perf_counter()
        self.listener.block_started(index, 0)
        tensors: dict[str, Tensor] = {}
        entries: dict[str, dict[str, Any]] = {}
        for linear, solved in solve_vision(self.skeleton, self.recipe, self.device, self.dtype):
            self._store(linear, solved, tensors, entries)
        seconds = time.perf_counter() - began
        self.journal.finish_block(index, tensors, seconds, entries, {})
        self.listener.block_done(index, seconds)

    def _probe(self, index: int, module: nn.Module) -> list[Tensor]:
        """The block's outputs on a few samples, where image and text tokens are told apart."""
        samples = probes(self.image_masks) if self.calls is not None else []
        return [self._call(index, module, sample) for sample in samples]

    def _modality_errors(self, before: list[Tensor], after: list[Tensor]) -> dict[str, float]:
        if self.image_masks is None:
            return {}
        return modality_errors(before, after, [self.image_masks[sample] for sample in probes(self.image_masks)])

    def _weights(self, sample: int) -> Tensor | None:
        """What each token counts; None: all alike."""
        return None if self.image_masks is None else token_weights(self.recipe, self.image_masks[sample])

    def _replay_block(self, index: int, block: Block) -> None:
        """A finished block, run again from its packed tensors: the same bytes give the same hidden states."""
        module = self.skeleton.load_block(index, self.device, self.dtype)
        self._advance_float(index, module)
        refs = read_header(self.journal.block_path(index))
        for linear in block.linears:
            spec = spec_from_json(self.journal.finished[index].modules[linear.name]["spec"])
            prefix = self._prefix(linear)
            tensors = {key: read_tensor(refs[f"{prefix}.{key}"]).to(self.device) for key in spec.tensor_layout()}
            _set_weight(module, linear, unpack(spec, tensors).dequantize())
        self._advance(index, module)
        self.skeleton.release_block(index)

    def _stages(self, index: int, block: Block, module: nn.Module) -> list[list[Linear]]:
        """All linears at once, or, sequentially, one stage for each distinct input in running order.

        Experts run side by side: the same linear of all of them is one stage, also of those that the probe missed.
        """
        if not (self.recipe.sequential and self.calls is not None):
            return [list(block.linears)]
        probe = StatisticsRecorder({linear.path: module.get_submodule(linear.path) for linear in block.linears})
        with probe.recording():
            self._call(index, module, 0)
        leaders: dict[str, str] = {}  # in running order
        for path in probe.first_calls():
            leaders.setdefault(kind_of(path), kind_of(probe.leader(path)))
        stages: dict[str, list[Linear]] = {leader: [] for leader in leaders.values()}
        for linear in block.linears:
            kind = kind_of(linear.path)
            stages.setdefault(leaders.get(kind, kind), []).append(linear)
        return list(stages.values())

    def _train(
        self,
        index: int,
        module: nn.Module,
        float_module: nn.Module,
        untrained: list[tuple[Linear, Solved, Tensor | None]],
    ) -> Iterator[tuple[Linear, Solved]]:
        """The linears of a block with scales trained on its outputs; errors measured again, of the weight itself."""
        assert self.float_hidden is not None

        def call(sample: int, block: nn.Module, inputs: Tensor) -> Tensor:
            return self._forward(index, block, sample, inputs.to(self.device))

        tuning = BlockTuning(self.hidden, self.float_hidden, call, self.offload, self.journal.folder)
        weights = {
            linear.path: solved.weight for linear, solved, _ in untrained if isinstance(solved.weight, SignSalient)
        }
        tuned = tuning.run(module, float_module, weights, self.recipe, self.listener.scales_trained)
        self.listener.note(
            f"{self.skeleton.blocks[index].name}: scales trained for {tuned.steps} steps, "
            f"held-out loss {tuned.before:.4f} -> {tuned.after:.4f}"
        )
        for linear, solved, hessian in untrained:
            weight = tuned.weights[linear.path]
            original = float_module.get_submodule(linear.path).get_parameter("weight").float()
            error = relative_error(original, weight.dequantize(), hessian)
            yield linear, solved._replace(weight=weight, relative_error=error)

    def _record(
        self, index: int, module: nn.Module, stage: list[Linear], float_module: nn.Module | None
    ) -> StatisticsRecorder | None:
        if self.calls is None:
            return None
        wants_rows = self.recipe.mixes_groups and self.recipe.criterion == "kl"
        rows = -(-SAMPLE_ROWS // len(self.hidden)) if wants_rows else 0
        linears = {linear.path: module.get_submodule(linear.path) for linear in stage}
        recorder = StatisticsRecorder(
            linears, rows, absmax=self.recipe.salience == "absmax", strict=self.recipe.weighs_tokens
        )
        paths = [linear.path for linear in stage]
        watch = AttentionWatch(self.skeleton.blocks[index].name, module, paths, self.recipe, self.listener.note)
        with recorder.recording(), watch.recording():
            for sample in range(len(self.hidden)):
                recorder.next_call(self._float_inputs(index, float_module, stage, sample), self._weights(sample))
                self._call(index, module, sample)
        self.heads = watch.factors()
        return recorder

    def _float_inputs(
        self, index: int, float_module: nn.Module | None, stage: list[Linear], sample: int
    ) -> dict[str, Tensor]:
        """What the linears of a stage receive in the float model; experts are left out: their tokens may differ."""
        if float_module is None or not self.recipe.correction:
            return {}
        linears = {item.path: float_module.get_submodule(item.path) for item in stage if ".experts." not in item.path}
        with inputs_of(linears) as inputs:
            self._call(index, float_module, sample, self.float_hidden)
        return inputs

    def _advance_float(self, index: int, module: nn.Module | None) -> None:
        if self.float_hidden is None or module is None:
            return
        for sample in range(len(self.float_hidden)):
            self.float_hidden[sample] = self._call(index, module, sample, self.float_hidden)

    def _advance(self, index: int, module: nn.Module) -> None:
        for sample in range(len(self.hidden)):
            self.hidden[sample] = self._call(index, module, sample)

    def _call(self, index: int, module: nn.Module, sample: int, hidden_states: HiddenStates | None = None) -> Tensor:
        states = self.hidden if hidden_states is None else hidden_states
        return self._forward(index, module, sample, states[sample].to(self.device))

    def _forward(self, index: int, module: nn.Module, sample: int, inputs: Tensor) -> Tensor:
        assert self.calls is not None
        output = module(inputs, **self.calls[index][sample])
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def _solve(self, linear: Linear, module: nn.Module, recorder: StatisticsRecorder | None) -> Solved:
        statistics = recorder.statistics(linear.path) if recorder else None
        if statistics is not None and statistics.n_tokens == 0:
            self.listener.note(
                f"{linear.name}: no calibration token reached it; its inputs are taken as equally important"
            )
        recipe = self.recipe.at(*self.choices[linear.name]) if self.choices else self.recipe
        weight: Tensor = module.get_submodule(linear.path).weight  # type: ignore[assignment]
        if self.ranks:
            solved = factorize_linear(linear, weight, statistics, recipe, self.ranks[linear.name])
        else:
            solved = solve_linear(linear, weight, statistics, recipe, self.heads.get(linear.path, ()))
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
        self.listener.linear_done(module_report(linear.name, entry))

    def _prefix(self, linear: Linear) -> str:
        return self.skeleton.source_name(f"{linear.name}.weight").removesuffix(".weight")


def _set_weight(module: nn.Module, linear: Linear, weight: Tensor) -> None:
    target = module.get_submodule(linear.path).get_parameter("weight")
    target.data = weight.to(target.dtype)


def module_report(name: str, entry: dict[str, Any]) -> ModuleReport:
    """What is reported of a linear, from its entry in the journal."""
    spec = spec_from_json(entry["spec"])
    return ModuleReport(name, spec.format, spec.bpw, entry["relative_error"])
