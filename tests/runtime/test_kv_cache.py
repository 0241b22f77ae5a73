"""The KV cache in transformers models: identities, everything that `generate` needs, and what is refused."""

from __future__ import annotations

from functools import cache as memoize

import pytest
import torch
from tiny_models import build, build_llava
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import quantkit
from quantkit.errors import RequestError
from quantkit.runtime.kv_cache import ATTENTION, KvCache
from quantkit.runtime.kv_layer import QuantizedKvLayer

OFF = ["fp16", "akvq-vl:bits=16", "zipcache:high=16,low=16", "kivi:bits=16"]
ON = ["akvq-vl:window=8", "zipcache:window=8", "kivi:window=8", "int4:window=8"]
FAMILIES = ["llama", "qwen3", "gemma3", "mistral", "phi3", "opt", "gpt_neox", "qwen3_moe"]


@memoize
def model(family: str):
    return build_llava() if family == "llava" else build(family)


def ids(batch: int = 2, n: int = 120, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, 260, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits(family: str, cache: object, tokens: torch.Tensor, *, chunks: tuple[int, ...] = (80, 15), **extra: object):
    """Logits of a prompt, of a second turn, then one by one."""
    parts, start = [], 0
    for size in (*chunks, *[1] * (tokens.shape[1] - sum(chunks))):
        here = tokens[:, start : start + size]
        parts.append(model(family)(input_ids=here, past_key_values=cache, **extra).logits)
        start, extra = start + size, {}
    return torch.cat(parts, 1)


@pytest.mark.parametrize("spec", OFF)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_quantization_off_the_logits_are_the_stock_caches(family: str, spec: str) -> None:
    """float32 storage: what remains is float32 rounding of the transforms and of another order of sums."""
    expected = logits(family, DynamicCache(config=model(family).config), ids())
    cache = quantkit.kv_cache(model(family), spec, dtype=torch.float32)
    assert cache.reason is None
    found = logits(family, cache, ids())
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def image_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(2, 3, 28, 28, generator=generator)}


def llava_ids() -> torch.Tensor:
    tokens = ids(2, 110)
    tokens[:, 3:7] = 270  # four image tokens
    return tokens


@pytest.mark.parametrize("spec", OFF)
def test_the_same_with_images(spec: str) -> None:
    expected = logits("llava", DynamicCache(config=model("llava").config), llava_ids(), **image_inputs())
    cache = quantkit.kv_cache(model("llava"), spec, dtype=torch.float32)
    found = logits("llava", cache, llava_ids(), **image_inputs())
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_images_are_known_to_text_salient_layers() -> None:
    cache = quantkit.kv_cache(model("llava"), "akvq-vl:text_layers=1,window=8")
    logits("llava", cache, llava_ids(), **image_inputs())
    for sequence in cache.layers[0].sequences:
        text, image = sequence.segments
        assert image.positions == [3, 4, 5, 6]
        assert text.count == 110 - 4 - sequence.n_recent
    assert cache.layers[1].policy.salience == "pivots"


def test_rounding_to_16_bits_is_all_that_float16_storage_costs() -> None:
    expected = logits("llama", DynamicCache(config=model("llama").config), ids())
    found = logits("llama", quantkit.kv_cache(model("llama"), "fp16"), ids())
    assert 0 < float((found - expected).norm() / expected.norm()) <= 2**-9


@pytest.mark.parametrize("spec", ON)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_packed_attention_is_attention_on_dequantized_tensors(family: str, spec: str) -> None:
    """The handle against the fallback, which hands decoded tensors to the model's own attention."""
    if spec.startswith(("akvq", "zipcache")):  # only the attention function sees queries; without them salience differs
        spec = {"akvq": "akvq-vl:window=8,pivots=0", "zipc": "zipcache:window=8,share=0"}[spec[:4]]
    packed = quantkit.kv_cache(model(family), spec)
    dense = quantkit.kv_cache(model(family), spec, packed=False)
    assert dense.reason == "packed=False was asked for"
    one, other = logits(family, packed, ids(), chunks=(80,)), logits(family, dense, ids(), chunks=(80,))
    # Dense, a step sees tokens that packed have just left the window, so compare where both have the same pages.
    assert packed.nbytes == dense.nbytes
    for first, second in zip(packed.layers, dense.layers, strict=True):
        if isinstance(first, QuantizedKvLayer):
            assert [s.length for s in first.sequences] == [s.length for s in second.sequences]
    step = slice(80, 81)
    assert torch.allclose(one[:, step], other[:, step], atol=0.2 * float(other.std()))
    assert torch.equal(one[:, :80], other[:, :80])


