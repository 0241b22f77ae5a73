"""What the policies ask for, how a spec is read, and the choice of salient tokens."""

from __future__ import annotations

import pytest
import torch

from quantkit.algorithms.kv.akvq_vl import pivot_scores
from quantkit.algorithms.kv.coding import encode
from quantkit.algorithms.kv.policy import KvPolicy, fit_transform
from quantkit.algorithms.kv.registry import KV_METHODS, check_head, parse_kv_spec
from quantkit.algorithms.kv.zipcache import most_salient, probe_positions, probe_scores
from quantkit.errors import RequestError
from quantkit.formats.kv_page import GridSpec


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(KV_METHODS))
def test_every_name_is_a_spec(name: str) -> None:
    spec = parse_kv_spec(name)
    policy = spec.layer_policy(0)
    assert policy.name == name
    assert all(policy.window >= 1 and policy.unit % policy.key_group == 0 for _ in policy.bits)


def test_settings() -> None:
    policy = parse_kv_spec(" kivi:bits=4, group=64,rotate=yes ").layer_policy(3)
    assert (policy.bits, policy.keys.group, policy.values.group, policy.rotate_keys) == ((4,), 64, 64, True)
    assert policy.unit == 64
    by_channel = parse_kv_spec("zipcache:key_axis=channel,group=16").layer_policy(0)
    assert by_channel.keys == GridSpec(axis="channel", group=16, offsets=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kiwi", "unknown KV policy 'kiwi'; did you mean 'kivi'\\? known: akvq-vl, fp16, int2, int4, int8, kivi, zip"),
        ("kivi:bit=2", "KV policy kivi: no setting 'bit'; did you mean 'bits'\\? known: bits, group, rotate, window"),
        ("kivi:2", "KV policy kivi: '2' is not a setting; write kivi:setting=value"),
        ("kivi:bits=3", "bits are 2, 4, 8 or 16 \\(not quantized\\), not 3"),
        ("kivi:bits=two", "bits is a whole number, not 'two'"),
        ("kivi:rotate=maybe", "rotate is true or false, not 'maybe'"),
        ("kivi:group=48", "a group of keys is 1, 2, 4, ... or 128 tokens, not 48"),
        ("kivi:window=0", "window is at least 1"),
        ("int4:group=-1", "group is a number of channels"),
        ("zipcache:share=1.5", "share is from 0 to 1, not 1.5"),
        ("zipcache:share=lots", "share is a number, not 'lots'"),
        ("zipcache:key_axis=row", "key_axis is token or channel, not 'row'"),
        ("akvq-vl:clip=0,symmetric=no", "clip is above 0 and at most 1"),
        ("akvq-vl:text_bits=5", "bits are 2, 4, 8 or 16"),
        ("fp16:bits=2", "KV policy fp16: no setting 'bits'; it has none"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_kv_spec(text)


def test_groups_must_divide_the_head() -> None:
    with pytest.raises(RequestError, match="group 24 does not divide the head dimension 64; use a divisor of 64"):
        check_head(parse_kv_spec("int4:group=24").layer_policy(0), 64)
    check_head(parse_kv_spec("kivi").layer_policy(0), 16)  # a head that is smaller than the group is one group


def test_text_salient_layers_exist_only_where_images_do() -> None:
    spec = parse_kv_spec("akvq-vl:text_layers=1")
    assert spec.layer_policy(0, sees_images=True).bits == (4, 2)
    assert spec.layer_policy(0, sees_images=True).salience == "text"
    for policy in (spec.layer_policy(1, sees_images=True), spec.layer_policy(0)):
        assert policy.bits == (2,)
        assert policy.salience == "pivots"


def transforms() -> dict[str, KvPolicy]:
    return {
        "rotate": KvPolicy(name="x", bits=(2,), rotate_keys=True, rotate_values=True),
        "centre": KvPolicy(name="x", bits=(2,), centre=0.0),
        "all": KvPolicy(name="x", bits=(2,), rotate_keys=True, rotate_values=True, centre=0.0, channel_scales=True),
    }


@pytest.mark.parametrize("name", ["rotate", "centre", "all"])
def test_a_transform_changes_no_attention(name: str) -> None:
    keys, values, query = 3 + normal(2, 40, 16), normal(2, 40, 16, seed=1), normal(2, 3, 16, seed=2)
    transform = fit_transform(transforms()[name], keys[:, :20].half(), values[:, :20].half())
    expected = (query @ keys.mT).softmax(-1) @ values
    inner, shift = transform.query(query)
    scores = inner @ transform.keys(keys).mT + (0 if shift is None else shift[..., None])
    assert torch.allclose(scores, query @ keys.mT, atol=1e-4)
    output = transform.original_values(scores.softmax(-1) @ transform.values(values))
    assert torch.allclose(output, expected, atol=1e-5)
    assert torch.allclose(transform.original_keys(transform.keys(keys)), keys, atol=1e-5)


def test_only_heads_with_a_large_offset_are_centred() -> None:
    keys = normal(2, 64, 16)
    keys[1] += 5  # squared mean 400, variance 16
    transform = fit_transform(KvPolicy(name="x", bits=(2,), centre=4.0), keys.half(), keys.half())
    assert not transform.key_mean[0].any()
    assert torch.allclose(transform.key_mean[1].float(), keys[1, 1:].mean(0), atol=0.01)


def test_probe_scores_of_all_rows_are_the_mean_attention() -> None:
    query, keys = normal(2, 3, 20, 8), normal(2, 20, 8, seed=1)
    total, seen = probe_scores(query, keys, torch.arange(20))
    scores = torch.einsum("hgqd,hkd->hgqk", query, keys)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    attention = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    assert torch.allclose(total, attention.sum((0, 1, 2)), atol=1e-5)
    assert torch.equal(seen, 6.0 * torch.arange(20, 0, -1))


def test_probe_scores_do_not_depend_on_the_tiles() -> None:
    query, keys, positions = normal(2, 1, 100, 8), normal(2, 300, 8, seed=1), torch.arange(200, 300)
    total, _ = probe_scores(query, keys, positions)
    halves = [probe_scores(query[:, :, half], keys, positions[half])[0] for half in (slice(0, 50), slice(50, 100))]
    assert torch.allclose(total, halves[0] + halves[1], atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 20, 1000, 20000])
def test_probe_positions(n: int) -> None:
    positions = probe_positions(n)
    assert len(positions.unique()) == len(positions) <= 512
    assert positions[-1] == n - 1
    assert torch.equal(positions, positions.sort().values)
    recent = min(n, 256, max(8, -(-n // 20)))
    assert torch.equal(positions[-recent:], torch.arange(n - recent, n))


def test_heavy_columns_are_found_whatever_their_position() -> None:
    """The normalized score finds planted tokens, early or late; the plain sum prefers early ones."""
    keys = 0.1 * normal(1, 400, 16)
    query = normal(1, 2, 400, 16, seed=1) + 3
    planted = [3, 150, 330]
    keys[:, planted] += 0.4
    positions = probe_positions(400)
    total, seen = probe_scores(query[:, :, positions], keys, positions)
    found = most_salient(total / seen.clamp_min(1), 3).nonzero().squeeze(1).tolist()
    assert found == planted


def test_most_salient_prefers_the_earlier_of_equals() -> None:
    assert most_salient(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [False, True, True, False]
    assert not most_salient(torch.tensor([1.0]), 0).any()


def test_pivot_scores_follow_the_mean_query() -> None:
    keys = normal(2, 30, 8)
    keys[:, 7] = 4.0
    scores = pivot_scores(keys, torch.full((2, 3, 8), 1.0))
    assert int(scores.argmax()) == 7
    by_hand = torch.log(6 * torch.exp(torch.tensor(32.0)))
    assert float(scores[7]) == pytest.approx(float(by_hand), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_centring_and_rotation_pay_where_keys_have_large_offsets(seed: int) -> None:
    """Three channels with offsets, two bits: the error of attention's output falls with each of the two."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, 400, 64, generator=generator)
    keys[..., [3, 17, 40]] += torch.tensor([12.0, -9.0, 15.0])
    query = torch.randn(1, 50, 64, generator=generator) / 4
    errors = []
    for rotated, centre in ((False, None), (True, None), (True, 4.0)):
        policy = KvPolicy(name="x", bits=(2,), rotate_keys=rotated, centre=centre)
        transform = fit_transform(policy, keys[:, :64].half(), values[:, :64].half())
        coded = encode(transform.keys(keys), 2, GridSpec(group=64))
        decoded = (coded.codes.float() - 1.5) * coded.scales.float().transpose(1, 2)
        found = (query @ transform.original_keys(decoded).mT).softmax(-1) @ values
        expected = (query @ keys.mT).softmax(-1) @ values
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.7 * errors[1]
