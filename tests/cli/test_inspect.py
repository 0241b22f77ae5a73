"""`quantkit inspect`: bytes that add up to the files', errors as reported, damage by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from cli_runs import Inputs, quantkit
from packed_models import pack_folder

from quantkit.cli.inspect import _natural
from quantkit.formats.safetensors_io import read_header


def test_json_adds_up_to_the_file(inputs: Inputs, packed: Path) -> None:
    done = quantkit("inspect", packed, "--json")
    described = done.json
    assert (done.exit_code, done.stderr) == (0, "")
    tensors = read_header(packed / "model.safetensors")
    assert described["size_bytes"] == sum(ref.n_bytes for ref in tensors.values())
    embedding = 4 * 288 * 64
    assert described["bytes"]["embeddings"] == described["bytes"]["head"] == embedding
    assert described["bytes"]["norms"] == 4 * 5 * 64
    assert described["bytes"]["other"] == 0
    assert described["bytes"]["quantized"] == sum(module["bytes"] for module in described["modules"])
    assert described["bpw"] == 4 + (16 + 4) / 32
    module = described["modules"][0]
    assert (module["name"], module["shape"]) == ("model.layers.0.mlp.down_proj", [64, 128])
    assert (module["format"], module["segments"], module["group_size"]) == ("grouped_int", [[4, 4]], 32)
    reported = {
        row["name"]: row["relative_error"] for row in json.loads((packed / "report.json").read_text())["modules"]
    }
    assert {module["name"]: module["relative_error"] for module in described["modules"]} == reported
    assert described["calibration"]["source"] == "calib"
    assert "verified" not in described


def test_widths_of_every_format(inputs: Inputs, tmp_path: Path) -> None:
    expected = {
        "low_rank": (
            ["--method", "casp", "--bits", "2.5", "--set", "keep_ratio=0.75", "--set", "factor_all=true"],
            "rank ",
        ),
        "sign_salient": (["--method", "ptq161", "--group-size", "0"], "1 + 2 in "),
        "sign_factors": (
            ["--method", "littlebit", "--bits", "1", "--group-size", "0", "--set", "refine=none"],
            "rank ",
        ),
    }
    for name, (arguments, shown) in expected.items():
        sizes = ["--calib", inputs.text, "--n-samples", "2", "--seq-len", "32"]
        group = [] if "--group-size" in arguments else ["--group-size", "32"]
        assert quantkit("quantize", inputs.model, *arguments, *group, *sizes, "-o", tmp_path / name).exit_code == 0
        lines = quantkit("inspect", tmp_path / name).stdout.splitlines()
        assert any(shown in line for line in lines if f" {name} " in line), name


def test_the_table(packed: Path) -> None:
    shown = quantkit("inspect", packed, "--verify")
    assert shown.exit_code == 0
    rows = [line.split() for line in shown.stdout.splitlines() if line.startswith("model.layers.")]
    assert len(rows) == 14
    assert rows[0][:8] == ["model.layers.0.mlp.down_proj", "grouped_int", "64", "x", "128", "4", "32", "4,736"]
    assert "checksums        all files match" in shown.stdout
    assert quantkit("inspect", packed, "--verify", "--json").json["verified"] is True


def test_mixed_widths_in_a_folder_without_report_and_recipe(inputs: Inputs, tmp_path: Path) -> None:
    folder = pack_folder(inputs.model, tmp_path, bits=(2, 2, 4, 5), group_size=16).packed
    shown = quantkit("inspect", folder)
    assert shown.exit_code == 0
    rows = [line for line in shown.stdout.splitlines() if line.startswith("model.layers.1.self_attn.o_proj")]
    assert "  2 (2 groups) + 4 (1 group) + 5 (1 group)  " in rows[0]
    assert "method           unknown" in shown.stdout
    assert "calibration      none" in shown.stdout
    described = quantkit("inspect", folder, "--json").json
    assert described["method"] is None
    assert {module["relative_error"] for module in described["modules"]} == {None}


def test_layers_are_in_running_order() -> None:
    """JSON sorts layer 10 before layer 2; readers do not."""
    names = ["model.layers.2.b", "model.layers.10.a", "model.layers.2.a"]
    assert sorted(names, key=_natural) == ["model.layers.2.a", "model.layers.2.b", "model.layers.10.a"]


def test_refusals(inputs: Inputs, packed: Path, tmp_path: Path) -> None:
    truncated = shutil.copytree(packed, tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    edited = shutil.copytree(packed, tmp_path / "edited")
    (edited / "recipe.json").write_text("{}")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path / "nowhere",), f"no folder {tmp_path / 'nowhere'}"),
        ((inputs.text.parent,), "config.json: no such file"),
        ((inputs.model,), "not a quantkit folder"),
        ((truncated,), "model.safetensors"),
        ((edited, "--verify"), "recipe.json: SHA-256 differs from checksums.json"),
    ]
    for arguments, message in cases:
        for flags in ((), ("--json",)):
            done = quantkit("inspect", *arguments, *flags)
            assert done.exit_code == 1
            assert message in done.error
    assert quantkit("inspect", edited).exit_code == 0
