"""Small random vision-language models of the real classes, their processors, and pictures with questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from quantized_models import SMALL
from tiny_models import _GEMMA, _GROUPED, _SLIDING, SPECIAL, _randomize, tiny_tokenizer

from quantkit.pipeline import QuantizeResult, quantize

IMAGE_ID = 270  # the tokenizer's last byte has id 259; the ids between are unused
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_QWEN: dict[str, Any] = {
    "text_config": {**_GROUPED, "rope_parameters": _MROPE},
    "image_token_id": IMAGE_ID,
    "video_token_id": 271,
    "vision_start_token_id": 272,
    "vision_end_token_id": 273,
}
_QWEN_TOWER: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 14}


def _llava() -> Any:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_TOWER),
        text_config=hf.LlamaConfig(**_GROUPED),
        image_token_index=IMAGE_ID,
    )


def _llava_next() -> Any:
    return hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**_TOWER),
        text_config=hf.MistralConfig(**_GROUPED),
        image_token_index=IMAGE_ID,
        image_grid_pinpoints=[[28, 56], [56, 28]],
    )


def _gemma3() -> Any:
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    return hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**{**_TOWER, "image_size": 56}),
        text_config=hf.Gemma3TextConfig(**_GEMMA, **_SLIDING, **layers),
        mm_tokens_per_image=4,
        image_token_index=IMAGE_ID,
        boi_token_index=271,
        eoi_token_index=272,
    )


def _idefics3() -> Any:
    text = hf.LlamaConfig(**_GROUPED)
    return hf.Idefics3Config(vision_config=_TOWER, text_config=text, image_token_id=IMAGE_ID, scale_factor=2)


def _qwen2_vl() -> Any:
    tower = {**_QWEN_TOWER, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return hf.Qwen2VLConfig(vision_config=tower, **_QWEN)


def _qwen2_5_vl() -> Any:
    sizes = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
    tower = {**_QWEN_TOWER, **sizes, "window_size": 56, "fullatt_block_indexes": [1]}
    return hf.Qwen2_5_VLConfig(vision_config=tower, **_QWEN)


def _internvl() -> Any:
    return hf.InternVLConfig(
        vision_config={**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
        text_config=hf.Qwen2Config(**_GROUPED),
        image_token_id=IMAGE_ID,
        image_seq_length=1,
        downsample_ratio=0.5,
    )


_CONFIGS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "internvl": _internvl,
}
VISION_FAMILIES = tuple(_CONFIGS)
# Those whose processors need nothing but pillow; the other processors also handle video, with torchvision.
WITH_PROCESSORS = ("llava", "llava_next", "gemma3", "idefics3")


def build_vision(family: str, seed: int = 0) -> hf.PreTrainedModel:
    """The model in memory, float32, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForImageTextToText.from_config(_CONFIGS[family](), dtype=torch.float32).eval()
        for parameter in model.parameters():
            _randomize(parameter.data)
    return model


def tiny_vision_model(family: str, folder: Path, seed: int = 0) -> Path:
    """Save a random model of two blocks, with its processor where it needs no torchvision, else its tokenizer."""
    path = folder / f"{family}-{seed}"
    build_vision(family, seed).save_pretrained(path)
    companion = tiny_processor(family) if family in WITH_PROCESSORS else tiny_tokenizer()
    companion.save_pretrained(path)
    return path


def tiny_processor(family: str) -> hf.ProcessorMixin:
    """A real processor over the tests' byte tokenizer."""
    vision: dict[str, Any] = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    image: dict[str, Any] = {"num_additional_image_tokens": 1, "image_token": "<image>"}
    square = {"height": 28, "width": 28}
    if family == "llava":
        pixels = hf.CLIPImageProcessor(size=square, do_center_crop=False)
        return hf.LlavaProcessor(pixels, _tokenizer("<image>"), **vision, **image)
    if family == "llava_next":
        grid = [[28, 56], [56, 28]]
        pixels = hf.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=square, image_grid_pinpoints=grid)
        return hf.LlavaNextProcessor(pixels, _tokenizer("<image>"), **vision, **image)
    if family == "gemma3":
        tokenizer = _tokenizer("<image>", "<boi>", "<eoi>")
        pixels = hf.Gemma3ImageProcessor(size={"height": 56, "width": 56})
        return hf.Gemma3Processor(pixels, tokenizer, image_seq_length=4)
    edge = {"longest_edge": 28}
    try:
        pixels = hf.Idefics3ImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
    except ImportError:  # in transformers 5.17 this one has no pillow backend
        pytest.skip("Idefics3's image processor needs torchvision here")
    marks = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    return hf.Idefics3Processor(pixels, _tokenizer(*marks), image_seq_len=1)


def _tokenizer(*marks: str) -> hf.PreTrainedTokenizerFast:
    """The byte tokenizer with special tokens from `IMAGE_ID` on."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<unused{index}>" for index in range(len(SPECIAL) + 256, IMAGE_ID)])
    names = dict(zip(("image_token", "boi_token", "eoi_token"), marks, strict=False))
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    for name, mark in names.items():
        tokenizer._set_model_specific_special_tokens({name: mark})
    return tokenizer


def picture_folder(folder: Path, n_pictures: int = 4, seed: int = 0) -> Path:
    """Pictures of noise in several sizes, each with two questions, in a new folder."""
    pictures = folder / "pictures"
    pictures.mkdir()
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for index in range(n_pictures):
        height, width = 30 + 15 * index, 40
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(pictures / f"{index}.png")
        pairs = [{"question": f"what is {word} in {index}?", "answer": f"{word} {index}"} for word in ("red", "blue")]
        lines.append({"file_name": f"{index}.png", "qa": pairs})
    write_metadata(pictures, lines)
    return pictures


def write_metadata(folder: Path, lines: list[Any]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def picture_run(model: Path, output: Path, pictures: Path, method: str = "gptq", **options: Any) -> QuantizeResult:
    """`quantize` with small settings on a folder of pictures."""
    small = {key: value for key, value in SMALL.items() if key != "seq_len"}
    return quantize(model, output, method=method, **{"bits": 3, "calib": str(pictures), **small, **options})
