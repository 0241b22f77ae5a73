"""Folders of pictures with questions: what is read, how it is put to a model, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vision import IMAGE_ID, build_vision, picture_folder, tiny_processor, write_metadata

from quantkit.calib.pictures import Prompt, encode, for_forward, holds_pictures, load_pictures, read_questions
from quantkit.calib.statistics import StatisticsRecorder
from quantkit.errors import FileError, RequestError
from quantkit.models.modality import image_tokens, vision_linears


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return picture_folder(tmp_path)


def load(folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"n_samples": 4, "max_tokens": 256, **options}
    return load_pictures(str(folder), tiny_processor("llava"), build_vision("llava").config, **settings)


def test_samples_take_turns_over_the_pictures(folder: Path) -> None:
    assert holds_pictures(str(folder))
    calibration = load(folder, n_samples=6)
    asked = [(picture.name, text) for picture, text in calibration.samples]
    assert [name for name, _ in asked] == ["0.png", "1.png", "2.png", "3.png", "0.png", "1.png"]
    assert asked[4][1] == "<s><image>\nwhat is blue in 0? blue 0</s>"
    assert "6 samples of 4 pictures, in turns over the pictures; prompt '<s><image>\\n{question}'" in (
        calibration.protocol
    )


def test_masks_fit_the_inputs(folder: Path) -> None:
    calibration = load(folder)
    for inputs, mask in zip(calibration.inputs(), calibration.image_masks, strict=True):
        assert torch.equal(inputs["input_ids"][0] == IMAGE_ID, mask)
        assert int(mask.sum()) == 4
    assert calibration.longest == 30
    assert calibration.to_json()["text_tokens"] == 4 * 26


def test_the_fingerprint_sees_pictures_texts_and_order(folder: Path) -> None:
    variants: list[dict[str, Any]] = [{}, {"n_samples": 5}, {"template": "{image}{question}"}]
    prints = [load(folder, **options).fingerprint for options in variants]
    shuffled = [load(folder, shuffle=True, seed=seed) for seed in (0, 0, 1)]
    assert shuffled[0].fingerprint == shuffled[1].fingerprint
    prints += [shuffled[0].fingerprint, shuffled[2].fingerprint]
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes())
    prints.append(load(folder).fingerprint)
    assert len(set(prints)) == len(prints)


def test_token_types_of_the_processor_win() -> None:
    inputs = {"input_ids": torch.tensor([[5, 5, 5]]), "mm_token_type_ids": torch.tensor([[0, 1, 2]])}
    assert image_tokens(inputs, build_vision("llava").config).tolist() == [[False, True, True]]


def test_forward_gets_what_it_knows(folder: Path) -> None:
    model = build_vision("llava")
    inputs = {"input_ids": torch.ones(1, 2, dtype=torch.int64), "pixel_values": torch.ones(1), "unknown": torch.ones(1)}
    known = for_forward(model, inputs, torch.device("cpu"), torch.bfloat16)
    assert known.keys() == {"input_ids", "pixel_values"}
    assert (known["input_ids"].dtype, known["pixel_values"].dtype) == (torch.int64, torch.bfloat16)


def test_prompts() -> None:
    processor = tiny_processor("llava")
    plain = Prompt(processor)
    assert plain.ask("a {b}?") == "<s><image>\na {b}?"
    assert plain.answer("c") == " c</s>"
    assert Prompt(processor, "USER: {image} {question} A:").ask("q") == "USER: <image> q A:"
    assert Prompt(processor, "<image>{question}").ask("q") == "<image>q"
    processor.chat_template = (
        "{% for m in messages %}{% for c in m.content %}"
        "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endfor %} ASSISTANT:"
    )
    chat = Prompt(processor)
    assert chat.ask("q") == "<image>q ASSISTANT:"
    assert chat.answer("c") == "c</s>"
    assert chat.description == "the processor's chat template"
    assert Prompt(processor, "{image}{question}").ask("q") == "<image>q"


def test_batches_are_padded_on_the_left(folder: Path) -> None:
    processor, prompt = tiny_processor("llava"), Prompt(tiny_processor("llava"))
    pictures = [folder / "0.png", folder / "1.png"]
    batch = encode(processor, pictures, [prompt.ask("q"), prompt.ask("longer")])
    assert batch["attention_mask"][0].tolist() == [0] * 5 + [1] * 7
    alone = encode(processor, pictures[:1], [prompt.ask("q")])
    assert torch.equal(batch["input_ids"][0, 5:], alone["input_ids"][0])


BAD_LINES: list[tuple[list[Any], str]] = [
    ([[1]], "metadata.jsonl, line 1: found a JSON list; each line must hold one object"),
    ([{"file_name": "0.png"}], "line 1: needs file_name with a list qa of questions, or text; fields found: file_name"),
    ([{"qa": [{"question": "a", "answer": "b"}]}], "fields found: qa"),
    ([{"file_name": "0.png", "qa": []}], "needs file_name with a list qa"),
    (
        [{"file_name": "0.png", "qa": [{"question": "a"}]}],
        "entry of qa must be an object with question and answer",
    ),
    ([{"file_name": "0.png", "qa": [{"question": " ", "answer": "b"}]}], "question must be a text that is not empty"),
    ([{"file_name": 3, "text": "a"}], "file_name must be a text that is not empty, found 3"),
    ([{"text": "a"}, {"file_name": "7.png", "text": "a"}], "metadata.jsonl, line 2: no picture 7.png in pictures"),
    ([], "pictures: metadata.jsonl is empty"),
]


@pytest.mark.parametrize(("lines", "message"), BAD_LINES, ids=[message[:40] for _, message in BAD_LINES])
def test_bad_lines_are_named(lines: list[Any], message: str, folder: Path) -> None:
    write_metadata(folder, lines)
    with pytest.raises(FileError, match=message.replace(".", r"\.")):
        read_questions(str(folder))


def test_broken_files(folder: Path) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:100])
    with pytest.raises(FileError, match=r"metadata\.jsonl, line 2: 1\.png cannot be read as a picture; replace it"):
        load(folder)
    (folder / "metadata.jsonl").write_text('{"text": ')
    with pytest.raises(FileError, match=r"metadata\.jsonl, line 1: not valid JSON"):
        read_questions(str(folder))
    (folder / "metadata.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(FileError, match="not UTF-8 at byte 10"):
        read_questions(str(folder))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no such folder; give a folder with metadata\.jsonl and pictures"):
        read_questions(str(tmp_path / "nowhere"))
    with pytest.raises(RequestError, match=r"no metadata\.jsonl in this folder"):
        read_questions(str(tmp_path))
    assert not holds_pictures(str(tmp_path))


def test_a_picture_without_tokens_is_refused(folder: Path) -> None:
    config = build_vision("llava").config
    config.image_token_index = 200
    with pytest.raises(RequestError, match=r"line 1: no token stands for the picture; the template lacks its place"):
        load_pictures(str(folder), tiny_processor("llava"), config, n_samples=1, max_tokens=99)


def test_weighted_statistics_are_those_of_weighted_rows() -> None:
    """G = sum w x x^T and n = sum w; weights 0 and 1 select rows exactly."""
    linear, rows = torch.nn.Linear(6, 2), torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0, 1, 0.25, 0, 1, 1, 0.25, 0, 4.0])

    def gathered(inputs: torch.Tensor, chosen: torch.Tensor | None) -> Any:
        recorder = StatisticsRecorder({"l": linear}, rows_per_call=100)
        with recorder.recording():
            recorder.next_call({"l": 2 * inputs.unsqueeze(0)}, chosen)
            linear(inputs.unsqueeze(0))
        return recorder.statistics("l")

    weighted = gathered(rows, weights)
    expected = (rows * weights.unsqueeze(1)).t() @ rows
    assert weighted.n_tokens == weights.sum()
    torch.testing.assert_close(weighted.gram, expected)
    torch.testing.assert_close(weighted.cross_gram, 2 * expected)
    torch.testing.assert_close(weighted.hessian(), expected * 2 / weights.sum())
    chosen = gathered(rows, (weights == 1).float())
    picked = gathered(rows[weights == 1], None)
    assert torch.equal(chosen.gram, picked.gram)
    assert torch.equal(chosen.rows(), picked.rows())
    nothing = gathered(rows, torch.zeros(9))
    assert nothing.hessian() is None
    assert nothing.cross() is None


def test_vision_linears_are_tower_and_projector() -> None:
    names = [linear.name for linear in vision_linears(build_vision("llava"))]
    assert len(names) == 2 * 6 + 2
    assert all(".language_model." not in name and "lm_head" not in name for name in names)
