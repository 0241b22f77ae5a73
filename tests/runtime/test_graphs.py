"""Decoding step by step on a static cache: the tokens of `generate`, and what a graph changes (nothing)."""

from __future__ import annotations

import pytest
import torch
from packed_models import pack_folder
from small_llama import PROMPT, SHAPE
from tiny_models import FAMILIES, tiny_model
from transformers import CompileConfig

from quantkit.errors import RequestError
from quantkit.evaluation.random_models import random_llama
from quantkit.runtime.graphs import GraphDecoder, StaticSteps, fastest_decoder
from quantkit.runtime.loading import load
from quantkit.runtime.packed_linear import PackedLinear
from quantkit.runtime.sampling import sampler


def model_of(format, device="cpu", dtype=torch.float32):
    return random_llama(SHAPE, format, "int4" if format else None, device=device, dtype=dtype)


def reference(model, n_tokens):
    return reference_from(model, PROMPT, n_tokens)


def reference_from(model, ids, n_tokens):
    ids = ids.to(model.device)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, **options).cpu()


@pytest.mark.parametrize("format", [None, "int2", "ptq161", "littlebit-0.55"])
def test_the_tokens_of_generate(format):
    model = model_of(format)
    expected = reference(model, 12)
    decoder = GraphDecoder(model, 32)
    assert torch.equal(decoder.generate(PROMPT, 12), expected)
    assert torch.equal(decoder.generate(PROMPT, 5), expected[:, :10])  # what an earlier text left does not matter
    assert torch.equal(decoder.generate(PROMPT, 27), reference(model, 27))  # to the last place of the cache


def test_it_ends_after_the_end_of_the_text():
    model = model_of(None)
    expected = reference(model, 20)
    new = expected[0, 5:].tolist()
    for token in set(new):
        found = GraphDecoder(model, 32).generate(PROMPT, 20, eos_token_id=token)
        assert torch.equal(found, expected[:, : 5 + new.index(token) + 1])
    several = GraphDecoder(model, 32).generate(PROMPT, 20, eos_token_id=[new[9], new[7]])
    assert torch.equal(several, expected[:, : 5 + min(new.index(new[9]), new.index(new[7])) + 1])


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_sliding_windows(family, tmp_path):
    """As long as the window covers the text, also the second one; a longer text is refused."""
    model = load(tiny_model(family, tmp_path), dtype="float32")  # windows of 64 tokens
    decoder = GraphDecoder(model, 64)
    for ids in (torch.arange(20, 29)[None], torch.arange(40, 60)[None]):
        assert torch.equal(decoder.generate(ids, 30), reference_from(model, ids, 30))
    with pytest.raises(RequestError, match="windows of 64 tokens, max_length is 65; make it as short, or use"):
        GraphDecoder(model, 65)


@pytest.mark.parametrize(
    ("temperature", "settings"), [(1.0, {}), (0.7, {"top_k": 5}), (1.3, {"top_k": 0, "top_p": 0.8})]
)
def test_sampling_is_that_of_generate(temperature, settings):
    """The same seed, the same tokens."""
    model = model_of(None)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    options = {"do_sample": True, "temperature": temperature, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(3)
    expected = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=20, **options)
    torch.manual_seed(3)
    decoder = GraphDecoder(model, 32)
    found = list(decoder.stream(PROMPT, 20, choose=sampler(model.generation_config, temperature)))
    assert found == expected[0, 5:].tolist()
    assert found != reference(model, 20)[0, 5:].tolist()


def test_no_fast_decoder_without_a_gpu():
    assert fastest_decoder(model_of(None), 32) is None


def test_tokens_come_one_by_one():
    model = model_of(None)
    decoder = GraphDecoder(model, 32)
    tokens = decoder.stream(PROMPT, 20)
    first = [next(tokens) for _ in range(6)]
    assert decoder.steps.n_tokens() == 5 + 6  # the one that follows is there already
    assert first + list(tokens) == reference(model, 20)[0, 5:].tolist()