def generate(family: str, cache: object, **options: object) -> torch.Tensor:
    tokens = ids(2, 90)
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        return model(family).generate(input_ids=tokens, past_key_values=cache, **(settings | options))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generate(family: str, options: dict) -> None:
    stock = generate(family, DynamicCache(config=model(family).config), **options)
    off = generate(family, quantkit.kv_cache(model(family), "fp16", dtype=torch.float32), **options)
    assert torch.equal(stock, off)


def test_generate_from_the_cache_of_an_earlier_call() -> None:
    """A prompt in inference mode, then `generate`, which runs in another mode."""
    tokens = ids(1, 90)
    caches = [
        DynamicCache(config=model("llama").config),
        quantkit.kv_cache(model("llama"), "fp16", dtype=torch.float32),
    ]
    outputs = []
    for cache in caches:
        with torch.inference_mode():
            model("llama")(input_ids=tokens[:, :60], past_key_values=cache)
        options = {
            "attention_mask": torch.ones_like(tokens),
            "max_new_tokens": 5,
            "do_sample": False,
            "pad_token_id": 0,
        }
        outputs.append(model("llama").generate(input_ids=tokens, past_key_values=cache, **options))
    assert torch.equal(*outputs)


def test_generate_with_prompt_lookup_drafts() -> None:
    """Assisted decoding crops the cache."""
    tokens = ids(1, 30).repeat(1, 3)
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    outputs = []
    for options in ({}, {"prompt_lookup_num_tokens": 4}):
        cache = quantkit.kv_cache(model("llama"), "int8:window=16")
        with torch.inference_mode():
            outputs.append(model("llama").generate(input_ids=tokens, past_key_values=cache, **settings, **options))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("spec", ["fp16", *ON])
def test_left_padding_is_never_stored(spec: str) -> None:
    """A padded row gives the logits of the row alone, and the same pages."""
    tokens = ids(2, 100)
    padding = 13
    tokens[1, :padding] = 0
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    both = quantkit.kv_cache(model("llama"), spec)
    alone = quantkit.kv_cache(model("llama"), spec)
    with torch.inference_mode():
        start, parts, single = 0, [], []
        for stop in (70, 80, *range(81, 101)):
            here = slice(start, stop)
            arguments = {"attention_mask": mask[:, :stop], "position_ids": positions[:, here], "past_key_values": both}
            parts.append(model("llama")(input_ids=tokens[:, here], **arguments).logits[1])
            own = slice(max(padding, start), stop)
            single.append(model("llama")(input_ids=tokens[1:, own], past_key_values=alone).logits[0])
            start = stop
    found, expected = torch.cat(parts)[padding:], torch.cat(single)
    assert both.layers[0].sequences[1].length == 100 - padding == alone.layers[0].sequences[0].length
    # Layer 1 sees sums in another order, so codes may differ by a step where a value lies between two: not in layer 0.
    assert torch.allclose(found[:70], expected[:70], atol=1e-4)
    for one, other in zip(both.layers[0].sequences[1].segments, alone.layers[0].sequences[0].segments, strict=True):
        assert one.positions == other.positions


