"""Products with the sign formats on the CPU: against float64, without a decoded matrix, with bad input refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_weights import activations, rounding
from sign_weights import SIGN_FACTORS, SIGN_SALIENT, random_sign_factors, random_sign_salient
from strategies import law
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.errors import RequestError
from quantkit.formats import storage
from quantkit.formats.sign_factors import SignFactors, SignFactorsSpec
from quantkit.formats.sign_salient import SignSalient
from quantkit.kernels import sign_factors, sign_salient
from quantkit.kernels.column_sums import by_columns
from quantkit.kernels.storage import kernel_of

Weight = SignSalient | SignFactors
UNIT = 2.0**-24


def magnitude(x: Tensor, weight: Weight) -> tuple[Tensor, int]:
    """Sum of the absolute terms of each output ``[m, out]`` in float64, and how many float32 operations make it.

    A sum of n terms errs by at most n * u * sum |term|; a chain of two sums by the sum of both lengths. Codes and
    zeros, and both halves of a sign (2 c - 1), count as terms of their own, hence the factor 3.
    """
    x = x.double().abs()
    if isinstance(weight, SignFactors):
        total = torch.zeros(len(x), len(weight.u_signs), dtype=torch.float64)
        latents = weight.latent_scales.double().abs().split(weight.ranks)
        for path, latent in enumerate(latents):
            z = (x @ weight.column_scales[path].double().abs())[:, None] * latent
            total += z.sum(1, keepdim=True) * weight.row_scales[path].double().abs()
        return 9 * total, 2 * (x.shape[1] + sum(weight.ranks)) + 16
    spec = weight.spec()
    binary = x if weight.salient_mask is None else x[:, ~weight.salient_mask]
    if weight.column_scales is not None:
        binary = binary * weight.column_scales.double().abs()
    rows = 3 * weight.row_scales.double().abs()
    if weight.row_means is not None:
        rows = rows + weight.row_means.double().abs()
    total = binary.sum(1, keepdim=True) * rows
    if weight.salient is not None and weight.salient_mask is not None:
        part = weight.salient
        scales, zeros = (t.double().repeat_interleave(part.group_size, 1) for t in (part.scales, part.zeros))
        total = total + x[:, weight.salient_mask] @ (scales * (part.codes.double() + zeros.abs())).t()
    return total, 3 * spec.in_features + 16


def check_product(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    """With the stored tensors, and as a CPU holds them."""
    spec, tensors = weight.spec(), storage.pack(weight)
    kernel = kernel_of(spec)
    expected = x.double() @ weight.dequantize().double().t()
    terms, n_terms = magnitude(x, weight)
    if bias is not None:
        expected, terms = expected + bias.double(), terms + bias.double().abs()
    bound = n_terms * UNIT * terms + n_terms * UNIT * rounding(terms, x.dtype) + rounding(expected, x.dtype) + 1e-40
    held = tensors | {name: by_columns(tensors[name]) for name in kernel.by_columns(spec)}
    for each in (tensors, held):
        got = kernel.matmul(x, spec, each, bias)
        assert (got.dtype, tuple(got.shape)) == (x.dtype, (len(x), spec.out_features))
        assert bool(((got.double() - expected).abs() <= bound).all())


@law
@given(
    st.one_of(SIGN_SALIENT, SIGN_FACTORS),
    st.integers(0, 4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_product_is_that_of_the_dequantized_weight(weight: Weight, m: int, dtype: torch.dtype, bias: bool) -> None:
    x = activations(5, m, weight.spec().in_features, dtype=dtype).clamp(-60, 60)
    check_product(x, weight, torch.linspace(-1, 1, weight.spec().out_features) if bias else None)


@law
@given(st.one_of(SIGN_SALIENT, SIGN_FACTORS))
def test_planar_form_is_another_form_of_the_same_bytes(weight: Weight) -> None:
    """What a GPU holds, on the CPU: exact back and forth, and the same product by the twin."""
    spec, tensors = weight.spec(), storage.pack(weight)
    kernel = kernel_of(spec)
    planar = kernel.to_planar(spec, tensors)
    again = kernel.from_planar(spec, planar)
    assert list(again) == list(tensors)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert (set(planar) != set(tensors)) == kernel.is_planar(spec)
    x = activations(6, 2, spec.in_features)
    assert torch.equal(kernel.matmul(x, spec, planar, None), kernel.matmul(x, spec, tensors, None))


@pytest.mark.parametrize(
    "weight",
    [
        random_sign_factors(0, 300, 260, (40, 33)),
        random_sign_salient(0, 300, 221, row_means=True, column_scales=True, salient_bits=(4, 4, 4), salient_group=13),
    ],
    ids=lambda weight: type(weight).__name__,
)
@pytest.mark.parametrize("m", [1, 70])
def test_several_tiles_and_leading_dimensions(weight: Weight, m: int) -> None:
    x = activations(1, m, 260)
    check_product(x, weight, None)
    spec, tensors = weight.spec(), storage.pack(weight)
    matmul = kernel_of(spec).matmul
    nested = matmul(x.view(1, m, 1, 260), spec, tensors, None)
    assert torch.equal(nested, matmul(x, spec, tensors, None).view(1, m, 1, 300))


class LargestTensor(TorchDispatchMode):
    """The most elements that any intermediate result has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize(
    "weight",
    [
        random_sign_factors(0, 3000, 2000, (1024, 1024)),
        random_sign_salient(0, 3000, 1800, column_scales=True, salient_bits=(4,), salient_group=200),
    ],
    ids=lambda weight: type(weight).__name__,
)
def test_neither_weight_nor_factor_is_decoded_as_a_whole(weight: Weight) -> None:
    """6 million weights; a tile has at most 4 MiB of float32, which is a million."""
    spec, tensors = weight.spec(), storage.pack(weight)
    x = activations(2, 1, spec.in_features)
    with LargestTensor() as largest:
        kernel_of(spec).matmul(x, spec, tensors, None)
    assert 0 < largest.numel <= 1 << 20


