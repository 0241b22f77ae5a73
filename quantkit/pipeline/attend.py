"""solver=boa: a block's attention is watched while calibration runs, or its linears are left to GPTQ, saying why."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from quantkit.calib.attention import AttentionRecorder, HeadFactors, head_factors
from quantkit.models.attention import Attention, find_attention
from quantkit.recipe import Recipe


class AttentionWatch:
    """The attention of one block during one pass over the calibration data; nothing under other solvers.

    Args:
        name: of the block, for notes.
        block: the decoder block.
        paths: of the linears that are solved after this pass; queries, keys and values are, or none of them.
        note: told when the block's queries, keys and values are left to GPTQ, and why.
    """

    def __init__(
        self, name: str, block: nn.Module, paths: Collection[str], recipe: Recipe, note: Callable[[str], None]
    ) -> None:
        self._name, self._note = name, note
        self._attention: Attention | None = None
        self._recorder: AttentionRecorder | None = None
        if recipe.solver != "boa":
            return
        found = find_attention(block)
        if not isinstance(found, Attention):
            self._fall_back(found.reason)
        elif set(found.linears) & set(paths):
            self._attention = found
            self._recorder = AttentionRecorder(
                found,
                block,
                metric=recipe.qk_metric,  # type: ignore[arg-type]
                value_columns=recipe.block_v,
                value_rows=recipe.v_row_factor,
                center_keys=recipe.center_keys,
            )

    def recording(self) -> AbstractContextManager[None]:
        """Watch everything that runs through the block inside this context."""
        return self._recorder.recording() if self._recorder else nullcontext()

    def factors(self) -> dict[str, list[HeadFactors]]:
        """By path of the linear; empty where GPTQ takes over."""
        if self._attention is None or self._recorder is None:
            return {}
        if self._recorder.problem:
            self._fall_back(self._recorder.problem)
        statistics = self._recorder.statistics()
        return head_factors(self._attention, statistics) if statistics else {}

    def _fall_back(self, reason: str) -> None:
        self._note(f"{self._name}: {reason}; BoA's derivation does not hold, so GPTQ quantizes all of it")


def attention_bytes(block: nn.Module, recipe: Recipe, seq_len: int) -> int:
    """What ``solver=boa`` holds beside the linears' own Hessians; the block may be on the meta device."""
    found = find_attention(block) if recipe.solver == "boa" else None
    if not isinstance(found, Attention):
        return 0
    inputs: int = block.get_submodule(found.v.path).in_features  # type: ignore[assignment]
    columns = 5 * 4 * found.kv_heads * inputs**2 if recipe.block_v else 0  # sums, copies without dead columns, factors
    return columns + 4 * 4 * (found.heads // found.kv_heads) * seq_len**2  # logits and probabilities of one key head
