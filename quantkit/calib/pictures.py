"""Pictures with questions: a folder with ``metadata.jsonl``, put to a model through its own processor.

Each line of ``metadata.jsonl`` is one JSON object:

    {"file_name": "images/1.jpg", "qa": [{"question": "...", "answer": "..."}, ...]}     questions about a picture
    {"file_name": "images/1.jpg", "text": "..."}                                        a picture with a caption
    {"text": "..."}                                                                     text alone, to be mixed in

Calibration takes one question (with its answer) or text as one sample: the first of every line, then the second of
every line, and so on, so that a small number of samples sees many pictures. Samples have different lengths and are
never padded or cut; pictures are read again whenever they are needed, so that memory holds one at a time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calib.datasets import Calibration
from quantkit.errors import FileError, RequestError
from quantkit.models.modality import image_tokens

METADATA = "metadata.jsonl"
IMAGE, QUESTION = "{image}", "{question}"  # in a prompt template


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a picture, a caption (no answer), or text alone (no picture)."""

    where: str  # file and line, for messages
    picture: Path | None
    text: str
    answer: str | None


def holds_pictures(source: str) -> bool:
    """Whether a calibration source is a folder of this kind."""
    return (Path(source) / METADATA).is_file()


def read_questions(source: str) -> list[list[Question]]:
    """The questions of a folder, line by line. Opens no picture, but misses none.

    Raises:
        RequestError: no such folder, or no ``metadata.jsonl`` in it.
        FileError: a line that is not as described above, or a picture that is not there; names the line.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise RequestError(f"{source}: no such folder; give a folder with {METADATA} and pictures")
    path = folder / METADATA
    if not path.is_file():
        raise RequestError(f"{folder.name}: no {METADATA} in this folder; it says which question belongs to a picture")
    lines = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path.name}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            lines.append(_parse(line, folder, f"{METADATA}, line {number}"))
    if not lines:
        raise FileError(f"{folder.name}: {METADATA} is empty; it must hold at least one picture")
    return lines


def _parse(line: str, folder: Path, where: str) -> list[Question]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{where}: not valid JSON ({error}); each line must hold one JSON object") from error
    if not isinstance(record, dict):
        raise FileError(f"{where}: found a JSON {type(record).__name__}; each line must hold one object")
    picture = None
    if "file_name" in record:
        picture = folder / _string(record["file_name"], "file_name", where)
        if not picture.is_file():
            raise FileError(f"{where}: no picture {record['file_name']} in {folder.name}")
    if "text" in record:
        return [Question(where, picture, _string(record["text"], "text", where), None)]
    pairs = record.get("qa")
    if picture is None or not isinstance(pairs, list) or not pairs:
        found = ", ".join(record) or "none"
        raise FileError(f"{where}: needs file_name with a list qa of questions, or text; fields found: {found}")
    questions = []
    for pair in pairs:
        if not isinstance(pair, dict) or not {"question", "answer"} <= pair.keys():
            raise FileError(f"{where}: each entry of qa must be an object with question and answer")
        texts = [_string(pair[key], key, where) for key in ("question", "answer")]
        questions.append(Question(where, picture, *texts))
    return questions


def _string(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise FileError(f"{where}: {key} must be a text that is not empty, found {value!r}")
    return value


class Prompt:
    """How a question is put to a model.

    Args:
        processor: of the model.
        template: text with ``{question}`` and, where the picture goes, ``{image}`` or the processor's own image token;
            None: the processor's chat template if it has one, else its BOS token, the picture, a newline, the question.

    Raises:
        RequestError: a template without a place for the question or the picture.
    """

    def __init__(self, processor: Any, template: str | None = None) -> None:
        self._processor = processor
        tokenizer = processor.tokenizer
        marks = (getattr(processor, name, None) for name in ("boi_token", "image_token"))  # what its texts hold
        self._image = str(next(filter(None, marks), "<image>"))
        self._chat = template is None and bool(getattr(processor, "chat_template", None))
        bos = getattr(tokenizer, "bos_token", None) or ""
        self.template = template or f"{bos}{self._image}\n{QUESTION}"
        if QUESTION not in self.template:
            raise RequestError(f"template {template!r} has no {QUESTION}, the place for the question")
        if IMAGE not in self.template and self._image not in self.template:
            raise RequestError(f"template {template!r} has no {IMAGE} or {self._image}, the place for the picture")
        self._end = getattr(tokenizer, "eos_token", None) or ""

    @property
    def description(self) -> str:
        """For reports."""
        return "the processor's chat template" if self._chat else repr(self.template)

    def ask(self, question: str) -> str:
        """The prompt, up to where the answer begins."""
        if not self._chat:
            return self.template.replace(IMAGE, self._image).replace(QUESTION, question)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        rendered: str = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return rendered

    def answer(self, answer: str) -> str:
        """What follows the prompt: after a plain prompt a space first, and the EOS token at the end."""
        return f"{'' if self._chat else ' '}{answer}{self._end}"


@dataclass(frozen=True)
class PictureCalibration:
    """A calibration set of pictures with text.

    `source` is the folder's name. `image_masks` says of each token of each sample whether it stands for a part of a
    picture, bool [length]. `fingerprint` is the SHA-256 (hex) of the samples' ids and pictures. `protocol` is one line.
    """

    samples: tuple[tuple[Path | None, str], ...]  # picture and text
    image_masks: tuple[Tensor, ...]
    source: str
    fingerprint: str
    protocol: str
    processor: Any

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(map(len, self.image_masks))

    def inputs(self) -> Iterator[dict[str, Tensor]]:
        """Arguments of the model's forward for each sample; tensors on the CPU, batch size 1."""
        for picture, text in self.samples:
            yield encode(self.processor, [picture], [text])

    def to_json(self) -> dict[str, Any]:
        n_image = sum(int(mask.sum()) for mask in self.image_masks)
        return {
            "source": self.source,
            "n_samples": len(self.samples),
            "seq_len": self.longest,
            "image_tokens": n_image,
            "text_tokens": sum(map(len, self.image_masks)) - n_image,
            "fingerprint": self.fingerprint,
            "protocol": self.protocol,
        }


