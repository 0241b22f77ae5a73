"""One block after its linears are solved: their scales trained on what the block puts out (solver=ptq161)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.func import functional_call

from quantkit.algorithms.block_scales import BlockConfig, Optimized, optimize_scales
from quantkit.calib.hidden_states import HiddenStates
from quantkit.formats.sign_salient import SignSalient
from quantkit.recipe import Recipe

BlockCall = Callable[[int, nn.Module, Tensor], Tensor]  # (sample, block, what enters it) -> what leaves it


class BlockTuning:
    """Targets and inputs of one block.

    Args:
        inputs: of the block behind the quantized prefix.
        float_inputs: of the block in the float model.
        call: runs the block on one sample; the inputs are on any device.
        offload, folder: where the targets wait, as with hidden states.
    """

    def __init__(
        self, inputs: HiddenStates, float_inputs: HiddenStates, call: BlockCall, offload: str, folder: Path
    ) -> None:
        self._inputs, self._call = inputs, call
        self._streams = [inputs, float_inputs]
        self._targets = [HiddenStates(offload, folder, name=f"target-{name}") for name in ("prefix", "float")]

    def run(
        self,
        module: nn.Module,
        float_module: nn.Module,
        weights: Mapping[str, SignSalient],
        recipe: Recipe,
        progress: Callable[[int, int, float], None],
    ) -> Optimized:
        """Train the scales of the linears whose paths in the block are the keys of ``weights``."""
        for stream, targets in zip(self._streams, self._targets, strict=True):
            for sample in range(len(stream)):
                targets.append(self._call(sample, float_module, stream[sample]))
        dtypes = {path: module.get_submodule(path).get_parameter("weight").dtype for path in weights}
        block = _Functional(module)

        def forward(sample: int, current: Mapping[str, Tensor]) -> Tensor:
            block.weights = {f"{path}.weight": weight.to(dtypes[path]) for path, weight in current.items()}
            return self._call(sample, block, self._inputs[sample]).float()

        def targets_of(sample: int) -> list[Tensor]:
            device = next(iter(weights.values())).signs.device
            return [targets[sample].to(device).float() for targets in self._targets]

        config = BlockConfig(
            steps=recipe.block_steps,
            lr=recipe.block_lr,
            parameters=recipe.block_scales,  # type: ignore[arg-type]
            angular=recipe.block_angular,
        )
        return optimize_scales(weights, forward, targets_of, len(self._inputs), config, progress)


class _Functional(nn.Module):
    """A block with other weights than its own, for as long as one call takes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.weights: dict[str, Tensor] = {}

    def forward(self, *args: object, **kwargs: object) -> object:
        return functional_call(self.block, self.weights, args, kwargs)
