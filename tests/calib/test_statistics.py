"""Statistics of inputs: exact sums on whole numbers, sharing by identity, hooks that leave no trace."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import law
from tiny_models import build
from torch import Tensor, nn

from quantkit.calib.statistics import InputStatistics, StatisticsRecorder, inputs_of


class Attention(nn.Module):
    """Two linears on one tensor, one on another, one that is called twice, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 5)
        self.out = nn.Linear(4, 6)
        self.unused = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        k = self.k(x)  # called before q, though defined after it
        q = self.q(x)
        return self.out(q * k[..., :4]) + self.out(q)


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers: float32 sums of their products are exact in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def recorded(module: nn.Module, calls: list[Tensor], rows_per_call: int = 0) -> StatisticsRecorder:
    recorder = StatisticsRecorder(linears_of(module), rows_per_call)
    with recorder.recording(), torch.no_grad():
        for inputs in calls:
            module(inputs)
            recorder.next_call()
    return recorder


# --- sums ---------------------------------------------------------------------------------------------------------


@settings(law, max_examples=20)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), seed=st.integers(0, 1000))
def test_one_call_or_many_give_the_same_sum(cuts: list[int], seed: int) -> None:
    inputs = whole_numbers(40, 6, seed=seed)
    bounds = [0, *sorted(cuts), 40]
    parts = [inputs[start:stop] for start, stop in itertools.pairwise(bounds)]  # some may be empty
    layer = nn.Sequential(nn.Linear(6, 2))
    at_once, piecewise = recorded(layer, [inputs]).statistics("0"), recorded(layer, parts).statistics("0")
    assert at_once.n_tokens == piecewise.n_tokens == 40
    assert at_once.gram is not None
    assert piecewise.gram is not None
    assert torch.equal(at_once.gram, inputs.t() @ inputs)
    assert torch.equal(piecewise.gram, at_once.gram)


def test_hessian_is_twice_the_mean_outer_product() -> None:
    inputs = whole_numbers(32, 6)
    hessian = recorded(nn.Sequential(nn.Linear(6, 2)), [inputs]).statistics("0").hessian()
    assert hessian is not None
    assert hessian.dtype == torch.float32
    assert torch.equal(hessian, 2 * sum(torch.outer(row, row) for row in inputs) / 32)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_float32_whatever_runs(dtype: torch.dtype) -> None:
    """4096 products of 16 * 16 exceed float16; their float32 sum is exact."""
    layer = nn.Sequential(nn.Linear(3, 2, dtype=dtype))
    statistics = recorded(layer, [torch.full((4096, 3), 16.0, dtype=dtype)]).statistics("0")
    assert statistics.gram is not None
    assert statistics.gram.dtype == torch.float32
    assert torch.equal(statistics.gram, torch.full((3, 3), 4096 * 256.0))


@pytest.mark.parametrize("shape", [(24, 6), (1, 24, 6), (2, 12, 6), (2, 3, 4, 6)])
def test_every_leading_dimension_is_tokens(shape: tuple[int, ...]) -> None:
    inputs = whole_numbers(24, 6)
    statistics = recorded(nn.Sequential(nn.Linear(6, 2)), [inputs.reshape(shape)]).statistics("0")
    assert statistics.n_tokens == 24
    assert torch.equal(statistics.gram, inputs.t() @ inputs)  # type: ignore[arg-type]


def test_inputs_and_outputs_are_left_alone() -> None:
    module, inputs = Attention(), whole_numbers(7, 6)
    kept = inputs.clone()
    before = module(inputs)
    recorder = StatisticsRecorder(linears_of(module), 4)
    with recorder.recording():
        assert torch.equal(module(inputs), before)
    assert torch.equal(inputs, kept)


def test_linear_without_tokens() -> None:
    recorder = recorded(Attention(), [whole_numbers(5, 6), torch.empty(0, 6)])
    statistics = recorder.statistics("unused")
    assert statistics == InputStatistics(6)
    assert statistics.hessian() is None
    assert statistics.rows().shape == (0, 6)
    assert recorder.leader("unused") == "unused"
    assert recorder.statistics("q").n_tokens == 5