CalibrationSet = Calibration | PictureCalibration


def load_pictures(
    source: str,
    processor: Any,
    config: Any,
    *,
    n_samples: int,
    max_tokens: int,
    seed: int = 0,
    shuffle: bool = False,
    template: str | None = None,
) -> PictureCalibration:
    """Read a calibration set of pictures; every chosen picture is opened once.

    Args:
        source: the folder.
        processor: a transformers processor with tokenizer and image processor.
        config: of the model; says which tokens stand for pictures.
        n_samples: questions (with their answers) or texts.
        max_tokens: of one sample, its picture included.
        seed: of the random choice (`shuffle`).
        shuffle: choose among all samples instead of taking the first.
        template: see `Prompt`.

    Raises:
        RequestError: too few samples, a template without its places, a sample that is too long.
        FileError: see `read_questions`; a picture that cannot be read.
    """
    prompt, name = Prompt(processor, template), Path(source).resolve().name
    in_turns = zip_longest(*read_questions(source))
    questions = [question for turn in in_turns for question in turn if question is not None]
    if len(questions) < n_samples:
        raise RequestError(
            f"{name}: {len(questions)} questions and texts, n_samples is {n_samples}; "
            f"lower n_samples to {len(questions)}, or add pictures"
        )
    chosen = random.Random(seed).sample(questions, n_samples) if shuffle else questions[:n_samples]
    samples, masks, digest = [], [], hashlib.sha256()
    for question in chosen:
        text = _whole_text(question, prompt)
        inputs = encode(processor, [question.picture], [text], question.where)
        ids, mask = inputs["input_ids"][0], image_tokens(inputs, config)[0]
        if question.picture is not None and not mask.any():
            raise RequestError(f"{question.where}: no token stands for the picture; the template lacks its place")
        if len(ids) > max_tokens:
            raise RequestError(
                f"{question.where}: {len(ids)} tokens with the picture, more than seq_len {max_tokens}; "
                "raise seq_len, or use smaller pictures or shorter texts"
            )
        digest.update(ids.numpy().astype("<i8").tobytes())
        digest.update(question.picture.read_bytes() if question.picture else b"")
        samples.append((question.picture, text))
        masks.append(mask)
    n_pictures = len({picture for picture, _ in samples if picture})
    order = f"a random choice, seed {seed}" if shuffle else "in turns over the pictures"
    protocol = f"{name}: {n_samples} samples of {n_pictures} pictures, {order}; prompt {prompt.description}"
    return PictureCalibration(tuple(samples), tuple(masks), name, digest.hexdigest(), protocol, processor)


def _whole_text(question: Question, prompt: Prompt) -> str:
    if question.picture is None:
        return question.text
    asked = prompt.ask(question.text)
    return asked if question.answer is None else asked + prompt.answer(question.answer)


def encode(processor: Any, pictures: Sequence[Path | None], texts: Sequence[str], where: str = "") -> dict[str, Tensor]:
    """Arguments of the model's forward for a batch: all with a picture, or all without; padded on the left.

    Raises:
        FileError: a picture that cannot be read. RequestError: the package pillow is missing.
    """
    options: dict[str, Any] = {"add_special_tokens": False, "return_tensors": "pt"}
    if len(texts) > 1:
        options |= {"padding": True, "padding_side": "left"}
    if pictures[0] is None:
        encoded = processor.tokenizer(list(texts), **options)
    else:
        opened = [[open_picture(picture, where)] for picture in pictures if picture is not None]
        encoded = processor(images=opened, text=list(texts), **options)
    return {key: value for key, value in encoded.items() if isinstance(value, Tensor)}


def open_picture(path: Path, where: str = "") -> Any:
    """A picture in RGB, as pillow reads it."""
    try:
        image = import_module("PIL.Image")
    except ImportError as error:
        raise RequestError("pictures need the package pillow; pip install pillow") from error
    try:
        with image.open(path) as file:
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # pillow's own errors for files that are no pictures
        at = f"{where}: " if where else ""
        raise FileError(f"{at}{path.name} cannot be read as a picture; replace it or remove its line") from error


def for_forward(model: Any, inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Those inputs that a model's forward knows by name, on its device; pixels in its dtype."""
    known = inspect.signature(model.forward).parameters
    return {
        key: value.to(device, dtype if value.is_floating_point() else None)
        for key, value in inputs.items()
        if key in known
    }
