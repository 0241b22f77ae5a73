"""The measurement of kernels: everything but the clock without a GPU, and small cells with one."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import RequestError
from quantkit.evaluation.gpu_timing import percentiles
from quantkit.evaluation.kernel_peers import PEERS, PeerWeight, dense_weight, unavailable
from quantkit.evaluation.kernel_speed import FORMATS, _summary, bench_kernels, n_multiplied, relative_error
from quantkit.evaluation.random_weights import random_spec, random_tensors
from quantkit.evaluation.speed_plot import plot_kernels
from quantkit.formats import storage
from quantkit.formats.grouped_int import GroupedInt
from quantkit.kernels.storage import kernel_of

NAMES = [*FORMATS, "int5", "int4-zeros", "slim-3", "littlebit-0.1", "casp-2"]


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_are_weights_of_their_format(name):
    spec = random_spec(name, 512, 2048)
    tensors = random_tensors(spec)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()} == spec.tensor_layout()
    storage.check(spec, tensors)
    weight, kernel = storage.unpack(spec, tensors), kernel_of(spec)
    assert weight.spec() == spec
    planar = kernel.to_planar(spec, tensors)
    dense = weight.dequantize()
    assert 0.1 < float(dense.std()) * 2048**0.5 < 3  # a layer keeps the size of its activations, roughly
    product = PeerWeight(
        lambda x, *held: kernel.matmul(x, spec, dict(zip(planar, held, strict=True)), None), [*planar.values()], dense
    )
    assert relative_error(product, torch.randn(2, 2048, generator=torch.Generator().manual_seed(0))) < 1e-5


@pytest.mark.parametrize(
    ("name", "bpw"), [("int2", 2 + 16 / 128), ("int4-zeros", 4 + 20 / 128), ("littlebit-0.55", 0.55), ("ptq161", 1.6)]
)
def test_bits_per_weight(name, bpw):
    assert random_spec(name, 14336, 4096).bpw == pytest.approx(bpw, rel=0.02)


def test_other_random_numbers_with_another_seed():
    spec = random_spec("casp-4", 1024, 1024)
    first, again, other = (random_tensors(spec, seed=seed) for seed in (1, 1, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", ["int9", "int", "slim-4", "ptq16", "littlebit-0", "casp-3", "gptq", "littlebit-9"])
def test_unknown_formats(name):
    with pytest.raises(RequestError, match=f"unknown format '{name}'; known: int1 to int8"):
        random_spec(name, 1024, 1024)


def test_shapes_that_no_format_has():
    with pytest.raises(RequestError, match="shape 1024x1000: rows must be a multiple of 8, columns of 1024"):
        random_spec("int4", 1024, 1000)
    with pytest.raises(RequestError, match="shape 256x1024 is too small for casp-2"):
        random_spec("casp-2", 256, 1024)


def test_a_wrong_product_is_seen():
    dense = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))  # two slices of rows
    right = dense_weight(dense)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert relative_error(PeerWeight(lambda x, w: x @ w.t(), [dense], dense), x) < 1e-6
    assert 1e-4 < relative_error(right, x.bfloat16()) < 0.02
    dense = dense.clone()
    dense[4500] += 30
    assert relative_error(PeerWeight(right.product, right.tensors, dense), x.bfloat16()) > 0.02


def test_percentiles_are_of_the_sorted_times():
    assert percentiles([5.0, 1.0, 3.0, 2.0, 4.0]) == {"microseconds": 3.0, "p10": 1.0, "p90": 5.0}
    assert percentiles([float(n) for n in range(101)]) == {"microseconds": 50.0, "p10": 10.0, "p90": 90.0}


def cell(ours: float, peers: dict[str, float], tokens: int = 1) -> dict:
    spec = random_spec("int4", 1024, 1024)
    results = [{"name": name, "microseconds": time} for name, time in {"quantkit": ours, **peers}.items()]
    limits = {"copy_tb_s": 4.0, "bf16_tflop_s": 800.0}
    return _summary("int4", spec, tokens, results, {"humming": "broken"}, limits)


def test_a_cell_says_who_is_best_and_how_far_the_floor_is():
    found = cell(2.0, {"cublas": 8.0, "tinygemm": 1.0})
    assert found["best_peer"] == "tinygemm"
    assert found["ratio_to_best_peer"] == 2.0
    assert found["ratios"] == {"cublas": 0.25, "tinygemm": 2.0}
    moved = 1024 * 1024 * 4.125 / 8 + 2 * 2048
    assert found["floor_us"] == pytest.approx(moved / 4e6)
    assert found["fraction_of_floor"] == pytest.approx(moved / 4e6 / 2)
    assert found["failed"] == {"humming": "broken"}
    assert cell(2.0, {"cublas": 8.0}, 4096)["floor_us"] == pytest.approx(2 * 4096 * 1024 * 1024 / 800e6)


def test_factors_count_their_own_multiplications():
    assert n_multiplied(random_spec("int4", 1024, 2048)) == 1024 * 2048
    spec = random_spec("littlebit-1", 1024, 2048)
    assert n_multiplied(spec) == spec.total_rank * (1024 + 2048)
    spec = random_spec("casp-4", 1024, 2048)
    assert n_multiplied(spec) == spec.rank * (1024 + 2048)


def test_requests_are_refused_before_the_device_is_asked_for():
    with pytest.raises(RequestError, match="unknown peer 'gemlight'; did you mean 'gemlite'"):
        bench_kernels(peers=["gemlight"])
    with pytest.raises(RequestError, match="unknown format 'int0'"):
        bench_kernels(formats=["int0"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device():
    with pytest.raises(RequestError, match="bench kernels needs a CUDA device"):
        bench_kernels()


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "speed.png"
    plot_kernels({"cells": [cell(2.0, {"cublas": 8.0}), cell(3.0, {"cublas": 8.0, "tinygemm": 1.0})]}, file)
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_small_cells():
    seen = []
    report = bench_kernels(
        [(1024, 2048)], ["int4", "ptq161"], [1, 17], ["tinygemm"], replays=3, progress=seen.append
    )  # fmt: skip
    assert report["cells"] == seen
    assert [(each["format"], each["tokens"]) for each in seen] == [(f, m) for f in ("int4", "ptq161") for m in (1, 17)]
    assert [each["name"] for each in seen[0]["results"]] == ["quantkit", "cublas", "tinygemm"]
    assert [each["name"] for each in seen[2]["results"]] == ["quantkit", "cublas"]
    assert all(each["p10"] <= each["microseconds"] <= each["p90"] for each in seen[0]["results"])
    assert 0 < report["ceilings"]["t0_us"] < 100
    assert all(0.1 < report["ceilings"][name] < 20 for name in ("copy_tb_s", "read_tb_s"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", PEERS)
def test_peers_multiply_by_the_weight_they_were_given(name):
    peer = PEERS[name]
    reason = unavailable(peer)
    if reason is not None:
        pytest.skip(reason)
    for bits in peer.widths:
        spec = random_spec(f"int{bits}", 4096, 4096)
        weight = storage.unpack(spec, random_tensors(spec, "cuda"))
        assert isinstance(weight, GroupedInt)
        held = peer.convert(weight, False)
        for m in (1, 16):
            assert relative_error(held, torch.randn(m, 4096, device="cuda", dtype=peer.dtype)) < 0.02
