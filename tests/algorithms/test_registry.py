"""One table of laws for every method, and a registry that names exactly what exists."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from strategies import output_loss, random_inputs, random_weight

import quantkit
from quantkit.algorithms.grids import GRIDS
from quantkit.algorithms.hessian import damped
from quantkit.algorithms.registry import ALLOCATORS, GRID_CHOICES, METHODS, SOLVERS
from quantkit.calib.statistics import InputStatistics
from quantkit.errors import NotPositiveDefiniteError, NumericalError, RequestError
from quantkit.formats import storage
from quantkit.formats.grouped_int import pack, unpack
from quantkit.models.structure import Linear
from quantkit.pipeline.solve import Solved, solve_linear
from quantkit.recipe import Recipe, resolve

PACKAGE = Path(quantkit.__file__).parent
INTEGER = [name for name, method in METHODS.items() if "grouped_int" in method.formats]
BITS, GROUP_SIZES = (1, 2, 3, 4, 8), (12, 0)
IN, OUT = 48, 10


def linear_recipe(method: str, bits: int, group_size: int, symmetric: bool, *settings: str) -> Recipe:
    """The recipe with which one linear is solved; one that mixes widths over linears gives each a whole number."""
    symmetry = f"symmetric={str(symmetric).lower()}"
    plain = resolve(method, group_size=group_size, settings=[symmetry, *settings])
    if plain.mixes_widths:
        return plain.at(bits)
    return resolve(method, bits=bits, group_size=group_size, settings=[symmetry, *settings])


def case(seed: int = 0) -> tuple[Linear, torch.Tensor, InputStatistics]:
    weight = random_weight(OUT, IN, seed, torch.float32)
    inputs = random_inputs(300, IN, seed).float()
    statistics = InputStatistics(IN, n_tokens=len(inputs), gram=inputs.t() @ inputs, sample=[inputs[::2]])
    return Linear("layers.0.proj", "proj", OUT, IN), weight, statistics


def solved(recipe: Recipe, weight: torch.Tensor | None = None) -> Solved:
    linear, default, statistics = case()
    return solve_linear(linear, default if weight is None else weight, statistics, recipe)


def table() -> Iterator[tuple[str, int, int, bool]]:
    for method in INTEGER:
        for bits in BITS:
            for group_size in GROUP_SIZES:
                for symmetric in (False, True):
                    yield method, bits, group_size, symmetric


def is_refused(method: str, bits: int, group_size: int, symmetric: bool) -> bool:
    """Outside the widths of the method's line, and SliM without groups or with symmetric grids."""
    low, high = METHODS[method].bits
    mixes_groups = METHODS[method].defaults.get("allocator") == "sba"
    return not low <= bits <= high or (mixes_groups and (symmetric or not group_size))


LAWFUL = [row for row in table() if not is_refused(*row)]


@pytest.mark.parametrize(("method", "bits", "group_size", "symmetric"), LAWFUL)
def test_laws_of_every_method(method: str, bits: int, group_size: int, symmetric: bool) -> None:
    recipe = linear_recipe(method, bits, group_size, symmetric)
    _, weight, _ = case()
    solution = solved(recipe)
    quantized = solution.weight

    # Range, dtypes, shapes
    assert quantized.codes.dtype == torch.uint8
    assert quantized.codes.shape == weight.shape
    assert quantized.group_size == (group_size or IN)
    assert quantized.symmetric == symmetric
    levels = torch.tensor([2**width for width in quantized.bits]).repeat_interleave(quantized.group_size)
    assert (quantized.codes < levels).all()
    assert sum(quantized.bits) == bits * len(quantized.bits)
    assert torch.equal(quantized.scales.half().float(), quantized.scales)
    assert (quantized.scales > 0).all()

    # Determinism
    again = solved(recipe).weight
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.scales, quantized.scales)
    assert torch.equal(again.zeros, quantized.zeros)

    # Rows permute
    shuffle = torch.randperm(OUT, generator=torch.Generator().manual_seed(1))
    permuted = solved(recipe, weight[shuffle]).weight
    assert permuted.bits == quantized.bits
    assert torch.equal(permuted.codes, quantized.codes[shuffle])
    assert torch.equal(permuted.scales, quantized.scales[shuffle])
    assert torch.equal(permuted.zeros, quantized.zeros[shuffle])

    # What is stored is what was solved
    unpacked = unpack(quantized.spec(), pack(quantized))
    assert torch.equal(unpacked.dequantize(), quantized.dequantize())
    assert unpacked.bits == quantized.bits

    # What is reported is what was lost
    _, _, statistics = case()
    outputs = torch.cat(statistics.sample).double()  # not the whole gram: only the size is compared
    lost = (outputs @ (weight - quantized.dequantize()).double().t()).norm() / (outputs @ weight.double().t()).norm()
    assert solution.relative_error == pytest.approx(float(lost), rel=0.25)


@pytest.mark.parametrize(("method", "bits", "group_size", "symmetric"), [row for row in table() if is_refused(*row)])
def test_refused_combinations(method: str, bits: int, group_size: int, symmetric: bool) -> None:
    with pytest.raises(RequestError, match=r"works at \d to \d bits|symmetric grids is not supported|needs groups"):
        linear_recipe(method, bits, group_size, symmetric)


