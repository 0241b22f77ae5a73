"""One layer of one sequence: which tokens are where, that coding happens once, and attention on pages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import law

from quantkit.algorithms.kv.registry import parse_kv_spec
from quantkit.formats.kv_page import PAGE
from quantkit.kernels.kv_attention import attend, attend_pages, merge
from quantkit.runtime.kv_segment import PackedSegment
from quantkit.runtime.kv_sequence import SequenceCache

HEADS, GROUP, DIM = 2, 2, 32
SPECS = ["int2", "int4:rotate=yes", "int8", "kivi:window=32", "kivi:group=16,window=20", "akvq-vl", "akvq-vl:pivots=0"]
SPECS += ["akvq-vl:symmetric=no,centre=0", "zipcache:share=0", "zipcache:share=0,key_axis=channel"]


def cache(spec: str, sees_images: bool = False) -> SequenceCache:
    policy = parse_kv_spec(spec).layer_policy(0, sees_images)
    return SequenceCache(policy, HEADS, DIM, torch.float16, torch.device("cpu"))


def tokens(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, HEADS, n, DIM, generator=generator)
    keys[:, 0] *= 5
    return keys * torch.linspace(0.2, 3, DIM), values, torch.randn(HEADS, GROUP, n, DIM, generator=generator) / 4


def feed(
    sequence: SequenceCache, data: tuple[torch.Tensor, ...], sizes: list[int], images: list[bool] | None = None
) -> None:
    keys, values, query = data
    start = sequence.length
    for size in sizes:
        here = slice(start, start + size)
        marks = None if images is None else images[here]
        sequence.append(keys[:, here], values[:, here], query[:, :, here], marks)
        start += size


def stored(sequence: SequenceCache) -> dict[str, torch.Tensor]:
    held = {"floats.keys": sequence.floats.dense()[0], "floats.values": sequence.floats.dense()[1]}
    for index, segment in enumerate(sequence.segments):
        assert isinstance(segment, PackedSegment)
        n_pages = -(-segment.count // PAGE)
        for name, (_, shape) in segment.spec.layout(n_pages).items():
            tensor = segment.tensors[name]
            held[f"{index}.{name}"] = tensor[tuple(slice(0, size) for size in shape)]
    return held


@pytest.mark.parametrize("spec", SPECS)
def test_token_by_token_or_all_at_once_the_same_bytes(spec: str) -> None:
    data = tokens(300)
    one, all_at_once, mixed = cache(spec), cache(spec), cache(spec)
    feed(one, data, [1] * 300)
    feed(all_at_once, data, [300])
    feed(mixed, data, [100, 1, 1, 131, 67])
    expected = stored(one)
    for other in (all_at_once, mixed):
        held = stored(other)
        assert held.keys() == expected.keys()
        assert all(torch.equal(held[name], expected[name]) for name in expected)
        assert other.floats.positions == one.floats.positions
        assert [s.positions for s in other.segments] == [s.positions for s in one.segments]


@law
@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.sampled_from([*SPECS, "zipcache:share=0.3"]))
def test_every_token_is_in_one_place_and_the_newest_in_16_bits(sizes: list[int], spec: str) -> None:
    sequence = cache(spec)
    n = sum(sizes)
    feed(sequence, tokens(n), sizes)
    places = [sequence.floats.positions, *(segment.positions for segment in sequence.segments)]
    assert sorted(position for place in places for position in place) == list(range(n))
    window = min(n, sequence.policy.window)
    assert sequence.floats.positions[len(sequence.floats.positions) - window :] == list(range(n - window, n))
    assert sequence.n_recent < sequence.policy.window + sequence.policy.unit
    assert all(segment.positions == sorted(segment.positions) for segment in sequence.segments)


@pytest.mark.parametrize("spec", SPECS)
def test_full_pages_never_change(spec: str) -> None:
    data = tokens(600)
    sequence = cache(spec)
    feed(sequence, data, [250])
    segment = sequence.segments[-1]
    before = {name: tensor.clone() for name, tensor in stored(sequence).items() if "words" in name or "scales" in name}
    feed(sequence, data, [1] * 200 + [150])
    after = stored(sequence)
    whole = segment.spec.key_group if hasattr(segment.spec, "key_group") else 1
    assert whole == 1
    n_full = 1  # 250 tokens less the window fill at least one page
    for name, old in before.items():
        if "words" in name:
            assert torch.equal(after[name][:, :n_full], old[:, :n_full])
        elif after[name].shape[-1] != DIM:
            assert torch.equal(after[name][..., :PAGE], old[..., :PAGE])


@pytest.mark.parametrize("spec", [*SPECS, "zipcache:share=0.3", "zipcache:share=0.3,key_axis=channel"])
def test_attention_on_pages_is_attention_on_the_decoded_cache(spec: str) -> None:
    sequence = cache(spec)
    data = tokens(333)
    feed(sequence, data, [300, *[1] * 33])
    query = data[2][:, :, -1].contiguous()
    part = sequence.attend(query)
    keys, values = sequence.dense()
    assert keys.shape == (HEADS, 333, DIM)
    expected = attend(query, keys, values)
    assert torch.allclose(part.output, expected.output, atol=2e-5)
    assert torch.allclose(part.lse, expected.lse, atol=2e-5)


@pytest.mark.parametrize(
    "spec", ["akvq-vl:bits=16", "zipcache:high=16,low=16", "kivi:bits=16", "int4:bits=16,rotate=yes"]
)
def test_without_quantization_only_rounding_to_16_bits_is_left(spec: str) -> None:
    """Keys and values are rounded twice at most (before and after the transform): 2 * 2^-11 of the largest element."""
    sequence = cache(spec)
    data = tokens(200)
    feed(sequence, data, [200])
    for held, original in zip(sequence.dense(), data, strict=False):
        assert float((held - original).abs().max()) <= 2 * 2**-11 * float(original.norm(dim=-1).max())


def test_the_merge_of_parts_is_one_softmax() -> None:
    keys, values, queries = tokens(100)
    query = queries[:, :, 0].contiguous()
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    for cuts in ([100], [1, 99], [30, 30, 40]):
        parts = [attend(query, keys[:, index], values[:, index]) for index in order.split(cuts)]
        merged = merge(parts)
        whole = attend(query, keys, values)
        assert torch.allclose(merged.output, whole.output, atol=1e-5)
        assert torch.allclose(merged.lse, whole.lse, atol=1e-5)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    keys, values, queries = tokens(4)
    query = queries[:, :, 0].contiguous()
    part = attend(query, keys, values, torch.tensor([[True] * 4, [False] * 4]))
    assert not part.output[:, 1].any()
    assert (part.lse[:, 1] == float("-inf")).all()
    merged = merge([part, attend(query, keys, values)])
    assert torch.allclose(merged.output[:, 1], attend(query, keys, values).output[:, 1])


@pytest.mark.parametrize("spec", [*SPECS, "zipcache:share=0.25"])
def test_the_bytes_reported_are_the_bytes_allocated(spec: str) -> None:
    """Every tensor that a cache holds, found by looking at it, and the formula of the pages."""
    sequence = cache(spec)
    feed(sequence, tokens(700), [500, *[1] * 200])
    found: dict[int, int] = {}

    def collect(item: object) -> None:
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict | list | tuple):
            for each in item.values() if isinstance(item, dict) else item:
                collect(each)
        elif hasattr(item, "__dict__") or hasattr(item, "__slots__"):
            names = list(getattr(item, "__dict__", {})) or list(getattr(item, "__slots__", ()))
            for name in names:
                collect(getattr(item, name))

    collect(sequence)
    assert sequence.nbytes == sum(found.values())
    for segment in sequence.segments:
        n_pages = segment.tensors["key_words"].shape[1]
        assert segment.nbytes == n_pages * segment.spec.page_bytes()
        assert n_pages <= -(-segment.count // PAGE) + max(0, n_pages // 64)


@pytest.mark.parametrize(("n", "ratio"), [(2000, 5.0), (8000, 6.5)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_two_bits_are_small(n: int, ratio: float, head_dim: int) -> None:
    """AKVQ-VL at its defaults against bf16, all that is allocated, at two lengths."""
    policy = parse_kv_spec("akvq-vl").layer_policy(0)
    sequence = SequenceCache(policy, 4, head_dim, torch.float16, torch.device("cpu"))
    for start in range(0, n, 500):
        x = torch.randn(4, 500, head_dim, generator=torch.Generator().manual_seed(start))
        sequence.append(x, x, x[:, None])
    assert sequence.length == n
    assert n * 4 * head_dim * 4 / sequence.nbytes >= ratio


@pytest.mark.parametrize("spec", [*SPECS, "zipcache:share=0.25"])
@pytest.mark.parametrize("keep", [299, 280, 261, 100, 33, 1, 0])
def test_truncation(spec: str, keep: int) -> None:
    """What remains decodes as before; appending goes on, and earlier pages keep their bytes."""
    data = tokens(400)
    sequence = cache(spec)
    feed(sequence, data, [300])
    before = sequence.dense()
    sequence.truncate(keep)
    assert sequence.length == keep
    places = [sequence.floats.positions, *(segment.positions for segment in sequence.segments)]
    assert sorted(position for place in places for position in place) == list(range(keep))
    for now, then in zip(sequence.dense(), before, strict=True):
        tolerance = 2**-10 * float(then.abs().max())  # tokens of a group that was cut are rounded to 16 bits
        assert torch.allclose(now, then[:, :keep], atol=tolerance)
    feed(sequence, data, [400 - keep])
    assert sequence.length == 400
    for now, then in zip(sequence.dense(), data, strict=False):
        newest = slice(400 - sequence.policy.window, 400)
        assert torch.allclose(now[:, newest], then[:, newest], atol=2**-10 * float(then.abs().max()))
    query = data[2][:, :, 0].contiguous()
    assert torch.allclose(sequence.attend(query).output, attend(query, *sequence.dense()).output, atol=2e-5)


def test_truncation_within_the_window_leaves_no_trace() -> None:
    """Draft tokens that are rejected: the same bytes as if they had never been there."""
    data = tokens(300)
    plain, drafted = cache("akvq-vl"), cache("akvq-vl")
    feed(plain, data, [280])
    feed(drafted, data, [260])
    keys, values, query = tokens(30, seed=1)
    drafted.append(keys[:, :20], values[:, :20], query[:, :, :20])
    drafted.truncate(260)
    feed(drafted, data, [20])
    expected, held = stored(plain), stored(drafted)
    assert all(torch.equal(held[name], expected[name]) for name in expected)


def test_kernels_are_handed_new_tensors_when_pages_are_added() -> None:
    """What was handed out stays as it was, so that a decoder sees that it has to bind the new ones."""
    sequence = SequenceCache(parse_kv_spec("akvq-vl").layer_policy(0), 2, 64, torch.float16, torch.device("cpu"))
    keys = torch.randn(2, 200, 64, generator=torch.Generator().manual_seed(0))
    sequence.append(keys, keys)
    before = sequence.packed()
    held, count = before.pages[0].tensors["key_words"], before.pages[0].count
    sequence.append(keys, keys)
    after = sequence.packed()
    assert before.pages[0].tensors["key_words"] is held
    assert before.pages[0].count == count < after.pages[0].count


def test_a_clone_goes_its_own_way() -> None:
    data = tokens(200)
    first = cache("zipcache")
    feed(first, data, [150])
    before = {name: tensor.clone() for name, tensor in stored(first).items()}
    second = first.clone()
    feed(second, data, [50])
    assert second.length == 200
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored(first).items())


def test_text_salient_layers_keep_text_at_four_bits_and_images_at_two() -> None:
    sequence = cache("akvq-vl", sees_images=True)
    images = [20 <= i < 120 for i in range(200)]
    feed(sequence, tokens(200), [150, *[1] * 50], images)
    text, image = sequence.segments
    assert (text.spec.bits, image.spec.bits) == (4, 2)
    assert all(not images[position] for position in text.positions)
    assert all(images[position] for position in image.positions)
    assert image.count == 100


def test_pivots_stay_in_16_bits() -> None:
    """A key that all queries look at is found wherever it is, the first token always."""
    keys, values, query = tokens(300)
    query += 1
    keys[:, [40, 170]] = 5.0
    sequence = cache("akvq-vl:pivots=3")
    feed(sequence, (keys, values, query), [300])
    pinned = sequence.floats.positions[: sequence.n_pinned]
    assert {0, 40, 170} <= set(pinned)
    assert len(pinned) <= 6


def test_salient_tokens_get_more_bits() -> None:
    keys, values, query = tokens(400)
    query += 1
    keys[:, [40, 170, 300]] = 3.0
    sequence = cache("zipcache:share=0.05")
    feed(sequence, (keys, values, query), [400])
    high = sequence.segments[0]
    assert high.spec.bits == 4
    assert {40, 170, 300} <= set(high.positions)
    assert high.count == round(0.05 * (high.count + sequence.segments[1].count))


def test_tokens_of_the_decode_are_judged_by_the_attention_they_get() -> None:
    """One by one: the probes among the queries credit the tokens that are still in the window."""
    keys, values, query = tokens(300)
    query += 1
    keys[:, [100, 205]] = 2.0
    sequence = cache("zipcache:share=0.05")
    for position in range(300):
        here = slice(position, position + 1)
        sequence.append(keys[:, here], values[:, here], query[:, :, here])
        rows = query[:, :, position].contiguous()
        sequence.probe(rows, 1.0, sequence.attend(rows).lse)
    assert {100, 205} <= set(sequence.segments[0].positions)


def test_a_step_allocates_nothing_of_the_size_of_the_history() -> None:
    """Decoding works on 1024 tokens at a time; 16 pages of history are twice that."""
    sequence = cache("int2")
    feed(sequence, tokens(4096 + 40), [4096 + 40])
    segment = sequence.segments[0]
    assert isinstance(segment, PackedSegment)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not result._is_view():
                largest = max(largest, result.nbytes)
            return result

    with Watch():
        attend_pages(torch.randn(HEADS, GROUP, DIM), segment.spec, segment.tensors, segment.count)
    assert 0 < largest <= HEADS * 1024 * DIM * 4
    assert largest < HEADS * segment.count * DIM * 2