def test_a_mask_that_hides_what_was_visible_is_refused() -> None:
    cache = quantkit.kv_cache(model("llama"), "int4")
    tokens = ids(1, 60)
    model("llama")(input_ids=tokens, past_key_values=cache)
    mask = torch.ones(1, 61, dtype=torch.long)
    mask[0, 5] = 0
    with pytest.raises(RequestError, match="the attention mask hides tokens that were visible before"):
        model("llama")(input_ids=tokens[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_a_batch_move_repeat_and_go(packed: bool) -> None:
    cache = quantkit.kv_cache(model("llama"), "int4:window=8", packed=packed)
    tokens = ids(3, 60)
    logits("llama", cache, tokens, chunks=(60,))
    layer = cache.layers[1]
    rows = [sequence.dense()[0] for sequence in layer.sequences]

    def held() -> list[torch.Tensor]:
        return [sequence.dense()[0] for sequence in layer.sequences]

    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert all(torch.equal(a, rows[i]) for a, i in zip(held(), [2, 0, 0], strict=True))
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert all(torch.equal(a, rows[i]) for a, i in zip(held(), [2, 0], strict=True))
    cache.batch_repeat_interleave(2)
    assert all(torch.equal(a, rows[i]) for a, i in zip(held(), [2, 2, 0, 0], strict=True))
    assert len({id(sequence) for sequence in layer.sequences}) == 4
    cache.crop(-20)
    assert cache.get_seq_length() == 40
    assert all(a.shape[1] == 40 for a in held())
    cache.reset()
    assert cache.get_seq_length() == 0 == cache.nbytes
    logits("llama", cache, tokens, chunks=(60,))
    assert all(torch.equal(a, b) for a, b in zip(held(), rows, strict=True))
    with pytest.raises(ValueError, match="negative number"):
        layer.crop(5)


def test_a_sequence_has_the_same_bytes_alone_and_in_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, 2, 100, 16, generator=generator)
    layers = []
    for rows in (slice(None), slice(1, 2)):
        layer = quantkit.kv_cache(model("llama"), "akvq-vl", packed=False).layers[0]
        layer.update(keys[rows], values[rows])
        layers.append(layer)
    one, alone = layers[0].sequences[1], layers[1].sequences[0]
    for name, tensor in alone.segments[0].tensors.items():
        assert torch.equal(one.segments[0].tensors[name], tensor)


def test_hybrid_models_keep_the_stock_cache_in_sliding_layers() -> None:
    cache = quantkit.kv_cache(model("gemma3"), "akvq-vl")
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, QuantizedKvLayer]
    logits("gemma3", cache, ids(1, 100))
    sliding = cache.layers[0]
    assert cache.nbytes == sliding.keys.nbytes + sliding.values.nbytes + cache.layers[1].nbytes


def test_models_that_a_handle_cannot_serve_get_tensors_and_say_so() -> None:
    gemma2 = build("gemma2")
    cache = quantkit.kv_cache(gemma2, "int8")
    assert cache.reason == "gemma2 caps its attention scores"
    assert gemma2.config._attn_implementation != ATTENTION
    with pytest.raises(RequestError, match="gemma2 caps its attention scores; pass packed=False"):
        quantkit.kv_cache(gemma2, "int8", packed=True)
    tokens = ids(1, 100)
    with torch.inference_mode():
        stock = DynamicCache(config=gemma2.config)
        a = [gemma2(input_ids=part, past_key_values=stock).logits for part in tokens.split([90, *[1] * 10], 1)]
        b = [gemma2(input_ids=part, past_key_values=cache).logits for part in tokens.split([90, *[1] * 10], 1)]
    assert torch.equal(a[0], b[0])
    difference = torch.cat(a[1:], 1) - torch.cat(b[1:], 1)
    assert 0 < float(difference.norm() / torch.cat(a[1:], 1).norm()) < 0.05


def test_the_model_serves_other_caches_as_before() -> None:
    """The attention function that takes handles passes ordinary tensors on: bit for bit."""
    fresh = build("llama")
    tokens = ids(2, 40)
    with torch.inference_mode():
        before = fresh(input_ids=tokens).logits
        quantkit.kv_cache(fresh, "int4")
        assert torch.equal(fresh(input_ids=tokens).logits, before)
        assert torch.equal(fresh(input_ids=tokens, past_key_values=DynamicCache()).logits, before)


def test_scores_that_pages_cannot_give_are_refused() -> None:
    from quantkit.runtime.kv_layer import attention

    layer = quantkit.kv_cache(model("llama"), "int4").layers[0]
    x = torch.randn(1, 2, 5, 16)
    handle, _ = layer.update(x, x)
    with pytest.raises(RequestError, match="this model's attention uses softcap; make the cache with packed=False"):
        attention(model("llama"), x, handle, handle, None, softcap=50.0)


def test_other_kinds_of_layers_are_refused() -> None:
    other = build("gemma3")
    other.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(RequestError, match="layer 0 has linear_attention; only full and sliding attention"):
        quantkit.kv_cache(other)


def test_an_unknown_policy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RequestError, match="unknown KV policy 'akvq'; did you mean 'akvq-vl'"):
        quantkit.kv_cache(model("llama"), "akvq")


def test_the_image_hook_ends_with_the_cache() -> None:
    llava = build_llava()
    cache = quantkit.kv_cache(llava, "akvq-vl")
    assert isinstance(cache, KvCache)
    assert len(llava._forward_pre_hooks) == 1
    del cache
    assert len(llava._forward_pre_hooks) == 0
