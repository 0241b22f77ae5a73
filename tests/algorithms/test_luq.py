"""Entropy of planted clusters, its invariances, and the histogram against the differential entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantkit.algorithms.luq import (
    KMeansConfig,
    by_entropy,
    histogram_entropy,
    kmeans_entropy,
    kmeans_labels,
    label_entropy,
)
from quantkit.errors import NumericalError, RequestError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(n_clusters: int, n_tokens: int, noise: float = 0.0, hidden: int = 24) -> tuple[Tensor, Tensor]:
    """Rows around well separated points, and the point of each."""
    generator = seeded(7)
    points = 10 * torch.randn(n_clusters, hidden, generator=generator)
    members = torch.randint(n_clusters, (n_tokens,), generator=generator)
    return points[members] + noise * torch.randn(n_tokens, hidden, generator=generator), members


@pytest.mark.parametrize("n_clusters", [2, 10, 50])
def test_points_give_the_logarithm_of_their_number(n_clusters: int) -> None:
    """More clusters are looked for than there are points: the rest stays empty."""
    rows, _ = planted(n_clusters, 200 * n_clusters)
    assert kmeans_entropy(rows, seeded()) == pytest.approx(math.log(n_clusters), rel=0.02)


def test_noisy_clusters_are_found_exactly() -> None:
    rows, members = planted(6, 600, noise=0.1)
    config = KMeansConfig(n_clusters=6)
    labels = kmeans_labels(rows, seeded(), config)
    assert len({(int(label), int(member)) for label, member in zip(labels, members, strict=True)}) == 6
    assert kmeans_entropy(rows, seeded(), config) == pytest.approx(label_entropy(members, 6), abs=1e-12)


def test_constant_activations_have_no_entropy() -> None:
    rows = torch.linspace(-3, 3, 17).expand(50, 17)
    assert kmeans_entropy(rows, seeded()) == 0
    assert histogram_entropy(rows) == 0
    assert kmeans_entropy(torch.zeros(5, 4), seeded()) == 0
    assert histogram_entropy(torch.zeros(5, 4)) == 0


def test_a_single_token_has_no_entropy() -> None:
    assert kmeans_entropy(torch.randn(1, 8, generator=seeded()), seeded()) == 0


def test_rotation_and_scale_change_nothing() -> None:
    rows, _ = planted(6, 600, noise=0.1)
    config = KMeansConfig(n_clusters=6)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=seeded(3)))[0]
    entropy = kmeans_entropy(rows, seeded(), config)
    assert kmeans_entropy(rows @ rotation, seeded(), config) == pytest.approx(entropy, abs=1e-12)
    noise = torch.randn(400, 16, generator=seeded(4))
    for scale in (2.0**-40, 2.0**40):  # powers of two: the same bits
        assert kmeans_entropy(scale * noise, seeded()) == kmeans_entropy(noise, seeded())
        assert histogram_entropy(scale * noise) == histogram_entropy(noise)


def test_the_seed_decides() -> None:
    rows = torch.randn(500, 16, generator=seeded(5))
    config = KMeansConfig(n_clusters=20)
    assert torch.equal(kmeans_labels(rows, seeded(1), config), kmeans_labels(rows, seeded(1), config))
    assert not torch.equal(kmeans_labels(rows, seeded(1), config), kmeans_labels(rows, seeded(2), config))


def test_lloyd_ends_where_every_row_is_with_its_nearest_mean() -> None:
    rows = torch.randn(300, 6, generator=seeded(6))
    config = KMeansConfig(n_clusters=12, n_steps=1000)
    labels = kmeans_labels(rows, seeded(), config)
    means = torch.stack([rows[labels == label].mean(0) for label in range(12)])
    distances = torch.cdist(rows.double(), means.double())
    own = distances.gather(1, labels.unsqueeze(1)).squeeze(1)
    assert (own <= distances.min(1).values + 1e-5).all()


def test_each_modality_has_an_entropy_of_its_own() -> None:
    rows, members = planted(8, 800)
    is_image = members < 2
    labels = kmeans_labels(rows, seeded(), KMeansConfig())
    assert label_entropy(labels[is_image], 100) == pytest.approx(label_entropy(members[is_image], 8), abs=1e-12)
    assert label_entropy(labels[~is_image], 100) == pytest.approx(label_entropy(members[~is_image], 8), abs=1e-12)


def test_histogram_of_a_gaussian() -> None:
    """The differential entropy of a unit normal minus the logarithm of the bin width, and the bias of n samples."""
    n_tokens = 100_000
    rows = torch.randn(n_tokens, 2, generator=seeded()) * torch.tensor([0.01, 3.0]) + torch.tensor([5.0, -1.0])
    expected = 0.5 * math.log(2 * math.pi * math.e) - math.log(8 / 256) - 255 / (2 * n_tokens)
    assert histogram_entropy(rows) == pytest.approx(expected, abs=0.005)


def test_the_lowest_entropy_gives_up_its_bits_first_and_the_lower_index_among_equals() -> None:
    assert by_entropy([3.0, 1.0, 2.0]) == [0, 2, 1]
    assert by_entropy([1.0, 1.0, 1.0]) == [2, 1, 0]


def test_rows_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RequestError, match="no calibration token reached the block"):
        kmeans_entropy(torch.empty(0, 4), seeded())
    with pytest.raises(NumericalError, match="activations hold NaN or Inf"):
        histogram_entropy(torch.tensor([[1.0, float("inf")]]))
