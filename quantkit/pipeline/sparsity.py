"""CASP's condition, measured before anything is factorized: sparse attention over redundant image tokens.

The paper argues that errors of queries and keys are damped where attention is sparse, as it is over many image tokens
that resemble each other. Where that does not hold, low-rank queries and keys can cost more than their bytes are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from quantkit.algorithms.casp import attention_density, redundancy
from quantkit.calib.attention import AttentionRecorder
from quantkit.models.attention import Attention, find_attention

MAX_DENSITY = 0.6  # of attention that counts as sparse: the paper's curves reach from 24 % to 66 % sparsity
MIN_IMAGE_SHARE = 0.5  # of the tokens: the paper's curves begin at 54 %
MIN_REDUNDANCY = 0.2  # mean cosine of image tokens; independent directions have about 0
N_PROBES = 2  # samples whose attention maps are looked at


@dataclass
class Condition:
    """Gathers what the blocks show.

    Attributes:
        densities: share of the causal attention that is not negligible, per block.
        redundancies: mean cosine between the image tokens that enter a block, per block.
        image_share: of image tokens among the tokens of the samples looked at.
    """

    image_share: float = 0.0
    densities: list[float] = field(default_factory=list)
    redundancies: list[float] = field(default_factory=list)

    def look_at(
        self,
        module: nn.Module,
        forward: Callable[[int, Tensor], Tensor],
        before: Sequence[Tensor],
        image_masks: Sequence[Tensor] | None,
    ) -> None:
        """Run a block on the first samples.

        Args:
            module: the block with its original weights.
            forward: (sample, input) -> output of the block.
            before: float ``[1, n_tokens, hidden]``, what enters the block, per sample.
            image_masks: bool ``[n_tokens]`` per sample, or None.
        """
        attention = find_attention(module)
        seen: list[float] = []
        if isinstance(attention, Attention):
            recorder = AttentionRecorder(
                attention,
                module,
                metric="logits",
                value_columns=False,
                value_rows=False,
                observer=lambda probabilities: seen.append(attention_density(probabilities)),
            )
            device = next(module.parameters()).device
            with recorder.recording():
                for sample, hidden in enumerate(before):
                    forward(sample, hidden.to(device))
        if seen:
            self.densities.append(fmean(seen))
        if image_masks is None:
            return
        masks = image_masks[: len(before)]
        self.image_share = sum(int(mask.sum()) for mask in masks) / sum(map(len, masks))
        images = [hidden[0, mask.to(hidden.device)] for hidden, mask in zip(before, masks, strict=True)]
        alike = [redundancy(rows) for rows in images if len(rows) > 1]
        if alike:
            self.redundancies.append(fmean(alike))

    def to_json(self) -> dict[str, Any]:
        """What was measured, block by block, and the verdict."""
        return {
            "attention_density": self.densities,
            "image_redundancy": self.redundancies,
            "image_share": self.image_share,
            "holds": not self.problems(),
        }

    def problems(self) -> list[str]:
        """What the paper's condition lacks here; empty where it holds."""
        found = []
        if self.image_share < MIN_IMAGE_SHARE:
            found.append(f"image tokens are {self.image_share:.0%} of all, the paper's figures begin at 54%")
        if not self.densities:
            found.append("the attention of its blocks could not be recomputed, so its sparsity is unknown")
        elif fmean(self.densities) > MAX_DENSITY:
            found.append(f"attention is not sparse ({fmean(self.densities):.0%} of it is not negligible)")
        if self.redundancies and fmean(self.redundancies) < MIN_REDUNDANCY:
            found.append(f"image tokens are not redundant (mean cosine {fmean(self.redundancies):.2f})")
        return found

    def describe(self) -> str:
        """One line for the log."""
        measured = f"image tokens {self.image_share:.0%}"
        if self.densities:
            measured += f", attention density {fmean(self.densities):.0%}"
        if self.redundancies:
            measured += f", image tokens' mean cosine {fmean(self.redundancies):.2f}"
        problems = self.problems()
        verdict = "holds" if not problems else f"does not hold: {'; '.join(problems)}; compare with keep_ratio=1"
        return f"casp: {measured}; the condition for low-rank queries and keys {verdict}"