@pytest.mark.parametrize("weight", [random_sign_factors(0, 4, 6, (2,)), random_sign_salient(0, 4, 6)])
def test_bad_activations_are_refused(weight: Weight) -> None:
    spec, tensors = weight.spec(), storage.pack(weight)
    matmul = kernel_of(spec).matmul
    with pytest.raises(RequestError, match=f"{spec.format}: x has 5 columns, the weight has 6"):
        matmul(torch.zeros(2, 5), spec, tensors, None)
    with pytest.raises(RequestError, match=rf"{spec.format}: x is torch.float64; use float32, bfloat16 or float16"):
        matmul(torch.zeros(2, 6, dtype=torch.float64), spec, tensors, None)


COMPILED = [
    random_sign_factors(0, 40, 48, (16, 8)),
    random_sign_factors(0, 40, 48, (16,)),
    random_sign_salient(0, 40, 32, row_means=True, salient_bits=(4,), salient_group=16),
    random_sign_salient(0, 40, 32, column_scales=True),
]


@pytest.mark.parametrize("weight", COMPILED, ids=lambda weight: weight.spec().describe())
@pytest.mark.parametrize("planar", [False, True])
def test_torch_compile_sees_one_graph(weight: Weight, planar: bool) -> None:
    """Fake tensors suffice: no value decides a shape."""
    spec, tensors = weight.spec(), storage.pack(weight)
    if planar:
        tensors = kernel_of(spec).to_planar(spec, tensors)
        assert kernel_of(spec).is_planar(spec)
    matmul = kernel_of(spec).matmul
    torch._dynamo.reset()  # it counts compilations of one line of code, whatever the weight
    compiled = torch.compile(lambda x: matmul(x * 2, spec, tensors, None).relu(), backend="aot_eager", fullgraph=True)
    for rows in (2, 3):
        x = activations(3, rows, spec.in_features)
        assert torch.equal(compiled(x), matmul(x * 2, spec, tensors, None).relu())


@pytest.mark.parametrize("weight", COMPILED, ids=lambda weight: weight.spec().describe())
def test_operators_pass_torchs_own_checks(weight: Weight) -> None:
    spec = weight.spec()
    planar = kernel_of(spec).to_planar(spec, storage.pack(weight))
    x, bias = activations(0, 3, spec.in_features), torch.ones(spec.out_features)
    names = (sign_factors if isinstance(spec, SignFactorsSpec) else sign_salient).PLANAR_TENSORS
    assert set(planar) <= set(names)  # nothing is left behind
    held = [planar.get(name) for name in names]
    if isinstance(spec, SignFactorsSpec):
        operator, shape = torch.ops.quantkit.sign_factors_planar_matmul, (list(spec.ranks),)
    else:
        operator = torch.ops.quantkit.sign_salient_planar_matmul
        shape = (spec.row_means, spec.column_scales, *sign_salient._salient_numbers(spec))
    torch.library.opcheck(operator, (x, bias, *held, spec.out_features, spec.in_features, *shape))
