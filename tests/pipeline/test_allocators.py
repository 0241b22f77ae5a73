"""Allocators over blocks and linears: scores, budgets in true bytes, ties, resuming, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import (
    SMALL,
    Events,
    Interrupted,
    StopAfter,
    sha256_of,
    small_request,
    small_run,
)
from tiny_models import N_BLOCKS, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.algorithms.grids import GRIDS
from quantkit.algorithms.layerwise import by_importance, lim, zd
from quantkit.algorithms.luq import by_entropy, histogram_entropy, kmeans_entropy
from quantkit.algorithms.rtn import rtn
from quantkit.calib.datasets import load_calibration
from quantkit.errors import RequestError
from quantkit.formats.checkpoint import open_folder
from quantkit.formats.files import read_json, write_json
from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.models.skeleton import Skeleton
from quantkit.models.structure import Block, Linear
from quantkit.pipeline import default_output, dry_run
from quantkit.pipeline.budget import Choice, budget_of, bytes_at, units_of
from quantkit.pipeline.journal import work_folder
from quantkit.recipe import Recipe, recipe_from_json, resolve

N = 4
ROUNDED = ("solver=rtn", "grid=minmax")  # where only the allocation is looked at


@pytest.fixture(scope="module")
def llama(models: Path) -> Path:
    return tiny_model("llama", models, num_hidden_layers=N)


@pytest.fixture(scope="module")
def hidden_states(llama: Path, text: Path) -> list[Tensor]:
    """What enters block 0, ..., leaves block N - 1 in the original model: the oracle's [n_samples, seq_len, hidden]."""
    calibration = load_calibration(
        str(text), tiny_tokenizer(), n_samples=SMALL["n_samples"], seq_len=SMALL["seq_len"], vocab_size=288
    )
    model = AutoModelForCausalLM.from_pretrained(llama)
    states: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0])))
    with torch.no_grad():
        model(calibration.input_ids)
    return states


def run(llama: Path, output: Path, text: Path, *settings: str, method: str = "rtn", **options: Any) -> dict[str, Any]:
    """Quantize by plain rounding (unless said) and return the allocation that the folder reports."""
    small_run(llama, output, text, method, **{"bits": 2.5, "settings": settings, **options})
    report: dict[str, Any] = read_json(output / "report.json")["allocation"]
    return report


def bits_of(folder: Path) -> dict[str, int]:
    """Width of each module, as stored."""
    modules = open_folder(folder).modules
    assert all(len(module.spec.segments) == 1 for module in modules.values())
    return {name: module.spec.segments[0][0] for name, module in modules.items()}


def stored_bytes(folder: Path) -> int:
    """Bytes of the packed tensors in the files."""
    checkpoint = open_folder(folder)
    prefixes = tuple(f"{module.prefix}." for module in checkpoint.modules.values())
    return sum(ref.n_bytes for name, ref in checkpoint.tensors.items() if name.startswith(prefixes))


def scores_of(allocation: dict[str, Any]) -> list[float]:
    return [unit["score"] for unit in allocation["units"]]


