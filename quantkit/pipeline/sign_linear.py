"""A linear during distillation: the teacher's float weight and the student's trainable factors, in one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.algorithms.littlebit import Factors, latent_start, signs, smooth_sign


class SignLinear(nn.Module):
    """Computes with the float weight or with the factors, as `teaching` says.

    Parameters are float32 whatever the model computes in: updates of 1e-4 would vanish in bfloat16.

        left [out, R], right [R, in]   latents; their signs compute
        rows [paths, out], latent_scales [R], columns [paths, in]

    Args:
        linear: the float linear; its parameters stay as they are, and frozen.
        factors: where training starts.
        generator: on the CPU; of the latents' magnitudes.
    """

    def __init__(self, linear: nn.Linear, factors: Factors, generator: torch.Generator) -> None:
        super().__init__()
        self.teaching = False
        self.weight, self.bias = linear.weight, linear.bias
        self.left = nn.Parameter(latent_start(factors.left, generator))
        self.right = nn.Parameter(latent_start(factors.right, generator))
        self.rows, self.columns = nn.Parameter(factors.rows.clone()), nn.Parameter(factors.columns.clone())
        self.latent_scales = nn.Parameter(factors.latents.clone())

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if self.teaching:
            return F.linear(x, self.weight, self.bias)
        n_paths = len(self.rows)
        S, T = (smooth_sign(latent).to(x.dtype) for latent in (self.left, self.right))
        h, latents, g = (scale.to(x.dtype) for scale in (self.rows, self.latent_scales, self.columns))
        y: Tensor | None = None
        for path in zip(h, S.chunk(n_paths, 1), latents.chunk(n_paths), T.chunk(n_paths), g, strict=True):
            rows, left, middle, right, columns = path
            part = F.linear(F.linear(x * columns, right) * middle, left) * rows
            y = part if y is None else y + part
        assert y is not None
        return y if self.bias is None else y + self.bias

    def trained(self) -> dict[str, nn.Parameter]:
        """What training changes, by name."""
        names = ("left", "right", "rows", "latent_scales", "columns")
        return {name: self.get_parameter(name) for name in names}

    @torch.no_grad()
    def factors(self) -> Factors:
        """As they are now."""
        return Factors(
            left=signs(self.left),
            right=signs(self.right),
            rows=self.rows.clone(),
            latents=self.latent_scales.clone(),
            columns=self.columns.clone(),
        )
