"""LUQ: decoder blocks whose output activations have low entropy tolerate ultra-low bits.

Paper      Bhatnagar, Xu, Tan, Ahuja, TMLR 2026, arXiv:2509.23729. Entropy: section 3; K = 100 clusters.
Scores     E = -sum_c p_c log p_c (in nats), p_c the share of the block's output tokens in cluster c of K-means.
Allocates  the low width from the lowest entropy on, until the average fits the budget; the high width to the others.
Needs      a sample of each block's output rows, of all modalities as they occur; position 0 left out by the caller.
Cost       n_clusters * n_tokens * hidden multiplications per step, and as many for the start.
Deviates   Rows are divided by their root mean square over the block, which changes no cluster and keeps squares in
           range. The budget is in true bytes. `histogram_entropy` is a cheaper stand-in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import NumericalError, RequestError

_N_BINS = 256
_N_SIGMAS = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KMeansConfig:
    n_clusters: int = 100  # K
    n_steps: int = 25  # of Lloyd's algorithm, fewer when nothing changes any more


def kmeans_entropy(rows: Tensor, generator: torch.Generator, config: KMeansConfig | None = None) -> float:
    """Entropy of the cluster sizes, in nats.

    Args:
        rows: float ``[n_tokens, hidden]``, a block's outputs.
        generator: on the CPU, so that every device sees the same draws.

    Raises:
        RequestError: no rows. NumericalError: NaN or Inf in them.
    """
    config = config or KMeansConfig()
    return label_entropy(kmeans_labels(rows, generator, config), config.n_clusters)


def kmeans_labels(rows: Tensor, generator: torch.Generator, config: KMeansConfig) -> Tensor:
    """Cluster of each row, int64 ``[n_tokens]``; `label_entropy` of a part of them is that modality's entropy."""
    X = _normalized(rows)
    centers = _spread_start(X, generator, config.n_clusters)
    labels = _nearest(X, centers)
    for _ in range(config.n_steps):
        members = torch.nn.functional.one_hot(labels, len(centers)).to(X)  # no index_add_: it varies on CUDA
        counts = members.sum(0).unsqueeze(1)
        centers = torch.where(counts > 0, members.t() @ X / counts.clamp_min(1), centers)
        moved = _nearest(X, centers)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def label_entropy(labels: Tensor, n_clusters: int) -> float:
    """-sum p log p over the clusters' shares of ``labels`` (int64 ``[n_tokens]``), in nats.

    >>> round(label_entropy(torch.tensor([0, 0, 1, 1]), 2), 4)
    0.6931
    """
    shares = torch.bincount(labels, minlength=n_clusters).double() / max(labels.numel(), 1)
    return float(torch.special.entr(shares).sum())


def histogram_entropy(rows: Tensor) -> float:
    """Mean over channels of the entropy of 256 bins over mean +- 4 standard deviations, in nats.

    Args:
        rows: float ``[n_tokens, hidden]``. What lies outside the bins counts into the outermost ones.

    Raises:
        RequestError: no rows. NumericalError: NaN or Inf in them.
    """
    X = _normalized(rows)
    centered = X - X.mean(0)
    sigma = X.std(0, correction=0)
    scaled = torch.where(sigma > 0, centered / sigma.clamp_min(torch.finfo(X.dtype).tiny), torch.zeros_like(X))
    bins = ((scaled + _N_SIGMAS) * (_N_BINS / (2 * _N_SIGMAS))).floor().clamp_(0, _N_BINS - 1).long()
    channels = torch.arange(X.shape[1], device=X.device) * _N_BINS
    counts = torch.bincount((bins + channels).flatten(), minlength=X.shape[1] * _N_BINS)
    shares = counts.reshape(-1, _N_BINS).double() / len(X)
    return float(torch.special.entr(shares).sum(1).mean())


def by_entropy(entropies: list[float]) -> list[int]:
    """Indices from the block that keeps the high width longest to the first one that gives it up.

    The lowest entropy gives up first, and the lower index among equals.

    >>> by_entropy([1.0, 3.0, 1.0])
    [1, 2, 0]
    """
    return sorted(range(len(entropies)), key=lambda index: entropies[index])[::-1]


def _normalized(rows: Tensor) -> Tensor:
    if not rows.numel():
        raise RequestError("luq: no calibration token reached the block; use more or longer --n-samples")
    if not torch.isfinite(rows).all():
        raise NumericalError("the activations hold NaN or Inf; use --dtype float32")
    X = rows.float()
    return X / X.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def _spread_start(X: Tensor, generator: torch.Generator, n_clusters: int) -> Tensor:
    """k-means++: each next centre is a row, drawn in proportion to its squared distance from the nearest centre.

    Distances are sums of squared differences, so that equal rows are at exactly 0: there are never more centres than
    distinct rows.
    """
    draws = torch.rand(n_clusters, generator=generator, dtype=torch.float64).tolist()
    centers = [X[min(int(draws[0] * len(X)), len(X) - 1)]]
    nearest = (X - centers[0]).square().sum(1).double()
    for draw in draws[1:]:
        total = nearest.cpu().cumsum(0)  # on CUDA the order of the sums could change from run to run
        if float(total[-1]) <= 0:
            break
        picked = int(torch.searchsorted(total, draw * total[-1], right=True).clamp_max(len(X) - 1))
        centers.append(X[picked])
        nearest = torch.minimum(nearest, (X - centers[-1]).square().sum(1).double())
    return torch.stack(centers)


def _nearest(X: Tensor, centers: Tensor) -> Tensor:
    """argmin of |x - c|^2 = |x|^2 - 2 x c + |c|^2; the first term is the same for all centres."""
    return (centers.square().sum(1) - 2 * X @ centers.t()).argmin(1)