def test_lim_scores_the_unquantized_model(llama: Path, text: Path, hidden_states: list[Tensor], tmp_path: Path) -> None:
    allocation = run(llama, tmp_path / "out", text, *ROUNDED, method="layerwise")
    expected = [lim(before, after).item() for before, after in pairwise(hidden_states)]
    assert scores_of(allocation) == pytest.approx(expected, abs=1e-5)
    important = by_importance(expected)[: N // 2]
    for name, bits in bits_of(tmp_path / "out").items():
        assert bits == (3 if int(name.split(".")[2]) in important else 2), name


def test_zd_scores_the_weights_and_needs_no_data(llama: Path, tmp_path: Path) -> None:
    allocation = run(llama, tmp_path / "out", tmp_path / "no such file.txt", "allocator=zd")
    model = AutoModelForCausalLM.from_pretrained(llama)
    linears = [[m for m in layer.modules() if isinstance(m, torch.nn.Linear)] for layer in model.model.layers]
    expected = [zd([linear.weight.detach() for linear in each]) for each in linears]
    assert scores_of(allocation) == expected
    chosen = [index for index, unit in enumerate(allocation["units"]) if unit["bits"] == 3]
    assert chosen == sorted(by_importance([-score for score in expected])[: N // 2])


@pytest.mark.parametrize("entropy", ["kmeans", "histogram"])
def test_luq_scores_outputs(entropy: str, llama: Path, text: Path, hidden_states: list[Tensor], tmp_path: Path) -> None:
    events = Events()
    settings = (f"entropy={entropy}", *ROUNDED)
    allocation = run(llama, tmp_path / "out", text, *settings, method="luq", bits=3, seed=5, listener=events)
    rows = [state[:, 1:].flatten(0, 1) for state in hidden_states[1:]]  # few tokens: all but the first are taken
    if entropy == "kmeans":
        expected = [kmeans_entropy(each, torch.Generator().manual_seed(5)) for each in rows]
    else:
        expected = [histogram_entropy(each) for each in rows]
    assert scores_of(allocation) == pytest.approx(expected, rel=1e-3)
    high = by_entropy(scores_of(allocation))[: N // 2]
    assert [unit["bits"] for unit in allocation["units"]] == [4 if index in high else 2 for index in range(N)]
    assert any("scored on text tokens" in note for note in events.notes)


def test_random_is_a_seeded_control_and_reverse_the_complement(llama: Path, text: Path, tmp_path: Path) -> None:
    widths = {}
    for name, settings, seed in (("a", (), 1), ("b", (), 1), ("c", ("reverse=true",), 1), ("d", (), 2)):
        run(llama, tmp_path / name, text, "allocator=random", *settings, seed=seed)
        widths[name] = list(bits_of(tmp_path / name).values())
    assert widths["a"] == widths["b"] != widths["d"]
    assert [x + y for x, y in zip(widths["a"], widths["c"], strict=True)] == [5] * len(widths["a"])
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")


def test_error_scores_what_a_unit_does_to_the_output_of_its_block(
    llama: Path, text: Path, hidden_states: list[Tensor], tmp_path: Path
) -> None:
    allocation = run(llama, tmp_path / "out", text, "allocator=error", "granularity=linear", n_samples=2)
    model = AutoModelForCausalLM.from_pretrained(llama)
    rotary = model.model.rotary_emb(hidden_states[0], torch.arange(SMALL["seq_len"]).unsqueeze(0))
    layer, before, after = model.model.layers[1], hidden_states[1][:2], hidden_states[2][:2]
    unit = next(unit for unit in allocation["units"] if unit["name"] == "model.layers.1.mlp.up_proj")
    weight = layer.mlp.up_proj.weight.data.clone()
    expected = []
    for bits in (2, 3):
        layer.mlp.up_proj.weight.data = rtn(weight, (bits,) * 2, False, GRIDS["minmax"]).dequantize()
        with torch.no_grad():
            error = layer(before, position_embeddings=rotary) - after
        expected.append(float((error.square().sum(-1) / after.square().sum(-1))[:, 1:].mean()))
    assert unit["score"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("budget", "settings", "reaches"),
    [
        ({"bits": 2.5}, ("allocator=zd",), True),
        ({"bits": 3}, ("allocator=zd", "lo=1", "hi=4"), False),
        ({"bits": 2.3}, ("allocator=zd", "granularity=linear"), True),
        ({"bits": 2.3}, ("allocator=zd", "granularity=linear", "tie=true"), False),
        ({"bits": None}, ("bpw=3.3", "allocator=zd", "granularity=linear"), True),
        ({"bits": None}, ("bpw=3.05", "allocator=random", "granularity=linear", "symmetric=true"), True),
        ({"bits": 2.2}, ("allocator=error", "granularity=linear", "lo=1", "hi=3", "tie=true"), True),
    ],
)
def test_real_bytes_meet_the_budget_from_below(
    budget: dict[str, Any], settings: tuple[str, ...], reaches: bool, llama: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    request = small_request(llama, output, text, "rtn", settings=settings, **budget)
    plan = dry_run(request)
    allocation = run(llama, output, text, *settings, **budget)
    n_weights = sum(module.spec.n_weights for module in open_folder(output).modules.values())
    stored = 8 * stored_bytes(output) / n_weights
    assert stored == pytest.approx(allocation["bpw"], abs=1e-12)
    assert stored <= allocation["budget_bpw"] <= max(allocation["uniform_bpw"].values())
    assert plan.at_most
    assert plan.bpw == allocation["budget_bpw"]
    assert stored_bytes(output) <= plan.quantized_bytes
    if reaches:
        assert stored >= allocation["budget_bpw"] - 0.02
    assert {unit["bits"] for unit in allocation["units"]} == set(bits_of(output).values())


@pytest.mark.parametrize("solver", ["gptq", "boa"])  # the others store signs, or need no data
def test_with_every_solver(solver: str, models: Path, text: Path, tmp_path: Path) -> None:
    llama = tiny_model("llama", models, seed=1)
    settings = ("allocator=lim", f"solver={solver}", "grid=minmax", "reverse=true")
    allocation = run(llama, tmp_path / "out", text, *settings)
    assert [unit["bits"] for unit in allocation["units"]] == [2, 3]
    assert {name.split(".")[2]: bits for name, bits in bits_of(tmp_path / "out").items()} == {"0": 2, "1": 3}


def test_tied_linears_stay_equal(llama: Path, text: Path, tmp_path: Path) -> None:
    for tie in (False, True):
        output = tmp_path / str(tie)
        run(llama, output, text, "allocator=zd", "granularity=linear", f"tie={str(tie).lower()}", bits=2.6)
        bits = bits_of(output)
        equal = []
        for block in range(N):
            for parent, names in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
                equal.append(len({bits[f"model.layers.{block}.{parent}.{name}"] for name in names}) == 1)
        assert all(equal) == tie


def test_adaptive_trades_groups_for_widths(llama: Path, text: Path, tmp_path: Path) -> None:
    """Never more bytes than uniform groups take; what leaves its groups pays for what gets more bits."""
    output = tmp_path / "out"
    allocation = run(llama, output, text, "allocator=adaptive", bits=2, group_size=32)
    specs = {name: module.spec for name, module in open_folder(output).modules.items()}
    grouped = GroupedIntSpec(out_features=64, in_features=64, group_size=32, segments=((2, 2),), symmetric=False).bpw
    weights = sum(spec.out_features * spec.in_features for spec in specs.values())
    stored = 8 * sum(spec.n_bytes for spec in specs.values()) / weights
    assert allocation["budget_bpw"] == pytest.approx(grouped)
    assert grouped - 0.02 <= stored <= grouped
    assert stored == pytest.approx(allocation["bpw"])
    kinds = {(unit["bits"], unit["group_size"]) for unit in allocation["units"]}
    assert (2, None) in kinds
    assert any(bits == 3 for bits, _ in kinds)
    for unit in allocation["units"]:
        spec = specs[unit["name"]]
        assert isinstance(spec, GroupedIntSpec)
        assert spec.segments[0][0] == unit["bits"]
        assert spec.group_size == (unit["group_size"] or spec.in_features)
        assert len(unit["score"]) == 4


def test_adaptive_without_groups_mixes_widths_alone(llama: Path, text: Path, tmp_path: Path) -> None:
    allocation = run(llama, tmp_path / "out", text, "allocator=adaptive", bits=2.5, group_size=0)
    assert {unit["group_size"] for unit in allocation["units"]} == {None}
    assert {unit["bits"] for unit in allocation["units"]} == {2, 3}


def test_adaptive_budget_between_channel_and_group(llama: Path) -> None:
    """2 bits per channel fit where 2 bits in groups of 16 would not: 2 + 18/64 against 2 + 18/16."""
    linears = [linear for block in Skeleton(llama).blocks for linear in block.linears]
    budget = budget_of(linears, resolve("refined", bpw=2.5, group_size=16))
    assert (budget.lo, budget.hi) == (2, 3)
    with pytest.raises(RequestError, match=r"below the 2\.\d+ that 2-bit codes store here; raise it, or lower lo"):
        budget_of(linears, resolve("refined", bpw=2.1, group_size=16, settings=["lo=2"]))


def test_adaptive_takes_all_experts_of_a_block_together(models: Path) -> None:
    blocks = Skeleton(tiny_model("qwen3_moe", models)).blocks
    units = units_of(blocks[:1], resolve("refined", bits=2))
    experts = [unit for unit in units if "experts" in unit.name]
    assert [unit.name.rpartition(".")[2] for unit in experts] == ["gate_proj", "up_proj", "down_proj"]
    assert all(len(unit.linears) > 1 for unit in experts)


def test_units_of_a_mixture_of_experts(models: Path) -> None:
    """Engines stack the experts: tied, they are one unit for gate and up, and one for down."""
    blocks = Skeleton(tiny_model("qwen3_moe", models)).blocks
    recipe = Recipe(allocator="zd", granularity="linear", tie=True)
    paths = [unit.name.removeprefix("model.layers.0.") for unit in units_of(blocks, recipe) if unit.block == 0]
    attention = ["self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj"]
    assert paths == [*attention, "mlp.experts.*.gate_proj+up_proj", "mlp.experts.*.down_proj"]
    tied = units_of(blocks, recipe)
    single = units_of(blocks, Recipe(allocator="zd", granularity="linear"))
    assert [linear for unit in tied for linear in unit.linears] != []
    assert {linear for unit in tied for linear in unit.linears} == {unit.linears[0] for unit in single}
    assert len(units_of(blocks, Recipe(allocator="zd"))) == N_BLOCKS


def test_a_linear_of_a_given_width_is_the_one_of_that_uniform_run(models: Path, text: Path, tmp_path: Path) -> None:
    """The first block sees the same inputs whatever comes after it. Below 4 bits grid=auto searches, from 4 on not."""
    llama = tiny_model("llama", models, seed=1)
    seen = set()
    for reverse in ("false", "true"):
        mixed = tmp_path / f"mixed-{reverse}"
        run(llama, mixed, text, f"reverse={reverse}", "lo=2", "hi=4", method="layerwise", bits=3, group_size=64)
        bits = bits_of(mixed)["model.layers.0.self_attn.q_proj"]
        seen.add(bits)
        uniform = tmp_path / f"uniform-{bits}"
        small_run(llama, uniform, text, "gptq", bits=bits, group_size=64)
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            left, right = (open_folder(folder).read_module(f"model.layers.0.{name}") for folder in (mixed, uniform))
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left), (name, bits)
    assert seen == {2, 4}


def test_a_resumed_run_keeps_the_allocation(llama: Path, text: Path, tmp_path: Path) -> None:
    settings = ("grid=minmax",)
    run(llama, tmp_path / "whole", text, *settings, method="layerwise")
    output, events = tmp_path / "resumed", Events()
    with pytest.raises(Interrupted):
        run(llama, output, text, *settings, method="layerwise", listener=StopAfter(2))
    run(llama, output, text, *settings, method="layerwise", listener=events)
    assert ("started", N, 2) in events.seen
    assert not any("scoring" in note for note in events.notes)
    assert sha256_of(output) == sha256_of(tmp_path / "whole")


def test_a_resumed_run_reads_the_allocation_from_its_work_folder(llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(llama, output, text, "allocator=zd", listener=StopAfter(0))
    path = work_folder(output) / "allocation.json"
    allocation = read_json(path)
    turned = {name: 5 - bits for name, bits in allocation["widths"].items()}
    write_json(path, allocation | {"widths": turned})
    run(llama, output, text, "allocator=zd")
    assert bits_of(output) == turned


def test_another_budget_does_not_resume(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(llama, tmp_path / "out", text, "allocator=zd", listener=StopAfter(1))
    with pytest.raises(RequestError, match=r"other settings \(recipe.bits: 2.5 then, 2.75 now\)"):
        run(llama, tmp_path / "out", text, "allocator=zd", bits=2.75)


def test_the_written_recipe_is_a_recipe(llama: Path, text: Path, tmp_path: Path) -> None:
    for name, budget, expected in (("a", {"bits": 2.5}, (2.5, None)), ("b", {"bits": None}, (None, 3.2))):
        settings = ("allocator=zd", "lo=2", "hi=4", *(("bpw=3.2",) if name == "b" else ()))
        run(llama, tmp_path / name, text, *settings, **budget)
        written = json.loads((tmp_path / name / "recipe.json").read_text())
        assert (written["bits"], written["bpw"]) == expected
        assert recipe_from_json(written).to_json() == written
        assert resolve(file=tmp_path / name / "recipe.json").to_json() == written
    assert resolve(file=tmp_path / "b" / "recipe.json", bits=3).to_json()["bpw"] is None


def blocks_of(sizes: list[tuple[int, int]]) -> list[Block]:
    linears = [Linear(f"layers.{i}.fc", "fc", out, inner) for i, (out, inner) in enumerate(sizes)]
    return [Block(f"layers.{i}", (linear,), ()) for i, linear in enumerate(linears)]


@pytest.mark.parametrize(
    ("bits", "between", "widths"),
    [(2, (2, 2, 0), (2, 3)), (2.3, (2, 3, 3), (2, 3)), (2.9, (2, 3, 9), (2, 3)), (7.5, (7, 8, 5), (7, 8))],
)
def test_a_fraction_buys_its_share_of_equal_blocks(
    bits: float, between: tuple[int, int, int], widths: tuple[int, int]
) -> None:
    """0.3 is not a binary fraction: the tenth block must not be lost to rounding."""
    linears = [block.linears[0] for block in blocks_of([(64, 128)] * 10)]
    recipe = Recipe(bits=bits, allocator="zd", group_size=64)
    budget = budget_of(linears, recipe)
    below, above, share = between
    one = linears[:1]
    sizes = [bytes_at(one, recipe, Choice(width, 64)) for width in (below, above)]
    assert budget.n_bytes == (10 - share) * sizes[0] + share * sizes[1]
    assert (budget.lo, budget.hi) == widths


def test_widths_beside_a_budget_in_stored_bits() -> None:
    linears = [block.linears[0] for block in blocks_of([(64, 128)] * 10)]
    exact = 8 * bytes_at(linears, Recipe(group_size=64), Choice(3, 64)) / (10 * 64 * 128)

    def widths(**settings: Any) -> tuple[int, int]:
        budget = budget_of(linears, Recipe(allocator="zd", group_size=64, **settings))
        return budget.lo, budget.hi

    assert widths(bpw=exact) == (3, 4)
    assert widths(bpw=exact - 0.01) == (2, 3)
    assert widths(bpw=exact, hi=3) == (2, 3)
    assert widths(bpw=exact, lo=1) == (1, 3)
    assert widths(bits=8) == (7, 8)
    assert widths(bits=2.5, hi=4) == (2, 4)
    assert widths(bits=4.5, lo=2) == (2, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bpw": 1.2}, r"a budget of 1.200 .* is below the 1.500 that 1-bit codes store here; raise it, or lower lo"),
        ({"bpw": 3.0, "lo": 3}, r"below the 3.297 that 3-bit codes store here"),
        ({"bpw": 9.0}, r"above the 8.375 that 8-bit codes store here; lower it, or raise hi"),
        ({"bpw": 5.0, "hi": 4}, r"above the 4.312 that 4-bit codes"),
    ],
)
def test_budgets_out_of_reach(settings: dict[str, Any], message: str) -> None:
    linears = [block.linears[0] for block in blocks_of([(64, 128)] * 10)]
    with pytest.raises(RequestError, match=message):
        budget_of(linears, Recipe(allocator="zd", group_size=64, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4.5}, "--bits 4.5 needs an allocator: allocator=uniform gives every layer the same whole number"),
        ({"bpw": 4.8}, "--bpw 4.8 needs an allocator"),
        ({"method": "slim", "bits": 2.5}, "--bits 2.5 needs an allocator: allocator=sba"),
        ({"method": "layerwise", "bits": 2.5, "bpw": 2.8}, "the budget is either bits .* or bpw .*, not both"),
        ({"settings": ["lo=2"]}, "lo is a setting of the allocators lim, zd, luq, casp, error, adaptive and random"),
        ({"settings": ["reverse=true"]}, "reverse is a setting of the allocators"),
        ({"method": "layerwise", "settings": ["lo=3", "hi=3"]}, "widths from 1 to 8, lo below hi, not 3 and 3"),
        ({"method": "luq", "bits": 4.5}, "an average of 4.5 bits does not lie between lo=2 and hi=4"),
        ({"method": "layerwise", "settings": ["granularity=linear"]}, "lim scores what enters and leaves whole blocks"),
        ({"settings": ["allocator=error", "reverse=true"]}, "error weighs losses against bytes instead"),
        ({"settings": ["allocator=lin"]}, "unknown allocator 'lin'; did you mean 'lim'"),
        ({"settings": ["granularity=row"]}, "unknown granularity 'row'"),
        ({"bits": float("nan")}, "bits must be 1 to 8, not nan"),
        ({"settings": ["bits=two"]}, "setting bits takes a number, not 'two'"),
        ({"settings": ["lo=2.5", "allocator=zd"]}, "setting lo takes a whole number, not 2.5"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        resolve(**settings)


def test_whole_numbers_stay_whole() -> None:
    assert json.dumps(resolve(bits=3.0).to_json()["bits"]) == "3"
    assert str(default_output("some/model", resolve("layerwise", bits=2.5))) == "model-layerwise-2.5b"
    assert str(default_output("some/model", resolve("gptq", bits=3.0))) == "model-gptq-3b"
    assert str(default_output("some/model", resolve("layerwise", bpw=2.8))) == "model-layerwise-2.8bpw"
