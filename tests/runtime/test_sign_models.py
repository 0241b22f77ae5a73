"""Folders of the sign formats: loaded, computing as their dequantized weights do, saved again byte for byte."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from packed_models import PackedFolders, pack_folder
from sign_weights import binarized, factorized, random_sign_factors, random_sign_salient
from tiny_models import tiny_model
from torch import Tensor

import quantkit
from quantkit.errors import FileError
from quantkit.formats.checkpoint import find_tensors, open_folder, read_tensor, write_tensors
from quantkit.formats.spec import QuantizedWeight
from quantkit.formats.storage import pack, unpack
from quantkit.runtime.packed_linear import PackedLinear

QUANTIZERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "sign_salient": partial(binarized, n_salient=16),
    "plain binarization": binarized,
    "sign_factors": partial(factorized, ranks=(16, 8)),
}


@pytest.fixture(scope="module", params=QUANTIZERS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedFolders:
    folder = tmp_path_factory.mktemp("signs")
    return pack_folder(tiny_model("llama", folder), folder, quantize=QUANTIZERS[request.param])


def test_logits_are_those_of_the_dequantized_weights(folders: PackedFolders) -> None:
    """Both compute in float32 from the same numbers; only the order of the sums differs."""
    packed, dense = quantkit.load(folders.packed), quantkit.load(folders.dense, dtype="float32")
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 14
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, expected = packed(input_ids=ids).logits, dense(input_ids=ids).logits
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_saved_again_byte_for_byte(folders: PackedFolders, tmp_path: Path) -> None:
    quantkit.load(folders.packed).save_pretrained(tmp_path / "again")
    before, after = find_tensors(folders.packed), find_tensors(tmp_path / "again")
    for module in open_folder(tmp_path / "again").modules.values():
        for name in module.spec.tensor_layout():
            key = f"{module.prefix}.{name}"
            assert torch.equal(read_tensor(before[key]).view(torch.uint8), read_tensor(after[key]).view(torch.uint8))


def test_damage_is_named_when_the_model_is_loaded(folders: PackedFolders, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(folders.packed, tmp_path / "damaged"))
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(damaged).items()}
    name = next(name for name in tensors if name.endswith("0.mlp.up_proj.row_scales"))
    tensors[name].view(-1)[3] = float("nan")
    write_tensors(damaged / "model.safetensors", tensors)
    with pytest.raises(FileError, match=r"model\.layers\.0\.mlp\.up_proj: row_scales holds NaN or Inf"):
        quantkit.load(damaged)


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (random_sign_factors(0, 24, 40, (8, 16)), "in_features=40, out_features=24, bias=True, ranks=8+16, bpw="),
        (
            random_sign_salient(0, 24, 24, salient_bits=(4, 4), salient_group=8),
            "bias=True, 24 columns: signs, 16 columns: groups=2x4b, group_size=8, bpw=",
        ),
    ],
    ids=["sign_factors", "sign_salient"],
)
def test_layer_moves_and_converts_without_touching_the_packed_tensors(weight: QuantizedWeight, text: str) -> None:
    layer = PackedLinear(weight.spec(), bias=True)
    stored = pack(weight)
    layer.load_state_dict({**stored, "weight": torch.empty(0), "bias": torch.ones(24)})
    assert text in repr(layer)
    layer.to(torch.bfloat16)
    layer.use_planar_form()
    back = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    back.load_state_dict(layer.state_dict())
    assert list(back.stored_tensors()) == list(stored)
    assert all(torch.equal(back.stored_tensors()[name], tensor) for name, tensor in stored.items())
    assert torch.equal(unpack(weight.spec(), back.stored_tensors()).dequantize(), weight.dequantize())
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert back(x).dtype == torch.bfloat16