@pytest.mark.parametrize("method", INTEGER)
@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("act_order", ["none", "group", "full"])
def test_every_method_takes_every_grid_and_order(method: str, grid: str, act_order: str) -> None:
    if act_order != "none" and METHODS[method].defaults.get("solver") == "rtn":
        with pytest.raises(RequestError, match="act_order orders the compensation of errors"):
            linear_recipe(method, 3, 16, False, f"grid={grid}", f"act_order={act_order}")
        return
    recipe = linear_recipe(method, 3, 16, False, f"grid={grid}", f"act_order={act_order}")
    assert 0 < solved(recipe).relative_error < 0.5


@pytest.mark.parametrize("method", INTEGER)
@pytest.mark.parametrize("bits", [2, 3])
def test_refinement_loses_no_more_in_any_row(method: str, bits: int) -> None:
    """By the objective that it descends on, the damped Hessian's, up to float32."""
    _, weight, statistics = case()
    hessian = statistics.hessian()
    assert hessian is not None
    plain = replace(linear_recipe(method, bits, 12, False), refine=0)
    before, after = (
        output_loss(weight, solved(recipe).weight.dequantize(), damped(hessian, plain.damping))
        for recipe in (plain, replace(plain, refine=2))
    )
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < before.sum()


@pytest.mark.parametrize("method", INTEGER)
def test_eight_bits_lose_little(method: str) -> None:
    """A range of about 6 standard deviations in 255 steps: s / sqrt(12) = 0.7 % of one; twice that for outliers."""
    bits = METHODS[method].bits[1]
    assert solved(linear_recipe(method, bits, 16, False)).relative_error < 0.014 * 2 ** (8 - bits)


@pytest.mark.parametrize("method", INTEGER)
def test_more_bits_lose_less(method: str) -> None:
    low, high = METHODS[method].bits
    errors = [solved(linear_recipe(method, bits, 16, False)).relative_error for bits in range(low, high + 1)]
    assert errors == sorted(errors, reverse=True)


SIGNS = [name for name, method in METHODS.items() if method.formats == ("sign_salient",)]


@pytest.mark.parametrize("method", SIGNS)
def test_laws_of_methods_below_two_bits(method: str) -> None:
    recipe = resolve(method)
    _, weight, statistics = case()
    solution = solved(recipe)
    dense = solution.weight.dequantize()
    assert dense.shape == weight.shape
    assert torch.equal(solved(recipe).weight.dequantize(), dense)
    spec, tensors = solution.weight.spec(), storage.pack(solution.weight)
    assert torch.equal(storage.unpack(spec, tensors).dequantize(), dense)
    assert spec.n_bytes == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    outputs = torch.cat(statistics.sample).double()
    lost = (outputs @ (weight - dense).double().t()).norm() / (outputs @ weight.double().t()).norm()
    assert solution.relative_error == pytest.approx(float(lost), rel=0.25)


def test_ptq161_loses_less_the_more_bits_it_may_spend() -> None:
    errors = [solved(resolve("ptq161", bits=bits)).relative_error for bits in (1, 1.3, 1.6, 2)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", INTEGER)
def test_linear_that_no_token_reached(method: str) -> None:
    """All inputs count alike: nothing to compensate, so the widths and grid decide alone."""
    linear, weight, _ = case()
    recipe = linear_recipe(method, 3, 16, False)
    for statistics in (None, InputStatistics(IN)):
        assert solve_linear(linear, weight, statistics, recipe).relative_error < 0.5


@pytest.mark.parametrize("method", INTEGER)
def test_errors_name_the_linear(method: str) -> None:
    linear, weight, statistics = case()
    recipe = linear_recipe(method, 3, 16, False) if method in INTEGER else resolve(method)
    weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"^layers\.0\.proj: the weight holds NaN or Inf"):
        solve_linear(linear, weight, statistics, recipe)


def test_error_class_is_kept() -> None:
    linear, weight, _ = case()
    hopeless = torch.full((IN, IN), 100.0).fill_diagonal_(1.0)
    hopeless[0, 1:] *= -1
    with pytest.raises(NotPositiveDefiniteError, match=r"^layers\.0\.proj: the Hessian is not positive definite"):
        solve_linear(
            linear, weight, InputStatistics(IN, n_tokens=2, gram=hopeless), resolve("gptq", bits=3, group_size=16)
        )


# --- the tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resolves(name: str) -> None:
    method, recipe = METHODS[name], resolve(name)
    assert recipe.method == name
    assert recipe.allocator in ALLOCATORS
    assert recipe.solver in SOLVERS
    assert recipe.grid in GRID_CHOICES
    assert set(method.defaults) <= {item.name for item in fields(Recipe)}
    for key, value in method.defaults.items():
        assert getattr(recipe, key) == value
    assert method.title
    assert method.summary.endswith(".")
    assert method.paper == "-" or method.paper.startswith("arXiv:")
    assert 0 < method.bits[0] <= method.bits[1] <= 8


ALGORITHMS = "quantkit.algorithms"


def imports(path: Path) -> set[str]:
    """Names of the algorithm files that a file imports from."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.removeprefix(f"{ALGORITHMS}.") for name in modules if name.startswith(f"{ALGORITHMS}.")}


def test_every_algorithm_file_is_reached() -> None:
    """From a room above or the registry, directly or through an algorithm that is; nothing lies about unused."""
    folder = PACKAGE / "algorithms"
    paths = [path for path in folder.rglob("*.py") if path.stem != "__init__"]
    files = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in paths}
    reached: set[str] = set()
    rooms = [path for room in ("pipeline", "cli", "runtime", "evaluation") for path in (PACKAGE / room).rglob("*.py")]
    found = {"registry"}.union(*map(imports, rooms))
    while found - reached:
        reached |= found
        found = set().union(*(imports(files[name]) for name in reached))
    assert reached == set(files)
