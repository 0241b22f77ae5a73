"""Vision-language models: calibrated on pictures, packed, loaded, they compute what their stored weights say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import (
    Events,
    Interrupted,
    StopAfter,
    dense_model,
    quantized_weights,
    sha256_of,
    small_run,
)
from tiny_models import tiny_model
from tiny_vision import (
    IMAGE_ID,
    VISION_FAMILIES,
    WITH_PROCESSORS,
    build_vision,
    picture_folder,
    picture_run,
    tiny_processor,
    tiny_vision_model,
    write_metadata,
)
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

import quantkit
from quantkit.calib.pictures import Prompt, encode, for_forward
from quantkit.errors import FileError, RequestError
from quantkit.formats.checkpoint import find_tensors, open_folder
from quantkit.formats.files import read_json
from quantkit.formats.storage import unpack
from quantkit.models.skeleton import Skeleton
from quantkit.pipeline.modality import modality_errors, probes, token_weights
from quantkit.recipe import resolve
from quantkit.runtime.packed_linear import PackedLinear


@pytest.fixture(scope="module")
def pictures(models: Path) -> Path:
    return picture_folder(models)


def picture_inputs(family: str, pictures: Path) -> dict[str, Tensor]:
    """What the forward of a family takes for one picture and a question."""
    if family in WITH_PROCESSORS:
        processor = tiny_processor(family)
        return encode(processor, [pictures / "1.png"], [Prompt(processor).ask("what is red?")])
    generator = torch.Generator().manual_seed(0)
    n_tokens, pixels = (1, (1, 3, 28, 28)) if family == "internvl" else (4, (16, 3 * 2 * 14 * 14))
    ids = [1, 272, *[IMAGE_ID] * n_tokens, 273, 90, 75, 68]
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(pixels, generator=generator)}
    if family != "internvl":
        inputs |= {"image_grid_thw": torch.tensor([[1, 4, 4]])}
        inputs |= {"mm_token_type_ids": (inputs["input_ids"] == IMAGE_ID).int()}
    return inputs


def answers(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(
    ("family", "vision_bits"), [*((family, 8) for family in VISION_FAMILIES), ("llava", None), ("gemma3", 4)]
)
def test_family(family: str, vision_bits: int | None, models: Path, pictures: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_vision_model(family, models)
    settings = [f"vision_bits={vision_bits}"] if vision_bits else []
    if family in WITH_PROCESSORS:
        result = picture_run(source, tmp_path / "out", pictures, settings=settings)
    else:
        result = small_run(source, tmp_path / "out", text, settings=settings)
    skeleton = Skeleton(source)
    inside = [module for module in result.modules if skeleton.in_blocks(module.name)]
    assert len(inside) == 14
    assert (len(result.modules) > 14) is bool(vision_bits)
    packed = AutoModelForImageTextToText.from_pretrained(result.output, dtype=torch.float32)
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == len(result.modules)
    weights = {name: stored.dequantize() for name, stored in quantized_weights(result.output).items()}
    outside = [stored for name, stored in quantized_weights(result.output).items() if not skeleton.in_blocks(name)]
    assert {width for stored in outside for width in stored.bits} == ({vision_bits} if vision_bits else set())
    dense = dense_model(source, weights, AutoModelForImageTextToText)
    inputs = picture_inputs(family, pictures)
    # float32 sums in another order, as in test_families; a few blocks more
    torch.testing.assert_close(answers(packed, inputs), answers(dense, inputs), rtol=0, atol=2e-4)
    loaded = quantkit.load(result.output, dtype="float32")
    assert torch.equal(answers(loaded, inputs), answers(packed, inputs))


def test_the_output_answers_with_its_own_processor(models: Path, pictures: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    source = tiny_vision_model("llava", models)
    out = picture_run(source, tmp_path / "out", pictures, bits=4).output
    processor = AutoProcessor.from_pretrained(out)
    inputs = encode(processor, [pictures / "0.png"], [Prompt(processor).ask("what?")])
    tokens = quantkit.load(out).generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("settings", [["vision_bits=4"], ["tokens=text"], ["allocator=luq", "lo=2", "hi=4"]], ids=str)
def test_resumed_bytes_are_those_of_an_undisturbed_run(
    settings: list[str], models: Path, pictures: Path, tmp_path: Path
) -> None:
    source = tiny_vision_model("llava", models)
    whole = picture_run(source, tmp_path / "whole", pictures, settings=settings)
    for n_blocks in range(1, 2 + ("vision_bits=4" in settings)):
        with pytest.raises(Interrupted):
            picture_run(source, tmp_path / "again", pictures, settings=settings, listener=StopAfter(n_blocks))
    again = picture_run(source, tmp_path / "again", pictures, settings=settings)
    assert again.resumed_blocks == n_blocks
    assert sha256_of(again.output) == sha256_of(whole.output)


def test_the_report_tells_image_from_text_tokens(models: Path, pictures: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_vision_model("llava", models)
    report = read_json(picture_run(source, tmp_path / "out", pictures).output / "report.json")
    assert [block["name"] for block in report["blocks"]] == [f"model.language_model.layers.{i}" for i in (0, 1)]
    for block in report["blocks"]:
        assert 0 < block["image_error"] < 1
        assert 0 < block["text_error"] < 1
    assert "blocks" not in read_json(small_run(source, tmp_path / "text", text).output / "report.json")
    calibration = read_json(tmp_path / "out" / "config.json")["quantization_config"]["calibration"]
    assert calibration["image_tokens"] == 16
    assert calibration["source"] == "pictures"


def test_statistics_of_one_modality_serve_that_modality(models: Path, pictures: Path, tmp_path: Path) -> None:
    """Each choice is at least as good as the other one for its own tokens, in the first block."""
    source = tiny_vision_model("llava", models)
    errors = {}
    for tokens in ("text", "image"):
        run = picture_run(source, tmp_path / tokens, pictures, settings=[f"tokens={tokens}"], n_samples=8)
        errors[tokens] = read_json(run.output / "report.json")["blocks"][0]
    assert errors["text"]["text_error"] < errors["image"]["text_error"]
    assert errors["image"]["image_error"] < errors["text"]["image_error"]


def test_a_huge_image_weight_is_nearly_image_only(models: Path, pictures: Path, tmp_path: Path) -> None:
    source = tiny_vision_model("llava", models)
    runs = [["tokens=image"], ["image_weight=1000"], ["image_weight=1"]]
    errors = [
        read_json(picture_run(source, tmp_path / str(i), pictures, settings=settings).output / "report.json")["blocks"]
        for i, settings in enumerate(runs)
    ]
    image_only, weighted, alike = (blocks[0]["image_error"] for blocks in errors)
    assert abs(weighted - image_only) < abs(alike - image_only)


def test_probes_and_errors_by_hand() -> None:
    masks = [torch.tensor([False, True, True, False])] * 20
    assert probes(None) == []
    assert probes(masks[:3]) == [0, 1, 2]
    assert probes(masks) == [0, 2, 5, 7, 10, 12, 15, 17]
    before = torch.tensor([[[9.0, 0.0], [2.0, 0.0], [0.0, 4.0], [1.0, 0.0]]])
    after = before + torch.tensor([[[9.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.5]]])
    errors = modality_errors([before], [after], masks[:1])
    assert errors == {"image_error": (0.5 + 0.25) / 2, "text_error": 0.5}  # position 0 is left out
    assert modality_errors([before], [after], [torch.zeros(4, dtype=torch.bool)]).keys() == {"text_error"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], [1, 0.25, 0.25, 0.25, 0.25]),  # four image tokens count as much as the one text token
        (["tokens=text"], [1, 0, 0, 0, 0]),
        (["tokens=image"], [0, 1, 1, 1, 1]),
        (["image_weight=0.5"], [1, 0.5, 0.5, 0.5, 0.5]),
        (["image_weight=1"], None),
        (["solver=boa"], None),
    ],
)
def test_token_weights(settings: list[str], expected: list[float] | None) -> None:
    weights = token_weights(resolve("gptq", settings=settings), torch.tensor([False, True, True, True, True]))
    assert (None if weights is None else weights.tolist()) == expected


@pytest.mark.parametrize("mask", [[False, False, True], [True, True], [False]], ids=["few", "only", "none"])
def test_image_tokens_never_count_more_than_text_by_default(mask: list[bool]) -> None:
    assert token_weights(resolve("gptq"), torch.tensor(mask)) is None


def test_text_alone_is_allowed_with_a_note(models: Path, text: Path, pictures: Path, tmp_path: Path) -> None:
    source, events = tiny_vision_model("llava", models), Events()
    small_run(source, tmp_path / "out", text, listener=events)
    assert events.notes == [
        "calibrating on text alone costs many answers; give --calib a folder of pictures (docs/vision.md)"
    ]
    events = Events()
    picture_run(source, tmp_path / "pictures", pictures, listener=events)
    assert events.notes == []


def test_text_can_be_mixed_in(models: Path, tmp_path: Path) -> None:
    source, mixed = tiny_vision_model("llava", models), picture_folder(tmp_path, n_pictures=2)
    lines = [{"text": "only words"}, {"file_name": "0.png", "text": "a caption"}, {"text": "more words"}]
    write_metadata(mixed, lines)
    out = picture_run(source, tmp_path / "out", mixed, n_samples=3, settings=["tokens=image"]).output
    calibration = read_json(out / "config.json")["quantization_config"]["calibration"]
    assert (calibration["image_tokens"], calibration["n_samples"]) == (4, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 9}, r"pictures: 8 questions and texts, n_samples is 9; lower n_samples to 8, or add pictures"),
        ({"seq_len": 20}, r"metadata\.jsonl, line 1: 30 tokens with the picture, more than seq_len 20; raise seq_len"),
        ({"seq_len": 999}, "seq_len 999 exceeds the model's context of 256 tokens"),
        ({"template": "{question}"}, r"template '{question}' has no {image} or <image>, the place for the picture"),
        ({"template": "<image>"}, r"template '<image>' has no {question}, the place for the question"),
        ({"settings": ["solver=boa", "tokens=text"]}, "solver=boa looks at whole attention maps"),
    ],
)
def test_bad_requests(options: dict[str, Any], message: str, models: Path, pictures: Path, tmp_path: Path) -> None:
    source = tiny_vision_model("llava", models)
    with pytest.raises(RequestError, match=message):
        picture_run(source, tmp_path / "out", pictures, **options)
    assert not (tmp_path / "out").exists()


def test_pictures_for_a_model_without_vision(models: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="pictures: holds pictures, and LlamaForCausalLM takes text only"):
        picture_run(tiny_model("llama", models), tmp_path / "out", pictures)


def test_modalities_and_templates_need_pictures(models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_vision_model("llava", models)
    with pytest.raises(RequestError, match=r"give --calib a folder with metadata\.jsonl and pictures"):
        small_run(source, tmp_path / "out", text, settings=["tokens=text"])
    with pytest.raises(RequestError, match="--calib holds no pictures"):
        small_run(source, tmp_path / "out", text, template="{image}{question}")


def test_vision_bits_need_a_vision_tower(models: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="vision_bits: LlamaForCausalLM has no vision tower with linear layers"):
        small_run(tiny_model("llama", models), tmp_path / "out", text, settings=["vision_bits=8"])


def test_experts_do_not_see_every_token(models: Path, tmp_path: Path) -> None:
    from quantkit.calib.statistics import StatisticsRecorder

    linear = torch.nn.Linear(4, 4)
    recorder = StatisticsRecorder({"experts.0.up_proj": linear})
    recorder.next_call(weights=torch.ones(5))
    with recorder.recording(), pytest.raises(RequestError, match="does not receive every token"):
        linear(torch.randn(3, 4))


def test_a_missing_processor_is_named(models: Path, pictures: Path, tmp_path: Path) -> None:
    source = tiny_vision_model("llava", tmp_path)
    (source / "processor_config.json").unlink()
    with pytest.raises(FileError, match="processor"):
        picture_run(source, tmp_path / "out", pictures)


def test_the_plan_counts_what_the_run_stores(models: Path, pictures: Path, tmp_path: Path) -> None:
    from quantkit.pipeline import QuantizeRequest, dry_run

    source = tiny_vision_model("llava", models)
    recipe = resolve("gptq", bits=3, group_size=32, settings=["vision_bits=4"])
    request = QuantizeRequest(
        model=str(source), output=tmp_path / "out", recipe=recipe, calib=str(pictures), n_samples=4
    )
    plan = dry_run(request)
    result = picture_run(source, tmp_path / "out", pictures, settings=["vision_bits=4"])
    assert (plan.output_bytes, plan.bpw) == (result.size_bytes, result.bpw)
    assert {name for name, _ in plan.modules} == {module.name for module in result.modules}


def test_luq_scores_what_pictures_do(models: Path, pictures: Path, text: Path, tmp_path: Path) -> None:
    """With pictures the entropy is that of multimodal activations, and each kind of tokens is reported."""
    source, events = tiny_vision_model("llava", models), Events()
    out = picture_run(source, tmp_path / "out", pictures, "luq", n_samples=8, listener=events).output
    units = read_json(out / "report.json")["allocation"]["units"]
    for unit in units:
        assert unit["score"] > 0
        assert {unit["image_entropy"] > 0, unit["text_entropy"] > 0} == {True}
    # 8 samples of 4 image tokens fall into at most 32 clusters
    assert max(unit["image_entropy"] for unit in units) <= 3.4658
    assert not any("the paper's setting" in note for note in events.notes)
    events = Events()
    out = small_run(source, tmp_path / "text", text, "luq", listener=events).output
    assert "luq: scored on text tokens; the paper's setting is multimodal prompts" in events.notes
    assert "image_entropy" not in read_json(out / "report.json")["allocation"]["units"][0]


@pytest.mark.parametrize("method", ["slim", "turboboa", "refined", "ptq161"])
def test_other_methods_see_pictures_too(method: str, models: Path, pictures: Path, tmp_path: Path) -> None:
    """Samples of different lengths, and masks that the processor brings along, are nothing special to them."""
    options: dict[str, Any] = {"group_size": None, "bits": None} if method == "ptq161" else {"bits": 2}
    settings = ["block_steps=2"] if method == "ptq161" else []
    source = tiny_vision_model("llava", models)
    out = picture_run(source, tmp_path / "out", pictures, method, settings=settings, **options).output
    assert len(read_json(out / "report.json")["blocks"]) == 2
    inputs = picture_inputs("llava", pictures)
    weights = {name: stored.dequantize() for name, stored in _weights_of_any_format(out).items()}
    packed, dense = quantkit.load(out, dtype="float32"), dense_model(source, weights, AutoModelForImageTextToText)
    torch.testing.assert_close(answers(packed, inputs), answers(dense, inputs), rtol=0, atol=2e-4)


def _weights_of_any_format(folder: Path) -> dict[str, Any]:
    checkpoint = open_folder(folder)
    return {name: unpack(module.spec, checkpoint.read_module(name)) for name, module in checkpoint.modules.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_parameter_has_the_dtype_asked_for(
    dtype: torch.dtype, models: Path, pictures: Path, tmp_path: Path
) -> None:
    """Also where the files call a parameter otherwise than the model does, as those of LLaVA do."""
    source = tmp_path / "source"
    build_vision("llava").to(torch.bfloat16).save_pretrained(source)
    tiny_processor("llava").save_pretrained(source)
    stored = find_tensors(source)
    assert {ref.torch_dtype for ref in stored.values()} == {torch.bfloat16}
    assert "language_model.model.embed_tokens.weight" in stored  # the model says model.language_model.embed_tokens
    out = picture_run(source, tmp_path / "out", pictures, bits=4).output
    model = quantkit.load(out, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    inputs = picture_inputs("llava", pictures)
    assert answers(model, for_forward(model, inputs, torch.device("cpu"), dtype)).dtype == dtype
