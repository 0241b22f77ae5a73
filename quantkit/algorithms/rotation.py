"""Hadamard rotation of the residual stream: a change of basis that spreads outliers, folded into the weights.

Papers     QuaRot, arXiv:2404.00456 (section 4.1); SpinQuant, arXiv:2405.16406 (R1 and, per value head, R2). The random
           signs: QuIP#, arXiv:2402.04396, lemma 3.1.
Idea       RMSNorm without its gain commutes with every orthogonal Q: norm(x Q) = norm(x) Q. So the stream x may be kept
           as x Q, if whatever writes to it multiplies by Q and whatever reads it multiplies by Q^T first:

               writes (embedding rows, o, down; their biases)      E' = E Q          W' = Q^T W     b' = b Q
               reads behind a norm of gain g (q, k, v, gate, up,   W' = W diag(g) Q                 gain' = 1
               router, head)

           The model computes what it did before, and nothing is added at run time.
Why        Q = diag(signs) H / sqrt(n) with a Hadamard matrix H makes every entry of x Q a signed mean of all entries of
           x. By Hoeffding, |(x Q)_j| <= rms(x) sqrt(2 log(2 n / delta)) for all j at once with probability 1 - delta
           over the signs; an outlier that was sqrt(n) times the rms before is gone, and grids become narrow.
Cost       O(n log n) per row: H is a Kronecker product of small factors, multiplied one after the other.
Deviates   Sizes that no Sylvester or Paley matrix reaches get a random orthogonal factor of the odd part, where the
           papers' code takes tables of known Hadamard matrices. No rotation runs at inference time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_FACTOR = 64  # of the power of two: 64 x 64 products are as fast as butterflies, and simpler


@dataclass(frozen=True, slots=True)
class Rotation:
    """Q = diag(signs) (F_1 x F_2 x ...), orthogonal ``[size, size]``, never formed.

    Attributes:
        signs: float64 ``[size]``, each 1 or -1.
        factors: float64 orthogonal matrices whose sizes multiply to ``size``.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        return len(self.signs)

    def apply(self, x: Tensor) -> Tensor:
        """x Q along the last axis.

        Args:
            x: floating point ``[..., size]``.

        Returns:
            The same shape, dtype and device.
        """
        out, inner = x * self.signs.to(x), self.size
        for factor in self.factors:
            F = factor.to(x)  # [f, f]
            inner //= len(F)
            out = F.T @ out.reshape(-1, len(F), inner) if inner > 1 else out.reshape(-1, len(F)) @ F
        return out.reshape(x.shape)


def hadamard_rotation(size: int, seed: int) -> Rotation:
    """The randomized Hadamard matrix of that size, the same for the same seed.

    Sylvester's for powers of two, else a Kronecker product with one of Paley's where there is one (as for every odd
    number up to 21 times 8, 16, ...), else with a random orthogonal matrix of the odd part.

    >>> [tuple(len(factor) for factor in hadamard_rotation(size, 0).factors) for size in (4096, 3584, 640, 93)]
    [(64, 64), (64, 2, 28), (32, 20), (93,)]
    """
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(0, 2, (size,), generator=generator).double() - 1
    odd = size // (size & -size)
    core = _core(size, odd)
    last = () if core is None and odd == 1 else (_random_orthogonal(odd, generator) if core is None else core,)
    rest = size // len(last[0]) if last else size
    factors = []
    while rest > 1:
        factors.append(_sylvester(min(rest, _LARGEST_FACTOR)))
        rest //= len(factors[-1])
    return Rotation(signs, (*factors, *last))


def rotate_heads(x: Tensor, head_dim: int, seed: int) -> Tensor:
    """Each head of the last axis, ``[..., heads * head_dim]``, times the same randomized Hadamard matrix.

    Attention mixes values with the same weights in all dimensions of a head; so where values are rotated so, and the
    output projection's columns too, the model computes what it did (SpinQuant's R2).
    """
    heads = x.reshape(*x.shape[:-1], -1, head_dim)
    return hadamard_rotation(head_dim, seed).apply(heads).reshape(x.shape)


def fold_input(weight: Tensor, gain: Tensor, rotation: Rotation) -> Tensor:
    """What reads the rotated stream behind a norm without gain as ``weight`` read it: W diag(g) Q.

    Args:
        weight: ``[out_features, size]``.
        gain: of the norm before it, ``[size]``.
    """
    return rotation.apply(weight * gain)


def fold_output(weight: Tensor, rotation: Rotation) -> Tensor:
    """What writes to the rotated stream as ``weight`` wrote to it: Q^T W of a weight ``[size, in_features]``, or b Q of
    a bias ``[size]``."""
    return rotation.apply(weight.T).T.contiguous() if weight.ndim == 2 else rotation.apply(weight)


def _core(size: int, odd: int) -> Tensor | None:
    """The smallest Paley matrix of ``odd`` times a power of two that divides ``size``, divided by its root."""
    order = odd
    while odd > 1 and size % order == 0:
        if order % 4 == 0:
            if (order - 1) % 4 == 3 and _is_prime(order - 1):
                return _paley_skew(order - 1) / math.sqrt(order)
            if (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
                return _paley_symmetric(order // 2 - 1) / math.sqrt(order)
        order *= 2
    return None


def _sylvester(size: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / math.sqrt(size)


def _paley_skew(q: int) -> Tensor:
    """Paley's first construction: +-1 ``[q + 1, q + 1]`` with orthogonal rows, q a prime of the form 4 k + 3."""
    return torch.eye(q + 1, dtype=torch.float64) + _bordered(q, -1.0)


def _paley_symmetric(q: int) -> Tensor:
    """Paley's second construction: +-1 ``[2 q + 2, 2 q + 2]`` with orthogonal rows, q a prime of the form 4 k + 1."""
    H = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    D = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(_bordered(q, 1.0), H) + torch.kron(torch.eye(q + 1, dtype=torch.float64), D)


def _bordered(q: int, corner: float) -> Tensor:
    """Legendre symbols of i - j, with a first row of ones and a first column of ``corner``; zero on the diagonal."""
    symbols = torch.full((q,), -1.0, dtype=torch.float64)
    symbols[torch.arange(1, q).square() % q] = 1.0
    symbols[0] = 0.0
    index = torch.arange(q)
    C = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    C[0, 1:], C[1:, 0] = 1.0, corner
    C[1:, 1:] = symbols[(index.unsqueeze(1) - index) % q]
    return C


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Haar distributed: QR of a Gaussian matrix, with the signs that make R's diagonal positive."""
    Q, R = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    signed: Tensor = Q * R.diagonal().sign()
    return signed


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
