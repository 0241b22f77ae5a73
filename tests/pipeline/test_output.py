"""The final folder: what is in it, what is not, and what it was made from."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from quantized_models import quantized_weights, sha256_of, small_run
from tiny_models import tiny_model

import quantkit
from quantkit.calib.datasets import fingerprint, load_calibration
from quantkit.formats.checkpoint import find_tensors, open_folder, read_tensor, verify_checksums
from quantkit.formats.files import read_json
from quantkit.formats.grouped_int import pack
from quantkit.runtime.loading import load_tokenizer


@pytest.fixture(scope="module")
def source(models: Path) -> Path:
    """A folder with companions of every kind, and some files that are no part of a model."""
    folder = tiny_model("llama", models)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# The original\n")
    for name in ("LICENSE", "chat_template.jinja", "merges.txt", "modeling_own.py", "report.json", "notes.pdf"):
        (folder / name).write_text(f"{name} of the original\n")
    (folder / "original").mkdir()
    (folder / "original" / "weights.txt").write_text("not copied\n")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def output(source: Path, text: Path, models: Path) -> Path:
    return small_run(source, models / "out", text).output


def test_files(source: Path, output: Path) -> None:
    ours = {"README.md", "config.json", "model.safetensors", "recipe.json", "report.json", "checksums.json"}
    copied = {"LICENSE", "chat_template.jinja", "merges.txt", "generation_config.json"}
    copied |= {"tokenizer.json", "tokenizer_config.json"}
    assert {str(path.relative_to(output)) for path in output.rglob("*")} == ours | copied
    originals, found = sha256_of(source), sha256_of(output)
    assert {name for name in found if found[name] == originals.get(name)} == copied
    verify_checksums(output)
    assert set(read_json(output / "checksums.json")) == set(found) - {"checksums.json"}


def test_own_code_is_copied_only_when_it_is_trusted(source: Path, text: Path, tmp_path: Path) -> None:
    trusting = small_run(source, tmp_path / "out", text, "rtn", trust_remote_code=True).output
    assert (trusting / "modeling_own.py").exists()


def test_config(source: Path, output: Path, text: Path) -> None:
    config = read_json(output / "config.json")
    quantization = config.pop("quantization_config")
    assert config == read_json(source / "config.json")
    modules = quantization.pop("modules")
    calibration = load_calibration(str(text), load_tokenizer(source), n_samples=4, seq_len=32)
    assert quantization == {
        "quant_method": "quantkit",
        "format_version": 1,
        "quantkit_version": quantkit.__version__,
        "bpw": pytest.approx(3 + 19 / 32),
        "recipe": read_json(output / "recipe.json"),
        "calibration": {
            "source": "calibration",
            "n_samples": 4,
            "seq_len": 32,
            "n_documents": 1,
            "fingerprint": fingerprint(calibration.input_ids),
            "protocol": calibration.protocol,
        },
        "versions": {"torch": version("torch"), "transformers": version("transformers")},
    }
    assert len(modules) == 14
    assert modules["model.layers.1.mlp.down_proj"] == {
        "prefix": "model.layers.1.mlp.down_proj",
        "spec": {
            "format": "grouped_int",
            "out_features": 64,
            "in_features": 128,
            "group_size": 32,
            "segments": [[3, 4]],
            "symmetric": False,
        },
    }


def test_no_calibration_no_claim(source: Path, text: Path, tmp_path: Path) -> None:
    output = small_run(source, tmp_path / "out", text, "rtn").output
    assert read_json(output / "config.json")["quantization_config"]["calibration"] is None


def test_tensors(source: Path, output: Path) -> None:
    """Everything that is not packed is there byte for byte; a packed weight is its codes and the tripwire."""
    before, after = find_tensors(source), find_tensors(output)
    packed = {f"{module.prefix}.weight" for module in open_folder(output).modules.values()}
    for name in set(before) - packed:
        assert torch.equal(read_tensor(before[name]), read_tensor(after[name])), name
    for name in packed:
        assert after[name].shape == (0,)
    kept = {name for name in after if name in before and name not in packed}
    assert kept == set(before) - packed
    for name, weight in quantized_weights(output).items():
        for key, tensor in pack(weight).items():
            assert torch.equal(read_tensor(after[f"{name}.{key}"]), tensor)


def test_report(output: Path) -> None:
    report = read_json(output / "report.json")
    assert report["bpw"] == pytest.approx(3 + 19 / 32)
    assert len(report["modules"]) == 14
    for row in report["modules"]:
        assert set(row) == {"name", "format", "bpw", "bytes", "relative_error", "damping"}
        assert 0 < row["relative_error"] < 1
        assert row["damping"] == 0.01
    assert sum(row["bytes"] for row in report["modules"]) == sum(
        module.spec.n_bytes for module in open_folder(output).modules.values()
    )


def test_model_card(source: Path, output: Path) -> None:
    card = (output / "README.md").read_text()
    header = card.split("---")[1]
    assert "license: mit" in header
    assert "base_model_relation: quantized" in header
    assert "# llama-0, gptq, 3 bits" in card
    assert "3.594 stored bits per weight" in card
    assert "group_size=32" in card


def test_a_model_without_a_card_has_no_licence(text: Path, tmp_path: Path) -> None:
    output = small_run(tiny_model("llama", tmp_path), tmp_path / "out", text, "rtn").output
    assert "license" not in (output / "README.md").read_text()


def test_no_times_and_no_paths(output: Path, models: Path) -> None:
    for path in output.iterdir():
        content = path.read_bytes()
        assert str(models).encode() not in content, path
        assert not re.search(rb"20\d\d-\d\d-\d\d", content), path


def test_an_empty_output_folder_is_used(source: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    verify_checksums(small_run(source, tmp_path / "out", text, "rtn").output)


def test_the_output_may_be_named_relative_to_the_current_folder(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small_run(source, Path("out"), text, "rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    verify_checksums(tmp_path / "out")