def test_logits_of_a_step_are_those_of_the_whole_text():
    model = model_of("int4")
    decoder = GraphDecoder(model, 32)
    decoder.prefill(PROMPT)
    first = decoder.token.clone()
    decoder.step()
    with torch.inference_mode():
        expected = model(input_ids=torch.cat([PROMPT, first], 1)).logits[:, -1]
    torch.testing.assert_close(decoder.logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", [PROMPT[0], PROMPT.repeat(2, 1), PROMPT[:, :0], PROMPT.repeat(1, 7)])
def test_prompts_that_do_not_fit(prompt):
    with pytest.raises(RequestError, match="one sequence of 1 to 31 tokens is required"):
        GraphDecoder(model_of(None), 32).prefill(prompt)


def test_more_tokens_than_there_is_room_for():
    with pytest.raises(RequestError, match=r"5 \+ 28 tokens do not fit into max_length 32; make it larger"):
        GraphDecoder(model_of(None), 32).generate(PROMPT, 28)


@pytest.mark.slow
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("format", ["int2", "slim-2", "ptq161", "littlebit-0.55"])
def test_a_step_is_one_graph_under_torch_compile(format, planar):
    model = model_of(format)
    for module in model.modules():
        if planar and isinstance(module, PackedLinear):
            module.use_planar_form()
            assert module.is_planar
    expected = GraphDecoder(model, 32).generate(PROMPT, 4)
    torch._dynamo.reset()
    decoder = GraphDecoder(model, 32)
    decoder.steps.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(decoder.generate(PROMPT, 4), expected)


@pytest.mark.slow
def test_generate_compiles_the_step_of_a_packed_folder(tmp_path):
    """transformers compiles on a static cache if the quantizer allows it; on a CPU it has to be told to."""
    folder = pack_folder(tiny_model("llama", tmp_path / "model"), tmp_path).packed
    model = load(folder, dtype="float32")
    ids = torch.arange(20, 28)[None]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters
    counts.clear()
    found = model.generate(ids, **options, cache_implementation="static", compile_config=compiled)
    assert torch.equal(found, expected)
    assert counts["stats"]["unique_graphs"] >= 1
    assert not counts["graph_break"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("default")  # torch's compiler warns of its own imports, advice and empty graphs
def test_generate_on_a_static_cache_on_a_gpu(tmp_path):
    model = load(pack_folder(tiny_model("llama", tmp_path / "model"), tmp_path).packed, device="cuda", dtype="float32")
    ids = torch.arange(20, 28, device="cuda")[None]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fastest_decoder_of_every_family(family, tmp_path):
    folder = pack_folder(tiny_model(family, tmp_path / "model"), tmp_path).packed
    model = load(folder, device="cuda", dtype="float32")
    ids = torch.arange(20, 29)[None]
    expected = reference_from(model, ids, 40)
    decoder = fastest_decoder(model, 64)
    assert (decoder is None) == (family in ("opt", "qwen3_moe"))
    if decoder is not None:
        assert isinstance(decoder.steps, StaticSteps) == (family not in ("llama", "mistral", "qwen2"))
        decoder.prepare()
        for _ in range(2):
            assert torch.equal(decoder.generate(ids, 40), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("format", [None, "int2", "int4", "slim-2", "ptq161", "littlebit-0.55", "casp-4"])
def test_a_graph_replays_the_eager_step_bit_for_bit(format):
    model = random_llama(
        SHAPE | {"intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}, format, "int4"
    )
    eager = GraphDecoder(model, 64)
    eager.prefill(PROMPT)
    graphed = GraphDecoder(model, 64)
    graphed.prepare()
    graphed.prefill(PROMPT)
    for _ in range(20):
        with torch.inference_mode():
            eager._step()
        graphed.step()
        assert torch.equal(eager.token, graphed.token)
        assert torch.equal(eager.logits, graphed.logits)
    again = graphed.generate(PROMPT, 21)
    assert int(again[0, -1]) == int(graphed.token)
