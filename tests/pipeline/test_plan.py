"""What is known before a weight is read: the bytes, the reasons for what is left alone, room on disk and in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import sha256_of, small_request
from tiny_models import FAMILIES, tiny_model

from quantkit.errors import FileError, QuantkitError, RequestError
from quantkit.formats.checkpoint import find_tensors
from quantkit.formats.safetensors_io import write_tensors
from quantkit.pipeline import Plan, dry_run, run
from quantkit.pipeline.journal import work_folder
from quantkit.pipeline.plan import Room, check_room, measure_room


@pytest.fixture(scope="module")
def llama(models: Path) -> Path:
    return tiny_model("llama", models)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {"bits": 8}),
        ("rtn", {"bits": 1, "group_size": 0}),
        ("gptq", {"bits": 3}),
        ("gptq", {"bits": 5, "group_size": 16, "settings": ["symmetric=true"]}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_planned_bytes_are_the_bytes(
    family: str, method: str, options: dict[str, Any], models: Path, text: Path, tmp_path: Path
) -> None:
    request = small_request(tiny_model(family, models), tmp_path / "out", text, method, **options)
    plan, result = dry_run(request), run(request)
    assert plan.output_bytes == result.size_bytes
    assert (
        plan.original_bytes
        == result.original_bytes
        == sum(ref.n_bytes for ref in find_tensors(Path(request.model)).values())
    )
    assert plan.bpw == result.bpw
    assert [name for name, _ in plan.modules] == [module.name for module in result.modules]
    assert sum(ref.n_bytes for ref in find_tensors(result.output).values()) == result.size_bytes


@pytest.mark.parametrize("bits", [2, 3, 7])
def test_mixed_widths_never_take_more_than_planned(bits: int, llama: Path, text: Path, tmp_path: Path) -> None:
    request = small_request(llama, tmp_path / "out", text, "slim", bits=bits, group_size=16)
    plan, result = dry_run(request), run(request)
    assert result.size_bytes <= plan.output_bytes
    assert result.bpw <= plan.bpw
    assert plan.output_bytes < 1.1 * result.size_bytes


def test_a_dry_run_reads_no_weight_and_writes_nothing(text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path)
    nothing = {name: torch.full(ref.shape, math.nan) for name, ref in find_tensors(source).items()}
    write_tensors(source / "model.safetensors", nothing)
    before = sha256_of(tmp_path)
    plan = dry_run(small_request(source, tmp_path / "deep" / "out", text))
    assert sha256_of(tmp_path) == before
    assert not (tmp_path / "deep").exists()
    said = plan.to_json()
    assert said["dry_run"] is True
    assert said["n_blocks"] == 2
    assert said["size_bytes"] == plan.quantized_bytes + plan.other_bytes
    assert said["modules"][0] == {
        "name": "model.layers.0.self_attn.q_proj",
        "shape": [64, 64],
        "bits": 3,
        "bpw": 3 + 19 / 32,
        "bytes": 64 * 64 * 3 // 8 + 64 * 2 * 2 + 64 * 2 * 3 // 8,
    }
    assert 0 < plan.seconds < 60


def test_reasons_for_what_is_left_alone(models: Path, text: Path, tmp_path: Path) -> None:
    plan = dry_run(small_request(tiny_model("qwen3_moe", models), tmp_path / "out", text))
    assert dict(plan.skipped) == {
        "model.layers.0.mlp.gate": "router: its few weights decide which experts run",
        "model.layers.1.mlp.gate": "router: its few weights decide which experts run",
        "model.embed_tokens.weight": "outside the decoder blocks",
        "lm_head.weight": "outside the decoder blocks",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_quantized_or_skipped_with_a_reason(
    family: str, models: Path, text: Path, tmp_path: Path
) -> None:
    source = tiny_model(family, models)
    plan = dry_run(small_request(source, tmp_path / "out", text))
    matrices = [name for name, ref in find_tensors(source).items() if len(ref.shape) > 1]
    assert len(plan.modules) + len(plan.skipped) == len(matrices)
    assert all(reason for _, reason in plan.skipped)


def test_group_size_that_divides_nothing(llama: Path, text: Path, tmp_path: Path) -> None:
    request = small_request(llama, tmp_path / "out", text, group_size=48)
    message = (
        "model.layers.0.self_attn.q_proj: in_features 64 is not a multiple of group_size 48 (remainder 16); "
        "use 16, 32, 64 or 0 (one group per row)"
    )
    for action in (dry_run, run):
        with pytest.raises(RequestError) as refused:
            action(request)
        assert str(refused.value) == message
    assert not work_folder(request.output).exists()


def test_dry_run_refuses_what_the_run_would_refuse(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere\.txt: no such file or folder, and no data set of that name"):
        dry_run(small_request(llama, tmp_path / "out", tmp_path / "nowhere.txt"))
    dry_run(small_request(llama, tmp_path / "out", tmp_path / "nowhere.txt", "rtn"))  # which reads no text
    with pytest.raises(RequestError, match="unknown device 'gpu'; use auto, cpu or cuda"):
        dry_run(small_request(llama, tmp_path / "out", text, device="gpu"))


def some_plan(**fields: Any) -> Plan:
    values: dict[str, Any] = {
        "modules": (),
        "skipped": (),
        "n_blocks": 1,
        "bpw": 4.0,
        "quantized_bytes": 60 << 20,
        "other_bytes": 40 << 20,
        "original_bytes": 300 << 20,
        "peak_memory_bytes": 700 << 20,
        "scratch_bytes": 60 << 20,
        "seconds": 1.0,
    }
    return Plan(**{**values, **fields})


def test_room_on_disk() -> None:
    """The final folder and the work folder's blocks are there at the same time."""
    need = 160 << 20
    check_room(some_plan(), Path("out"), Room(disk=need, memory=math.inf))
    with pytest.raises(FileError) as refused:
        check_room(some_plan(), Path("out"), Room(disk=need - 1, memory=math.inf))
    message = "not enough disk for out: 160 MiB needed, 159 MiB free; free some or choose another folder with -o"
    assert str(refused.value) == message


