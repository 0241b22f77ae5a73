"""The decode kernels and the cache on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from kv_caches import filled, reference
from tiny_models import build

import quantkit
from quantkit.algorithms.kv.registry import parse_kv_spec
from quantkit.kernels.kv_decode import DecodeConfig, Decoder, decode
from quantkit.runtime.kv_sequence import SequenceCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),
]


def run(case, **options):
    return decode(case.query, case.scaling, case.cache, **options)


def attention_on_decoded(sequence, query, scaling):
    keys, values = (x.double() for x in sequence.dense())
    return (query.double() * scaling @ keys.mT).softmax(-1) @ values


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("spec", ["int2", "int4", "int8", "akvq-vl", "akvq-vl:bits=4,centre=0", "zipcache:share=0.3"])
def test_against_attention_on_decoded_tokens(spec, group, head_dim):
    for n in (65, 161, 3000):
        case = filled(spec, n=n, heads=2, group=group, head_dim=head_dim, device="cuda")
        part = run(case)
        output, lse = reference(case)
        assert torch.allclose(part.lse.double(), lse, atol=8e-3)
        assert float((part.output - output).norm() / output.norm()) <= 3e-3


@pytest.mark.parametrize("spec", ["akvq-vl", "int4"])
def test_heads_of_256_channels(spec):
    case = filled(spec, n=1000, heads=2, group=4, head_dim=256, device="cuda")
    part = run(case)
    output, lse = reference(case)
    assert torch.allclose(part.lse.double(), lse, atol=8e-3)
    assert float((part.output - output).norm() / output.norm()) <= 3e-3


@pytest.mark.parametrize("spec", ["akvq-vl", "int4"])
@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize("splits", [1, 7, 64])
def test_any_launch_shape(spec, warps, splits):
    case = filled(spec, n=2000, group=8, head_dim=128, device="cuda")
    part = run(case, config=DecodeConfig(splits=(splits,), warps=warps, stages=2))
    output, _ = reference(case)
    assert float((part.output - output).norm() / output.norm()) <= 3e-3


def test_the_same_call_gives_the_same_bits():
    case = filled("akvq-vl", n=5000, head_dim=128, device="cuda")
    first = run(case)
    for _ in range(50):
        again = run(case)
        assert torch.equal(first.output, again.output)
        assert torch.equal(first.lse, again.lse)


def test_a_graph_replays_at_other_lengths():
    """Lengths are read from the device: what was captured serves shorter histories too."""
    case = filled("int4", n=2000, head_dim=128, device="cuda")
    run(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        part = run(case)
    whole = case.cache.lengths.clone()
    for lengths in ([32, 128], [1, 1000], [int(whole[0]), int(whole[1])], [0, 300]):
        case.cache.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(part.output, run(case).output)
        assert part.output.isfinite().all()


def test_a_graph_takes_in_tokens_one_after_the_other():
    """The count of tokens in 16 bits is on the device, and so is the place of the next one. None leaves the window."""
    case = filled("akvq-vl", n=580, head_dim=128, device="cuda")
    other = filled("akvq-vl", n=580, head_dim=128, device="cuda").sequence
    assert other.n_recent + 12 < 64
    tokens = torch.randn(12, 2, 1, 2, 1, 128, generator=torch.Generator().manual_seed(0)).cuda()
    token, decoder, query = tokens[0].clone(), Decoder(), case.query.view(1, -1, 1, 128)
    decoder.run(case.query, case.scaling, case.cache, new=(token[0], token[1]))  # compiles, and takes one in
    outputs = [other.step(*tokens[0], query, case.scaling)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        part = decoder.run(case.query, case.scaling, case.cache, new=(token[0], token[1]))
    for new in tokens[1:]:
        token.copy_(new)
        graph.replay()
        outputs.append(other.step(*new, query, case.scaling))
        assert torch.equal(part.output.flatten(), outputs[-1].flatten())
    assert len({float(output.sum()) for output in outputs}) == len(tokens)


@pytest.mark.parametrize("spec", ["akvq-vl", "akvq-vl:bits=4,pivots=0", "zipcache:share=0.3", "int4"])
def test_a_step_is_an_append_and_attention(spec):
    """Bit for bit, while tokens leave the window and pages are added."""
    one, two = (filled(spec, n=200, group=4, head_dim=128, device="cuda").sequence for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    for _ in range(170):
        keys, values = torch.randn(2, 1, 2, 1, 128, generator=generator).cuda()
        query = torch.randn(1, 8, 1, 128, generator=generator).cuda()
        found = one.step(keys, values, query, 0.1)
        two.append(keys[0], values[0])
        rows = query.view(2, 4, 128)
        part = two.attend(rows, 0.1)
        two.probe(rows, 0.1, part.lse)
        assert torch.equal(found.flatten(), part.output.flatten())
        output = attention_on_decoded(one, rows, 0.1)
        assert float((part.output - output).norm() / output.norm()) <= 3e-3  # pages that were added are read too
    assert [segment.positions for segment in one.segments] == [segment.positions for segment in two.segments]
    assert one.nbytes == two.nbytes


@pytest.mark.parametrize("spec", ["akvq-vl", "zipcache", "kivi:window=16", "int4:rotate=yes"])
def test_a_model_on_the_gpu_gives_the_cpus_logits(spec):
    """float32 model; codes of keys that differ in the last bit may differ by a step, so the bound is a statistic."""
    tokens = torch.randint(4, 260, (2, 150), generator=torch.Generator().manual_seed(1))
    logits = []
    for device in ("cpu", "cuda"):
        model = build("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=64, hidden_size=64).to(device)
        cache = quantkit.kv_cache(model, spec)
        with torch.inference_mode():
            parts = tokens.to(device).split([120, *[1] * 30], 1)
            logits.append(torch.cat([model(part, past_key_values=cache).logits for part in parts], 1).cpu())
    difference = (logits[0] - logits[1])[:, 120:]
    assert float(difference.norm() / logits[0][:, 120:].norm()) <= 0.05


@pytest.mark.parametrize("spec", ["akvq-vl", "zipcache:share=0", "int4", "kivi:window=32"])
def test_token_by_token_or_all_at_once_the_same_bytes(spec):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 300, 64, generator=generator).cuda()
    query = torch.randn(2, 4, 300, 64, generator=generator).cuda() / 8
    caches = []
    for sizes in ([300], [1] * 300, [100, 60, 140]):
        policy = parse_kv_spec(spec).layer_policy(0)
        sequence, start = SequenceCache(policy, 2, 64, torch.float16, keys.device), 0
        for size in sizes:
            here = slice(start, start + size)
            sequence.append(keys[:, here], values[:, here], query[:, :, here])
            start += size
        caches.append(sequence)
    for other in caches[1:]:
        for one, two in zip(caches[0].segments, other.segments, strict=True):
            assert one.positions == two.positions
            n = min(one.tensors["key_words"].shape[1], two.tensors["key_words"].shape[1])
            assert torch.equal(one.tensors["key_words"][:, :n], two.tensors["key_words"][:, :n])
            assert torch.equal(one.tensors["value_words"][:, :n], two.tensors["value_words"][:, :n])
            assert torch.equal(*(x.tensors["key_scales"].sum(dtype=torch.float64) for x in (one, two)))