# --- sharing ------------------------------------------------------------------------------------------------------


def test_shared_input_is_gathered_once_under_the_first_caller() -> None:
    recorder = recorded(Attention(), [whole_numbers(9, 6), whole_numbers(4, 6, seed=1)])
    assert recorder.first_calls() == ["k", "q", "out"]
    assert [recorder.leader(name) for name in ("k", "q", "out")] == ["k", "k", "out"]
    assert recorder.statistics("q") is recorder.statistics("k")
    assert recorder.statistics("k").n_tokens == 13


def test_linear_called_twice_counts_twice() -> None:
    assert recorded(Attention(), [whole_numbers(9, 6)]).statistics("out").n_tokens == 18


def test_equal_values_in_another_tensor_are_not_shared() -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.clone())

    recorder = recorded(Copies(), [whole_numbers(9, 6)])
    assert recorder.leader("b") == "b"
    assert torch.equal(recorder.statistics("a").gram, recorder.statistics("b").gram)  # type: ignore[arg-type]


def test_memory_that_is_used_again_is_not_mistaken_for_the_same_input() -> None:
    """Inputs stay alive until the next call, so no new tensor can take over a seen one's identity."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    recorder = recorded(Chain(), [whole_numbers(9, 6)])
    names = [f"layers.{index}" for index in range(12)]
    assert recorder.first_calls() == names
    assert [recorder.leader(name) for name in names] == names


def test_hooks_are_gone_even_after_an_error() -> None:
    module = Attention()
    recorder = StatisticsRecorder(linears_of(module))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), recorder.recording():
        module(torch.ones(2, 5))
    assert all(not child._forward_pre_hooks for child in module.modules())
    with recorder.recording():
        pass
    module(whole_numbers(3, 6))
    assert recorder.first_calls() in ([], ["k"])  # nothing is recorded outside the context
    assert recorder.statistics("out").n_tokens == 0


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("opt", [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]]),
        ("phi3", [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),
    ],
)
def test_leaders_of_real_blocks(family: str, groups: list[list[str]]) -> None:
    model = build(family)
    decoder = model.get_decoder()
    block = decoder.layers[0]
    recorder = StatisticsRecorder(linears_of(block))
    with recorder.recording(), torch.no_grad():
        model(torch.randint(4, 260, (2, 16), generator=torch.Generator().manual_seed(0)))
    found: dict[str, list[str]] = {}
    for name in recorder.first_calls():
        found.setdefault(recorder.leader(name), []).append(name.rpartition(".")[2])
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, groups))
    assert all(recorder.statistics(name).n_tokens == 32 for name in recorder.first_calls())


# --- the float model's inputs -------------------------------------------------------------------------------------


def test_cross_product_pairs_float_and_quantized_inputs_of_the_same_tokens() -> None:
    module = Attention()
    calls = [whole_numbers(9, 6), whole_numbers(4, 6, seed=1)]
    floats = [whole_numbers(9, 6, seed=2), whole_numbers(4, 6, seed=3)]
    recorder = StatisticsRecorder(linears_of(module))
    with recorder.recording(), torch.no_grad():
        for inputs, wanted in zip(calls, floats, strict=True):
            recorder.next_call({"k": wanted, "q": wanted})
            module(inputs)
    statistics = recorder.statistics("q")
    expected = sum(wanted.t() @ inputs for inputs, wanted in zip(calls, floats, strict=True))
    assert torch.equal(statistics.cross(), expected * (2 / 13))  # type: ignore[arg-type]
    assert torch.equal(statistics.gram, sum(inputs.t() @ inputs for inputs in calls))  # type: ignore[arg-type]
    assert recorder.statistics("out").cross() is None


def test_cross_product_of_a_prefix_without_error_is_the_hessian() -> None:
    module, inputs = Attention(), whole_numbers(9, 6)
    recorder = StatisticsRecorder(linears_of(module))
    with recorder.recording(), torch.no_grad():
        recorder.next_call({"k": inputs.reshape(3, 3, 6)})
        module(inputs)
    statistics = recorder.statistics("k")
    assert torch.equal(statistics.cross(), statistics.hessian())  # type: ignore[arg-type]


def test_inputs_of_holds_the_latest_input_of_each_linear() -> None:
    module = Attention()
    with torch.no_grad(), inputs_of(linears_of(module)) as latest:
        for inputs in (whole_numbers(4, 6), whole_numbers(9, 6)):
            module(inputs)
            assert latest["q"].data_ptr() == latest["k"].data_ptr() == inputs.data_ptr()
            torch.testing.assert_close(latest["out"], module.q(inputs))
    assert set(latest) == {"q", "k", "out"}
    assert all(not child._forward_pre_hooks for child in module.modules())


# --- samples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_per_call", [1, 3, 8, 100])
@pytest.mark.parametrize("n_tokens", [1, 3, 8, 24])
def test_sample_holds_rows_of_the_call_in_order(rows_per_call: int, n_tokens: int) -> None:
    inputs = torch.arange(float(n_tokens)).unsqueeze(1).expand(-1, 6).contiguous()
    statistics = recorded(nn.Sequential(nn.Linear(6, 2)), [inputs, inputs + 100], rows_per_call).statistics("0")
    rows = statistics.rows()[:, 0].tolist()
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert len(first) == min(rows_per_call, n_tokens)
    assert second == [row + 100 for row in first]
    assert first == sorted(set(first))
    assert set(first) <= set(map(float, range(n_tokens)))
    if n_tokens % rows_per_call == 0:
        assert first == [float(row) for row in range(0, n_tokens, n_tokens // rows_per_call)]


@pytest.mark.parametrize(("n_tokens", "rows_per_call"), [(24, 16), (23, 12), (2048, 1366)])
def test_sample_is_evenly_spaced(n_tokens: int, rows_per_call: int) -> None:
    inputs = torch.arange(float(n_tokens)).unsqueeze(1).expand(-1, 6).contiguous()
    rows = recorded(nn.Sequential(nn.Linear(6, 2)), [inputs], rows_per_call).statistics("0").rows()[:, 0]
    assert len(rows) == rows_per_call
    gaps = torch.cat([rows, torch.tensor([float(n_tokens)])]).diff()  # the last one up to the end of the call
    assert gaps.max() - gaps.min() <= 1


def test_no_sample_unless_asked() -> None:
    assert recorded(Attention(), [whole_numbers(9, 6)]).statistics("q").rows().shape == (0, 6)


# --- largest magnitudes -------------------------------------------------------------------------------------------


def test_largest_magnitudes_are_those_of_all_tokens_that_count() -> None:
    linear = nn.Sequential(nn.Linear(6, 2))
    calls = [whole_numbers(5, 6, seed=seed) for seed in range(3)]
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    for kept in (torch.ones(5), weights):
        recorder = StatisticsRecorder(linears_of(linear), absmax=True)
        with recorder.recording(), torch.no_grad():
            for inputs in calls:
                recorder.next_call(weights=None if kept.all() else kept)
                linear(inputs)
        expected = torch.cat([inputs[kept > 0] for inputs in calls]).abs().amax(0)
        assert torch.equal(recorder.statistics("0").absmax, expected)  # type: ignore[arg-type]


def test_no_largest_magnitudes_unless_asked_or_where_no_token_counts() -> None:
    linear = nn.Sequential(nn.Linear(6, 2))
    assert recorded(linear, [whole_numbers(4, 6)]).statistics("0").absmax is None
    recorder = StatisticsRecorder(linears_of(linear), absmax=True)
    with recorder.recording(), torch.no_grad():
        recorder.next_call(weights=torch.zeros(4))
        linear(whole_numbers(4, 6))
    assert recorder.statistics("0").absmax is None
