"""Questions about pictures: the same answers as one by one through transformers, and the distance by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import quantkit as run
from tiny_models import tiny_model
from tiny_vision import build_vision, picture_folder, picture_run, tiny_processor, tiny_vision_model, write_metadata

from quantkit.calib.pictures import Prompt, encode, for_forward
from quantkit.errors import FileError, RequestError
from quantkit.evaluation import evaluate
from quantkit.evaluation.vqa import evaluate_vqa, read_answered


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def source(models: Path) -> Path:
    return tiny_vision_model("llava", models)


def own_answers(model: Any, pictures: Path, n_tokens: int) -> list[str]:
    """Greedy, one question after the other, without our evaluation."""
    processor, prompt = tiny_processor("llava"), Prompt(tiny_processor("llava"))
    answers = []
    for item in read_answered(str(pictures)):
        inputs = encode(processor, [item.picture], [prompt.ask(item.text)])
        ids = inputs["input_ids"]
        for _ in range(n_tokens):
            step = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                token = model(**for_forward(model, step, torch.device("cpu"), torch.float32)).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
        new = ids[0, inputs["input_ids"].shape[1] :].tolist()
        new = new[: new.index(2)] if 2 in new else new
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def test_exact_match_counts_the_models_own_answers(tmp_path: Path) -> None:
    """Half of the answers are replaced by what the model says: those are right, also in padded batches."""
    model, pictures = build_vision("llava"), picture_folder(tmp_path, n_pictures=3)
    said = own_answers(model, pictures, 4)
    assert len(set(said)) > 1
    lines = []
    for index in range(3):
        answers = (("red", said[2 * index]), ("blue", "wrong"))
        pairs = [{"question": f"what is {word} in {index}?", "answer": answer} for word, answer in answers]
        lines.append({"file_name": f"{index}.png", "qa": pairs})
    write_metadata(pictures, lines)
    for batch_size in (1, 4):
        questions = read_answered(str(pictures))
        result = evaluate_vqa(
            model, tiny_processor("llava"), questions, name="p", max_new_tokens=4, batch_size=batch_size
        )
        assert (result.exact_match, result.n, result.kl_mean) == (0.5, 6, None)


def test_answers_that_are_too_long_are_counted(tmp_path: Path) -> None:
    """The tests' tokenizer makes one token of a byte, the space before an answer included."""
    model, pictures = build_vision("llava"), picture_folder(tmp_path, n_pictures=1)
    pairs = [{"question": "what?", "answer": answer} for answer in ("abc", "abcd", "abcdefg")]
    write_metadata(pictures, [{"file_name": "0.png", "qa": pairs}])
    said = []
    for limit in (8, 4):
        questions = read_answered(str(pictures))
        said.append(evaluate_vqa(model, tiny_processor("llava"), questions, name="p", max_new_tokens=limit).protocol)
    assert "longer" not in said[0]
    assert "at most 4 tokens (2 true answers are longer and count as wrong); prompt" in said[1]


def test_distance_by_hand(tmp_path: Path) -> None:
    """Mean over all answer tokens of sum p (log p - log q), each sample on its own."""
    ours, theirs = build_vision("llava"), build_vision("llava", seed=1)
    pictures, processor = picture_folder(tmp_path, n_pictures=2), tiny_processor("llava")
    questions, prompt = read_answered(str(pictures)), Prompt(processor)
    expected: list[torch.Tensor] = []
    for item in questions:
        asked = encode(processor, [item.picture], [prompt.ask(item.text)])["input_ids"].shape[1]
        inputs = encode(processor, [item.picture], [prompt.ask(item.text) + prompt.answer(item.answer or "")])
        with torch.no_grad():
            log_q, log_p = (
                model(**for_forward(model, inputs, torch.device("cpu"), torch.float32))
                .logits[0, asked - 1 : -1]
                .double()
                .log_softmax(-1)
                for model in (ours, theirs)
            )
        expected.append((log_p.exp() * (log_p - log_q)).sum(-1))
    options: dict[str, Any] = {"name": "p", "reference": theirs, "max_new_tokens": 1}
    for batch_size in (1, 3):
        result = evaluate_vqa(ours, processor, questions, batch_size=batch_size, **options)
        assert result.kl_mean == pytest.approx(float(torch.cat(expected).mean()), rel=1e-4)
    same = evaluate_vqa(ours, processor, questions, **{**options, "reference": ours})
    assert same.kl_mean == 0