def test_room_in_memory() -> None:
    check_room(some_plan(), Path("out"), Room(disk=1 << 40, memory=700 << 20))
    with pytest.raises(QuantkitError) as refused:
        check_room(some_plan(), Path("out"), Room(disk=1 << 40, memory=(700 << 20) - 1))
    assert str(refused.value) == (
        "not enough memory: about 700 MiB needed, 699 MiB available; "
        "use --offload disk, fewer --n-samples or a shorter --seq-len"
    )


def test_measured_room_counts_what_an_unfinished_run_holds(tmp_path: Path) -> None:
    cpu, output = torch.device("cpu"), tmp_path / "deep" / "out"
    empty = measure_room(output, cpu)
    assert 0 < empty.memory < math.inf
    assert measure_room(output, torch.device("cuda")).memory == math.inf
    held = work_folder(output)
    held.mkdir(parents=True)
    with open(held / "block-00000.safetensors", "wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no disk
    assert measure_room(output, cpu).disk - empty.disk > 1 << 39  # others write to this disk meanwhile


def test_planned_memory_follows_what_is_asked(models: Path, text: Path, tmp_path: Path) -> None:
    llama = tiny_model("llama", models)

    def peak(method: str = "gptq", **options: Any) -> int:
        return dry_run(small_request(llama, tmp_path / "out", text, method, **options)).peak_memory_bytes

    usual = peak()
    states = 4 * 4 * 32 * 64  # float32, 4 samples of 32 tokens, hidden size 64
    assert peak(n_samples=8) == usual + states
    assert peak(n_samples=8, offload="disk") == peak(offload="disk") == usual - states
    assert peak("rtn") < usual
    streams = 4 * 2 * 3 * 4 * 32 * 64  # two blocks, each whole, with codes and with factors for queries and keys
    factors = {"bits": 2.5, "settings": ["keep_ratio=0.5"]}
    assert peak("casp", **factors) == peak("layerwise", bits=2.5) + streams
    assert peak(settings=["correction=0.5"]) > usual + states  # the float model's block and hidden states
    on_disk = dry_run(small_request(llama, tmp_path / "out", text, offload="disk"))
    assert on_disk.scratch_bytes == on_disk.quantized_bytes + states


def test_a_tensor_that_the_model_needs_is_missed_before_anything_is_read(text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path)
    tensors = {name: torch.zeros(ref.shape) for name, ref in find_tensors(source).items()}
    del tensors["model.layers.1.input_layernorm.weight"]
    write_tensors(source / "model.safetensors", tensors)
    with pytest.raises(
        FileError, match=r"no tensor for parameter model\.layers\.1\.input_layernorm\.weight; the check"
    ):
        dry_run(small_request(source, tmp_path / "out", text))
