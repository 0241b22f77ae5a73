"""Packed models on a CUDA device: the planar form computes the same, costs no second copy, and saves the same bytes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from packed_models import PackedFolders, pack_folder, round_to_nearest
from sign_weights import binarized, factorized
from tiny_models import tiny_model

from quantkit.formats.checkpoint import find_tensors, read_tensor
from quantkit.formats.grouped_int import pack
from quantkit.pipeline import quantize
from quantkit.runtime.loading import load
from quantkit.runtime.packed_linear import PackedLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-11}  # float32 may use TF32


def random_layer(bits: tuple[int, ...], out_features: int = 96, group_size: int = 32) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    rounded = round_to_nearest(torch.randn(out_features, group_size * len(bits), generator=generator), bits)
    layer = PackedLinear(rounded.spec(), bias=True)
    state = pack(rounded) | {"weight": torch.empty(0), "bias": torch.randn(out_features, generator=generator)}
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("n_tokens", [1, 7, 33, 200])
@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("bits", [(4, 4, 4, 4), (4, 2, 3, 1), (8, 5, 7, 6)])
def test_layer_moves_there_and_back(bits: tuple[int, ...], dtype: torch.dtype, n_tokens: int) -> None:
    layer = random_layer(bits).to(dtype)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(n_tokens, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = layer(x).float()
    layer.cuda()
    assert layer.is_planar
    assert not any(name.startswith("codes") for name, _ in layer.named_buffers())
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor.cpu(), before[name]), name
    got = layer(x.cuda()).float().cpu()
    # at most one rounding of each weight and of the output to the dtype: errors add like a random walk over the inputs
    bound = EPSILON[dtype] * (expected.abs() + 4 * x.float().norm(dim=1, keepdim=True) * 3)
    assert bool(((got - expected).abs() <= bound).all())
    layer.cpu()
    assert not layer.is_planar
    assert torch.equal(layer(x).float(), expected)


def test_one_copy_of_the_weight_is_held() -> None:
    layer = random_layer((4,) * 32, out_features=4096, group_size=128)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    layer.cuda()
    held = torch.cuda.memory_allocated() - before
    assert layer.spec.n_bytes <= held <= 1.03 * layer.spec.n_bytes + 4 * 4096


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's compiler on importing itself
def test_compiled_layer_is_one_graph() -> None:
    layer = random_layer((4, 2, 3, 4)).to(torch.bfloat16).cuda()
    x = torch.randn(3, layer.in_features, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3_moe", "gemma3"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedFolders:
    folder = tmp_path_factory.mktemp("models")
    return pack_folder(tiny_model(request.param, folder), folder, bits=(2, 4, 3, 1))


def logits(folder: Path, **options: object) -> torch.Tensor:
    model = load(folder, **options)  # type: ignore[arg-type]
    ids = torch.randint(4, 260, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids.to(model.device)).logits.float().cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_is_as_close_to_float32_as_the_dense_model(folders: PackedFolders, dtype: torch.dtype) -> None:
    """The same model in float32 on the CPU is the truth; packed and dense on the GPU err alike."""
    truth = logits(folders.dense)
    packed_error = (logits(folders.packed, device="cuda", dtype=dtype) - truth).abs().mean()
    dense_error = (logits(folders.dense, device="cuda", dtype=dtype) - truth).abs().mean()
    assert packed_error < 1.5 * dense_error


def test_saved_from_the_device_are_the_same_bytes(folders: PackedFolders, tmp_path: Path) -> None:
    model = load(folders.packed, device="cuda")
    assert all(module.is_planar for module in model.modules() if isinstance(module, PackedLinear))
    model.save_pretrained(tmp_path)
    before, after = find_tensors(folders.packed), find_tensors(tmp_path)
    assert set(before) == set(after)
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(read_tensor(before[name]), read_tensor(after[name])), name


def test_generate_and_move(folders: PackedFolders) -> None:
    model = load(folders.packed, device="auto", dtype="bfloat16")
    assert model.device.type == "cuda"
    ids = torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(0))
    on_device = model.generate(ids.cuda(), max_new_tokens=6, do_sample=False)
    assert on_device.shape[0] == 2
    model.cpu()
    assert model(ids).logits.device.type == "cpu"


def test_offload_to_the_cpu(tmp_path: Path) -> None:
    """Block 1 stays in host memory in the stored form and visits the device for each call."""
    folders = pack_folder(tiny_model("llama", tmp_path), tmp_path, bits=(4,))
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0}
    places |= {"model.rotary_emb": 0, "lm_head": 0}
    truth = logits(folders.dense)
    got = logits(folders.packed, device_map=places, dtype="float32")
    # float32 on the GPU rounds the weights to TF32 at worst: two blocks of it
    assert (got - truth).abs().max() < 0.05 * truth.std()


@pytest.mark.parametrize("tied", [True, False])
def test_packed_embedding_and_head(tied: bool, tmp_path: Path) -> None:
    """Rows are looked up in the planar table, which a tied head multiplies with too."""
    source = tiny_model("llama", tmp_path, tie_word_embeddings=tied)
    settings = ["embedding_bits=8", "head_bits=8"]
    output = quantize(source, tmp_path / "out", method="rtn", bits=8, group_size=32, settings=settings).output
    truth = logits(output)
    model = load(output, device="cuda")
    table = model.get_input_embeddings()
    assert table.is_planar
    ids = torch.arange(288)
    assert torch.equal(table(ids.cuda()).cpu(), load(output).get_input_embeddings()(ids))
    # float32 on the GPU rounds the weights to TF32 at worst: two blocks of it
    assert (logits(output, device="cuda") - truth).abs().max() < 0.05 * truth.std()
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["sign_salient", "sign_factors"])
def test_models_of_signs(kind: str, tmp_path: Path) -> None:
    quantizers = {
        "sign_salient": partial(binarized, n_salient=32, group_size=16),
        "sign_factors": partial(factorized, ranks=(24, 8)),
    }
    folders = pack_folder(tiny_model("llama", tmp_path), tmp_path, quantize=quantizers[kind])
    truth = logits(folders.dense)
    assert (logits(folders.packed, device="cuda", dtype="float32") - truth).abs().max() < 0.05 * truth.std()
    packed_error = (logits(folders.packed, device="cuda", dtype="bfloat16") - truth).abs().mean()
    dense_error = (logits(folders.dense, device="cuda", dtype="bfloat16") - truth).abs().mean()
    assert packed_error < 2 * dense_error  # two operands are rounded where the dense model rounds one
    model = load(folders.packed, device="cuda")
    assert all(module.is_planar for module in model.modules() if isinstance(module, PackedLinear))
    model.save_pretrained(tmp_path / "again")
    before, after = find_tensors(folders.packed), find_tensors(tmp_path / "again")
    assert all(torch.equal(read_tensor(before[name]), read_tensor(after[name])) for name in before)