def test_a_packed_folder_from_the_command_line(source: Path, tmp_path: Path) -> None:
    pictures = picture_folder(tmp_path)
    out = picture_run(source, tmp_path / "out", pictures, bits=4).output
    arguments = ["--vqa", str(pictures), "--limit", "3", "--reference", str(source), "--max-new-tokens", "2"]
    report = run("eval", out, *arguments, "--json").json
    assert report["perplexity"] == {}
    assert report["vqa"].keys() == {str(pictures)}
    entry = report["vqa"][str(pictures)]
    assert entry["n"] == 3
    assert 0 <= entry["exact_match"] <= 1
    assert entry["kl_mean"] > 0
    shown = run("eval", str(out), *arguments)
    assert "exact match of 3 greedy answers of at most 2 tokens (3 true answers are longer" in shown.stdout
    assert "wrong); prompt '<s><image>\\n{question}'" in shown.stdout


def test_refusals(source: Path, models: Path, tmp_path: Path) -> None:
    pictures = picture_folder(tmp_path)
    with pytest.raises(RequestError, match="this model takes no pictures, so vqa cannot be measured"):
        evaluate(tiny_model("llama", models), data=(), vqa=str(pictures))
    with pytest.raises(RequestError, match="a loaded model comes without its processor; pass processor="):
        evaluate(build_vision("llava"), data=(), vqa=str(pictures))
    with pytest.raises(RequestError, match="limit is 0; evaluate at least 1 question, or leave the limit out"):
        evaluate(source, data=(), vqa=str(pictures), limit=0)
    with pytest.raises(RequestError, match=r"template 'x' has no {question}"):
        evaluate(source, data=(), vqa=str(pictures), template="x")
    for setting in ("batch_size", "max_new_tokens"):
        with pytest.raises(RequestError, match=f"{setting} is 0; it must be at least 1"):
            evaluate_vqa(build_vision("llava"), tiny_processor("llava"), [], name="p", **{setting: 0})
    write_metadata(pictures, [{"file_name": "0.png", "text": "a caption"}])
    with pytest.raises(FileError, match=r"pictures: metadata\.jsonl holds no questions with answers"):
        evaluate(source, data=(), vqa=str(pictures))


def test_answers_with_a_quantized_cache(source: Path, tmp_path: Path) -> None:
    """A cache that quantizes nothing gives the stock cache's answers; one of 2 bits is smaller."""
    pictures = picture_folder(tmp_path, n_pictures=2)
    model, questions = build_vision("llava"), read_answered(str(pictures))
    said = own_answers(model, pictures, 6)
    lines = [
        {"file_name": f"{index}.png", "qa": [{"question": questions[2 * index].text, "answer": said[2 * index]}]}
        for index in range(2)
    ]
    write_metadata(pictures, lines)
    options: dict[str, Any] = {"name": "p", "max_new_tokens": 6, "batch_size": 2}
    asked = read_answered(str(pictures))
    results = {
        spec: evaluate_vqa(model, tiny_processor("llava"), asked, kv=spec, **options)
        for spec in ("fp16", "int2:window=4")
    }
    plain, small = results["fp16"], results["int2:window=4"]
    assert plain.exact_match == 1
    assert plain.to_json()["kv"] == "fp16"
    assert plain.kv_bytes_per_token is not None
    assert small.kv_bytes_per_token is not None
    # keys and values of two layers with two heads of 16 channels in float16: 256 bytes
    assert plain.kv_bytes_per_token >= 256
    assert "KV cache int2:window=4" in small.protocol
    report = json.loads(json.dumps(evaluate(source, data=(), vqa=str(pictures), kv="akvq-vl").to_json()))
    assert report["vqa"][str(pictures)]["kv"] == "akvq-vl"
