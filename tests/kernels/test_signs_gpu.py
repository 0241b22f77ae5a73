"""The sign formats on a GPU at realistic shapes: correctness, determinism, CUDA graphs, bytes that come back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from packed_weights import activations
from sign_weights import binarized, factorized, random_sign_factors, random_sign_salient
from torch import Tensor

from quantkit.formats.sign_factors import SignFactors
from quantkit.formats.sign_salient import SignSalient
from quantkit.formats.storage import pack
from quantkit.kernels.storage import kernel_of
from quantkit.runtime.packed_linear import PackedLinear
from quantkit.runtime.stacking import stack_linears

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HALF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-11}  # float32 may use TF32
TENSOR_CORE = 2.0**-22


@pytest.fixture(autouse=True)
def nan_in_new_tensors() -> Iterator[None]:
    """torch.empty returns NaN, so an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def weight_of(kind: str, out_features: int, in_features: int) -> SignSalient | SignFactors:
    """With scales of one size, as solvers give: the errors of operands then add like a random walk."""
    generator = torch.Generator().manual_seed(out_features)
    weight = torch.randn(out_features, in_features, generator=generator)
    if kind == "sign_factors":
        return factorized(weight, (40, 33))
    if kind == "one path":
        return factorized(weight, (64,))
    if kind == "plain":
        return binarized(weight)
    return binarized(weight, n_salient=in_features // 5 // 32 * 32, group_size=32)


KINDS = ["sign_factors", "one path", "plain", "sign_salient"]


def on_gpu(weight: SignSalient | SignFactors) -> dict[str, Tensor]:
    stored = {name: tensor.cuda() for name, tensor in pack(weight).items()}
    return kernel_of(weight.spec()).to_planar(weight.spec(), stored)


def check(y: Tensor, x: Tensor, weight: SignSalient | SignFactors) -> None:
    """Scaled x, latents, decoded factors and y are rounded to the dtype: each changes the norm by at most its unit."""
    expected = x.double() @ weight.dequantize().double().cuda().t()
    assert y.dtype == x.dtype
    error, size = (y.double() - expected).norm(dim=1), expected.norm(dim=1)
    assert bool((error <= 4 * HALF[x.dtype] * size + 1e-6).all()), float((error / size).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("out_features", "in_features"), [(1000, 1111), (512, 2304)])
def test_every_number_of_tokens(kind: str, out_features: int, in_features: int) -> None:
    weight = weight_of(kind, out_features, in_features)
    spec, tensors = weight.spec(), on_gpu(weight)
    for dtype in HALF:
        for m in (1, 8, 16, 33, 64, 65):
            x = torch.randn(m, in_features, generator=torch.Generator().manual_seed(m)).to(dtype).cuda()
            check(kernel_of(spec).matmul(x, spec, tensors, None), x, weight)
    assert not any(tensor.any() for name, tensor in tensors.items() if name.endswith("counters"))


@pytest.mark.parametrize("kind", KINDS)
def test_bias_graph_and_the_same_bits_again(kind: str) -> None:
    weight = weight_of(kind, 768, 768)
    spec, tensors = weight.spec(), on_gpu(weight)
    matmul, bias = kernel_of(spec).matmul, torch.linspace(-1, 1, 768, device="cuda")
    for m in (1, 16, 100):
        x = activations(0, m, 768, dtype=torch.bfloat16).cuda()
        first = matmul(x, spec, tensors, bias)
        assert bool((first - matmul(x, spec, tensors, None)).abs().max() <= 1.1 + first.abs().max() * 2**-7)
        for _ in range(20):
            assert torch.equal(matmul(x, spec, tensors, bias), first)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = matmul(x, spec, tensors, bias)
        x.copy_(activations(1, m, 768, dtype=torch.bfloat16))
        graph.replay()
        assert torch.equal(y, matmul(x, spec, tensors, bias))


@pytest.mark.parametrize(
    "weight",
    [
        random_sign_factors(0, 300, 260, (40, 33)),
        random_sign_salient(0, 300, 260, row_means=True, column_scales=True, salient_bits=(4, 4), salient_group=32),
    ],
    ids=["sign_factors", "sign_salient"],
)
def test_layer_moves_there_and_back(weight: SignSalient | SignFactors) -> None:
    layer = PackedLinear(weight.spec(), bias=True)
    stored = pack(weight)
    layer.load_state_dict({**stored, "weight": torch.empty(0), "bias": torch.zeros(300)})
    layer.cuda().to(torch.bfloat16)
    assert layer.is_planar
    state = layer.state_dict()
    assert all(torch.equal(state[name].cpu(), tensor) for name, tensor in stored.items())
    layer.cpu()
    assert not layer.is_planar
    assert all(torch.equal(layer.stored_tensors()[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "in_features"), [((160, 96, 64), 1111), ((320, 352), 2304), ((64,), 768)])
def test_siblings_times_one_row(rows: tuple[int, ...], in_features: int, kind: str, dtype: torch.dtype) -> None:
    """Stacked as in a decoding step: every sibling makes something else of the same x."""
    weights = [weight_of(kind, n, in_features) for n in rows]
    linears = torch.nn.ModuleDict()
    for number, weight in enumerate(weights):
        linear = PackedLinear(weight.spec())
        linear.load_state_dict({**pack(weight), "weight": torch.empty(0)})
        linears[str(number)] = linear.cuda().to(dtype)
    x = torch.randn(1, in_features, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    y = stack_linears(linears, tuple(linears))(x)
    first = 0
    for weight in weights:
        last = first + weight.spec().out_features
        check(y[:, first:last], x, weight)
        first = last
