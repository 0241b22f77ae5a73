"""The lm-eval adapter on tasks of our own: no network, scores checked against the model's own probabilities."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import build, tiny_tokenizer
from tiny_vision import build_vision, picture_folder, tiny_processor

from quantkit.calib.pictures import encode
from quantkit.errors import FileError, RequestError
from quantkit.evaluation import evaluate, evaluate_tasks
from quantkit.evaluation.tasks import _require_known

# lm-eval and what it imports warn about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

QUESTIONS = [
    {"question": f"question {number}", "choices": ["yes", "no", "maybe"], "answer": number % 3} for number in range(8)
]


@pytest.fixture
def tasks_path(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
    }
    choice = {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    rolling = {
        "task": "tiny_bytes",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in (choice, rolling):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))
    return folder


def log_likelihood(model: torch.nn.Module, context: str, continuation: str) -> float:
    tokenizer = tiny_tokenizer()
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([before + after])
    with torch.no_grad():
        scores = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)[0, len(before) - 1 :]
    return float(scores.gather(-1, torch.tensor(after)[:, None]).sum())


def test_scores_are_those_of_the_model(tasks_path: Path) -> None:
    model = build("llama")
    correct = 0
    for question in QUESTIONS[:6]:
        likelihoods = [log_likelihood(model, question["question"], " " + choice) for choice in question["choices"]]
        correct += likelihoods.index(max(likelihoods)) == question["answer"]
    scores = evaluate_tasks(model, tiny_tokenizer(), ["tiny_choice", "tiny_bytes"], 6, tasks_path)
    assert set(scores) == {"tiny_choice", "tiny_bytes"}
    assert scores["tiny_choice"] == {"acc": correct / 6}
    # A random model spreads over 288 tokens, one a byte, and is not far from that.
    assert 50 < scores["tiny_bytes"]["byte_perplexity"] < 5000


def test_tasks_are_part_of_the_report(tasks_path: Path) -> None:
    report = evaluate(
        build("llama"), data=(), tasks=["tiny_choice"], tasks_path=tasks_path, limit=2, tokenizer=tiny_tokenizer()
    )
    record = report.to_json()
    assert list(record) == ["model", "perplexity", "tasks", "seconds"]
    assert set(record["tasks"]["tiny_choice"]) == {"acc"}


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    with pytest.raises(RequestError, match=r"^limit is 0; it must be at least 1"):
        evaluate_tasks(model, tokenizer, ["a"], 0)
    with pytest.raises(RequestError, match=r"^batch_size is -1; it must be at least 1"):
        evaluate_tasks(model, tokenizer, ["a"], batch_size=-1)
    with pytest.raises(FileError, match=r"nowhere: no such folder; include_path must hold lm-eval task files"):
        evaluate_tasks(model, tokenizer, ["a"], include_path=tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RequestError, match=r'^tasks need the package lm-eval; pip install "quantkit\[eval\]"'):
        evaluate_tasks(model, tokenizer, ["a"])


def test_an_unknown_task_suggests_the_nearest() -> None:
    # The check itself: to build the list that it reads, lm-eval indexes its folder for ten seconds.
    known = ["tiny_choice", "tiny_bytes"]
    _require_known(["tiny_bytes"], known)
    with pytest.raises(RequestError, match=r"^unknown task 'tiny_choise'; did you mean 'tiny_choice'\? or pass its"):
        _require_known(["tiny_choise"], known)
    with pytest.raises(RequestError, match=r"^unknown task 'x'; see `lm-eval ls tasks`, or pass its folder"):
        _require_known(["x"], known)


def test_data_that_cannot_be_read(tasks_path: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(FileError, match=r"^tasks tiny_bytes: their data cannot be read \(.*\); connect once"):
        evaluate_tasks(build("llama"), tiny_tokenizer(), ["tiny_bytes"], include_path=tasks_path)


def test_tasks_with_pictures(tmp_path: Path) -> None:
    """lm-eval's multimodal adapter on our model and processor: the greedy continuation is the model's own."""
    pytest.importorskip("lm_eval")
    model, processor, pictures = build_vision("llava"), tiny_processor("llava"), picture_folder(tmp_path)
    inputs = encode(processor, [pictures / "0.png"], ["<s><image>\nq0"])
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    said = processor.tokenizer.decode(tokens, skip_special_tokens=True)
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = [{"question": "q0", "picture": str(pictures / "0.png"), "answer": said}]
    data.append({"question": "q1", "picture": str(pictures / "1.png"), "answer": "nothing that it says"})
    (tmp_path / "seen.jsonl").write_text("".join(json.dumps(line) + "\n" for line in data))
    (folder / "pictures.py").write_text(
        "from PIL import Image\n\n\ndef shown(doc):\n    return [Image.open(doc['picture']).convert('RGB')]\n"
    )
    task = {
        "task": "tiny_pictures",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "seen.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "<s><image>\n{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["never seen"], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match"}],
    }
    written = yaml.safe_dump(task) + "doc_to_image: !function pictures.shown\n"
    (folder / "tiny_pictures.yaml").write_text(written)
    report = evaluate(
        model, data=(), tasks=["tiny_pictures"], tasks_path=folder, tokenizer=processor.tokenizer, processor=processor
    )
    assert report.tasks["tiny_pictures"]["exact_match"] == 0.5
