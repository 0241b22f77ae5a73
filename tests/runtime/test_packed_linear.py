"""PackedLinear against float64, its state dict, and moves that must never touch a packed tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from packed_models import round_to_nearest
from torch import Tensor

from quantkit.formats.grouped_int import GroupedInt, pack
from quantkit.kernels.column_sums import is_by_columns
from quantkit.runtime.packed_embedding import PackedEmbedding
from quantkit.runtime.packed_linear import PackedLinear

EPSILON = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # unit roundoff


def random_layer(
    bits: tuple[int, ...] = (4, 2, 3, 1), out_features: int = 48, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[PackedLinear, GroupedInt]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, 32 * len(bits), generator=generator)
    rounded = round_to_nearest(weight, bits)
    layer = PackedLinear(rounded.spec(), bias=bias, dtype=dtype)
    state = pack(rounded) | {"weight": torch.empty(0, dtype=torch.float16)}
    if bias:
        state["bias"] = torch.randn(out_features, generator=generator).to(dtype)
    layer.load_state_dict(state)
    return layer, rounded


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [(4, 4, 4, 4), (4, 2, 3, 1), (8, 5, 7, 6)])
def test_output_is_that_of_the_dequantized_weight(bits: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    """Float32 sums of n terms err by at most n * 2**-24 of the sum of absolute terms; the output rounds once more.

    The zeros are summed apart from the codes, so the absolute terms are scales * (codes + |zeros|) * |x|.
    """
    layer, rounded = random_layer(bits, bias=bias, dtype=dtype)
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ rounded.dequantize().double().t()
    scales, zeros = (t.double().repeat_interleave(32, dim=1) for t in (rounded.scales, rounded.zeros))
    terms = x.double().abs() @ (scales * (rounded.codes.double() + zeros.abs())).t()
    if layer.bias is not None:
        expected = expected + layer.bias.double()
        terms = terms + layer.bias.double().abs()
    got = layer(x)
    assert got.dtype == dtype
    assert got.shape == (2, 5, layer.out_features)
    bound = 2 * (layer.in_features + 2) * EPSILON[torch.float32] * terms + EPSILON[dtype] * expected.abs() * 1.01
    assert bool(((got.double() - expected).abs() <= bound).all())


def test_buffers_are_the_layout_and_the_tripwire() -> None:
    layer, rounded = random_layer(dtype=torch.bfloat16)
    layout = rounded.spec().tensor_layout()
    assert [name for name, _ in layer.named_buffers()] == [*layout, "weight"]
    assert {name: (t.dtype, tuple(t.shape)) for name, t in layer.stored_tensors().items()} == layout
    assert (layer.weight.dtype, layer.weight.numel()) == (torch.bfloat16, 0)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert layer.bias is not None
    assert not layer.bias.requires_grad
    assert (layer.in_features, layer.out_features) == (128, 48)


def test_state_dict_holds_the_file_tensors() -> None:
    layer, rounded = random_layer(dtype=torch.bfloat16)
    state = layer.state_dict()
    assert set(state) == {*pack(rounded), "weight", "bias"}
    assert (state["weight"].dtype, tuple(state["weight"].shape)) == (torch.float16, (0,))
    assert all(torch.equal(state[name], tensor) for name, tensor in pack(rounded).items())
    expert = PackedLinear(rounded.spec(), tripwire=False)
    assert set(expert.state_dict()) == set(pack(rounded))
    assert expert.weight.dtype == torch.float32


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_converting_the_model_spares_the_packed_tensors(dtype: torch.dtype) -> None:
    layer, rounded = random_layer()
    layer.to(dtype)
    assert same_tensors(layer.stored_tensors(), pack(rounded))
    assert layer.bias is not None
    assert (layer.bias.dtype, layer.weight.dtype) == (dtype, dtype)
    layer.to(torch.float32)
    assert same_tensors(layer.stored_tensors(), pack(rounded))


@pytest.mark.parametrize("bits", [(4, 2, 3, 1), (8, 5, 7, 6), (2, 2, 2, 2)])
def test_planar_form_is_held_instead_and_saved_as_the_stored_bytes(bits: tuple[int, ...]) -> None:
    """What a CUDA device holds, checked on the CPU: the form differs, the state dict does not."""
    layer, rounded = random_layer(bits)
    before = layer.state_dict()
    layer.use_planar_form()
    assert layer.is_planar
    assert "planar" in dict(layer.named_buffers())
    assert not {name for name, _ in layer.named_buffers()} & {f"codes_{b}b" for b in bits}
    assert same_tensors(dict(layer.state_dict()), dict(before))
    assert same_tensors(layer.stored_tensors(), pack(rounded))
    layer.load_state_dict(before)
    assert not layer.is_planar
    layer.use_planar_form()
    layer.to(torch.bfloat16)  # moves and conversions go through the stored form; on the CPU it stays
    assert not layer.is_planar
    assert same_tensors(layer.stored_tensors(), pack(rounded))
    assert [name for name, _ in layer.named_buffers() if name != "weight"] == list(rounded.spec().tensor_layout())


def test_a_cpu_holds_codes_column_after_column() -> None:
    """Shapes and values are the stored ones; what leaves the module is laid out as in the file."""
    layer, rounded = random_layer((4, 2, 3, 1))
    names = [f"codes_{bits}b" for bits in (1, 2, 3, 4)]
    layer.load_state_dict(layer.state_dict())
    for module in (layer, copy.deepcopy(layer), layer.to(torch.bfloat16)):
        assert all(is_by_columns(module.get_buffer(name)) for name in names)
        assert same_tensors(module.packed_tensors(), pack(rounded))
        for tensors in (module.stored_tensors(), module.state_dict()):
            assert all(tensor.is_contiguous() for tensor in tensors.values())
    layer.use_planar_form()
    assert same_tensors(layer.stored_tensors(), pack(rounded))
    table = PackedEmbedding(rounded.spec())
    table.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if name != "bias"})
    assert not any(is_by_columns(table.get_buffer(name)) for name in names)


def test_group_size_without_a_planar_form_keeps_the_stored_tensors() -> None:
    rounded = round_to_nearest(torch.randn(8, 24, generator=torch.Generator().manual_seed(0)), (4, 4, 4))
    layer = PackedLinear(rounded.spec())
    layer.load_state_dict({**pack(rounded), "weight": torch.empty(0)})
    layer.use_planar_form()
    assert not layer.is_planar
    assert same_tensors(layer.packed_tensors(), pack(rounded))


def test_meta_to_empty_and_copies() -> None:
    layer, rounded = random_layer()
    on_meta = copy.deepcopy(layer).to("meta")
    assert all(tensor.is_meta for tensor in (*on_meta.buffers(), *on_meta.parameters()))
    back = on_meta.to_empty(device="cpu")
    back.load_state_dict(layer.state_dict())
    assert same_tensors(back.stored_tensors(), pack(rounded))
    with torch.device("meta"):
        built = PackedLinear(rounded.spec(), bias=True)
    assert all(tensor.is_meta for tensor in (*built.buffers(), *built.parameters()))


def test_wrong_state_dict_is_refused() -> None:
    layer, _ = random_layer()
    state = layer.state_dict()
    state["scales"] = state["scales"][:, :2]
    del state["codes_4b"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*codes_4b.*size mismatch for scales"):
        layer.load_state_dict(state)


def test_repr_tells_shape_and_storage() -> None:
    layer, rounded = random_layer(bits=(2, 2, 4, 2), bias=False)
    assert (
        f"in_features=128, out_features=48, bias=False, groups=3x2b, 1x4b, group_size=32, bpw={rounded.spec().bpw:.3f}"
        in repr(layer)
    )
