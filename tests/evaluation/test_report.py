"""`evaluate`: folders in, one report out; every refusal before a weight is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import pack_folder
from tiny_models import MAX_POSITION, build, tiny_model, tiny_tokenizer

from quantkit.calib.datasets import load_evaluation
from quantkit.errors import FileError, RequestError
from quantkit.evaluation import evaluate, evaluate_windows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and two texts."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_model("llama", folder, 0)
    tiny_model("llama", folder, 1)
    (folder / "one.txt").write_text("All work and no play makes a dull text. " * 30)
    (folder / "two.jsonl").write_text(json.dumps({"text": "another text, " * 30}) + "\n")
    return folder


def test_report_is_the_windows_of_each_text(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = evaluate(
        folder / "llama-0",
        data=[folder / "one.txt", str(folder / "two.jsonl")],
        seq_len=64,
        limit=4,
        reference=str(folder / "llama-1"),
        device="cpu",
        progress=lambda name, done, total: seen.append((name, done, total)),
    )
    assert list(report.perplexity) == ["one", "two"]
    for name, suffix in (("one", "txt"), ("two", "jsonl")):
        windows = load_evaluation(str(folder / f"{name}.{suffix}"), tiny_tokenizer(), 64, 4)
        expected = evaluate_windows(build("llama", 0), windows, reference=build("llama", 1))
        assert report.perplexity[name] == expected
    assert seen == [(name, done, 4) for name in ("one", "two") for done in (1, 2, 3, 4)]


def test_json_holds_what_the_command_line_promises(folder: Path) -> None:
    model, text = folder / "llama-0", folder / "one.txt"
    report = evaluate(str(model), data=str(text), seq_len=64, limit=2, device="cpu")
    record = json.loads(json.dumps(report.to_json()))
    assert list(record) == ["model", "perplexity", "seconds"]
    assert record["model"] == str(model)
    assert record["seconds"] > 0
    assert record["perplexity"] == {"one": {"ppl": report.perplexity["one"].ppl, "windows": 2, "seq_len": 64}}
    distance = evaluate(model, data=text, seq_len=64, limit=2, reference=model, device="cpu").to_json()
    assert set(distance["perplexity"]["one"]) == {"ppl", "windows", "seq_len", "kl_mean", "top1_agreement"}
    assert distance["perplexity"]["one"]["kl_mean"] == 0.0
    assert distance["perplexity"]["one"]["top1_agreement"] == 1.0


def test_windows_default_to_the_models_limit(folder: Path) -> None:
    report = evaluate(folder / "llama-0", data=folder / "one.txt", device="cpu")
    result = report.perplexity["one"]
    assert (result.seq_len, result.windows) == (MAX_POSITION, 1200 // MAX_POSITION)


def test_a_loaded_model_needs_its_tokenizer(folder: Path) -> None:
    model, text = build("llama", 0), str(folder / "one.txt")
    report = evaluate(model, data=text, seq_len=64, limit=2, tokenizer=tiny_tokenizer())
    from_folder = evaluate(folder / "llama-0", data=text, seq_len=64, limit=2, device="cpu")
    assert report.perplexity == from_folder.perplexity
    assert report.model == "LlamaForCausalLM"
    with pytest.raises(RequestError, match=r"^a loaded model comes without its tokenizer; pass tokenizer="):
        evaluate(model, data=text)


def test_activations_are_float32_on_a_cpu(folder: Path, tmp_path: Path) -> None:
    half = tiny_model("llama", tmp_path, 0, dtype=torch.bfloat16)
    text, settings = folder / "one.txt", {"seq_len": 64, "limit": 2, "device": "cpu"}
    widened = build("llama", 0).bfloat16().float()
    # Not through .bfloat16(): that rounds the rotary frequencies too, which a loaded model keeps in float32.
    widened.model.rotary_emb = build("llama", 0).model.rotary_emb
    expected = evaluate(widened, data=text, seq_len=64, limit=2, tokenizer=tiny_tokenizer()).perplexity
    assert evaluate(half, data=text, **settings).perplexity == expected
    assert evaluate(half, data=text, dtype="bfloat16", **settings).perplexity != expected


def test_a_packed_folder_is_its_dequantized_self(folder: Path, tmp_path: Path) -> None:
    folders = pack_folder(folder / "llama-0", tmp_path, bits=(2, 4))
    settings: dict[str, Any] = {"data": folder / "one.txt", "seq_len": 64, "device": "cpu"}
    result = evaluate(folders.packed, reference=folders.dense, **settings).perplexity["one"]
    # Both multiply the same float32 weights; only the order of the sums differs.
    assert result.kl_mean == pytest.approx(0.0, abs=1e-7)
    assert result.ppl == pytest.approx(evaluate(folders.dense, **settings).perplexity["one"].ppl, rel=1e-4)
    apart = evaluate(folders.packed, reference=folder / "llama-0", **settings).perplexity["one"]
    assert apart.kl_mean is not None
    assert apart.kl_mean > 0.001


@pytest.mark.shared
@pytest.mark.slow
def test_reference_results(shared: Path) -> None:
    texts = [shared / "data" / f"{name}.txt" for name in ("eval_docs", "wikitext2_test")]
    report = evaluate(shared / "models" / "llama-28m", data=texts, seq_len=1024, limit=32, device="cpu")
    assert {result.windows for result in report.perplexity.values()} == {32}
    # Measured with other tools on the same windows, activations in float32.
    assert report.perplexity["eval_docs"].ppl == pytest.approx(5.336, abs=0.002)
    assert report.perplexity["wikitext2_test"].ppl == pytest.approx(71.19, abs=0.02)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_requests_that_make_no_sense(folder: Path, tmp_path: Path) -> None:
    model, text = folder / "llama-0", str(folder / "one.txt")
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    other = tiny_model("llama", tmp_path, vocab_size=300)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": ()}, r"^nothing to evaluate; name a text \(data\), a folder of pictures \(vqa\) or a task"),
        ({"data": [text, tmp_path / "one.jsonl"]}, r"^two texts are called 'one' \(.*one\.txt and .*one\.jsonl\)"),
        ({"data": ["wikitxt2"]}, r"^wikitxt2: no such file or folder.*did you mean 'wikitext2'"),
        ({"data": text, "seq_len": 257}, r"^seq_len is 257, the model's limit is 256 tokens; use 256 or less"),
        ({"data": text, "seq_len": 1}, r"^seq_len is 1; a window needs at least 2 tokens"),
        ({"data": text, "limit": 0}, r"^limit is 0; evaluate at least 1 window"),
        ({"data": text, "reference": other}, r"^the reference has a vocabulary of 300 tokens, the model of 288; pass"),
        ({"data": text, "device": "cupid"}, r"device 'cupid'"),
    ]
    for settings, message in cases:
        with pytest.raises(RequestError, match=message):
            evaluate(model, **settings)


def test_models_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    text = folder / "one.txt"
    with pytest.raises(FileError, match=r"^no folder .*nowhere$"):
        evaluate(tmp_path / "nowhere", data=text)
    with pytest.raises(FileError, match=r"no config\.json; give the folder of a model$"):
        evaluate(tmp_path, data=text)
    (tmp_path / "config.json").write_text('{"model_type": "imaginary"}')
    with pytest.raises(FileError, match=r"config\.json cannot be used: .*imaginary"):
        evaluate(tmp_path, data=text)


def test_texts_are_read_before_weights(folder: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    (model / "model.safetensors").write_bytes(b"damaged")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(FileError, match=r"^empty\.txt: the file is empty"):
        evaluate(model, data=tmp_path / "empty.txt")
    with pytest.raises(FileError, match=r"model\.safetensors"):
        evaluate(model, data=folder / "one.txt")


def test_importing_the_room_imports_no_optional_package() -> None:
    heavy = ["transformers", "triton", "datasets", "pyarrow", "lm_eval"]
    code = f"import sys, quantkit.evaluation; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
