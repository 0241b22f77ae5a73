"""Rows of a packed table: exactly those of the dequantized weight, from the stored and the planar form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_weights import random_weight
from strategies import law
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.formats.grouped_int import pack
from quantkit.kernels.lookup import lookup
from quantkit.kernels.planar import is_planar, to_planar


@law
@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(1, 8),
    n_groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 3, 8, 16, 48]),
    out_features=st.integers(1, 70),
    symmetric=st.booleans(),
    shape=st.sampled_from([(), (0,), (5,), (2, 3)]),
)
def test_rows_are_those_of_the_dequantized_weight(
    seed: int, bits: int, n_groups: int, group_size: int, out_features: int, symmetric: bool, shape: tuple[int, ...]
) -> None:
    weight = random_weight(seed, out_features, group_size, (bits,) * n_groups, symmetric)
    spec, tensors = weight.spec(), pack(weight)
    ids = torch.randint(out_features, shape, generator=torch.Generator().manual_seed(seed))
    expected = weight.dequantize()[ids]
    forms = [tensors, to_planar(spec, tensors)] if is_planar(spec) else [tensors]
    for form in forms:
        got = lookup(ids, spec, form, torch.float32)
        assert tuple(got.shape) == (*shape, spec.in_features)
        assert torch.equal(got, expected)
        assert torch.equal(lookup(ids, spec, form, torch.bfloat16), expected.to(torch.bfloat16))


def test_every_row_once() -> None:
    """Zeros of all rows are one bit stream: each row's start anywhere in a byte."""
    weight = random_weight(0, 37, 16, (3, 3, 3))
    ids = torch.arange(37)
    assert torch.equal(lookup(ids, weight.spec(), pack(weight), torch.float32), weight.dequantize())


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("planar", [False, True])
def test_other_rows_are_not_decoded(planar: bool) -> None:
    """Nothing that is computed for two of 4096 rows is larger than a few rows; views of the table do not count."""
    weight = random_weight(0, 4096, 32, (8,) * 4)
    spec, tensors = weight.spec(), pack(weight)
    tensors = to_planar(spec, tensors) if planar else tensors
    with LargestTensor() as largest:
        largest.known = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        lookup(torch.tensor([7, 4095]), spec, tensors, torch.float32)
    assert 2 * 128 <= largest.numel <= 2 * 4 * 128 + 2048
