"""Distillation: its loss, schedule and data order, and training that goes on where it stopped."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import environment
from hypothesis import given
from hypothesis import strategies as st
from quantized_models import calibration_text
from strategies import law
from tiny_models import build, tiny_model
from torch import nn
from torch.nn import functional as F

from quantkit.algorithms.littlebit import Rank, dual_svid, latent_start
from quantkit.errors import NumericalError, RequestError
from quantkit.formats.files import read_json
from quantkit.pipeline.captured import Captured
from quantkit.pipeline.distill import (
    Distillation,
    distillation_loss,
    learning_rate,
    sample_indices,
    split_samples,
)
from quantkit.pipeline.sign_linear import SignLinear
from quantkit.pipeline.team import Team
from quantkit.recipe import Recipe, resolve

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 260, (18, 16), generator=torch.Generator().manual_seed(1))


def settings(*more: str) -> Recipe:
    return resolve("littlebit", settings=["refine=qat", "steps=8", "batch=2", "check_every=2", "lr=5e-3", *more])


def student(recipe: Recipe, seed: int = 0) -> Distillation:
    """A random model of two blocks with sign factors in place of its linears, and 18 sequences of 16 tokens."""
    model = build("llama").requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, child = name.rpartition(".")
            factors = dual_svid(linear.weight.detach(), Rank(16, 2))
            setattr(model.model.layers.get_submodule(parent), child, SignLinear(linear, factors, generator))
    return Distillation(model, list(model.model.layers), TOKENS, recipe, seed, Team(CPU, sparse=False))


class Stopped(Exception):
    """Raised by a report."""


# --- schedule and order -------------------------------------------------------------------------------------------


@law
@given(st.integers(1, 2000), st.floats(1e-6, 1.0))
def test_the_learning_rate_warms_up_and_falls(n_steps: int, peak: float) -> None:
    rates = [learning_rate(step, n_steps, peak) for step in range(n_steps)]
    warm_up = max(1, round(0.02 * n_steps))
    assert max(rates) == pytest.approx(peak)
    assert rates[:warm_up] == pytest.approx([peak * (step + 1) / warm_up for step in range(warm_up)])
    assert rates[warm_up:] == sorted(rates[warm_up:], reverse=True)
    assert all(rate > 0 for rate in rates)


@law
@given(st.integers(1, 40), st.integers(0, 200), st.integers(1, 30), st.integers(0, 5))
def test_every_epoch_is_a_permutation_and_order_does_not_depend_on_the_batch(
    n: int, position: int, count: int, seed: int
) -> None:
    stream = sample_indices(0, 6 * n, n, seed)
    for epoch in range(6):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    long = sample_indices(0, position + count, n, seed)
    assert sample_indices(position, count, n, seed) == long[position:]


@pytest.mark.parametrize(("n", "held_out"), [(2, 1), (16, 1), (32, 2), (160, 10), (2000, 32)])
def test_the_last_sequences_are_held_out(n: int, held_out: int) -> None:
    ids = torch.arange(2 * n).reshape(n, 2)
    train, rest = split_samples(ids)
    assert len(rest) == held_out
    assert torch.equal(torch.cat([train, rest]), ids)


def test_a_single_sequence_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^refine=qat holds out one calibration sequence and trains on the others"):
        split_samples(torch.zeros(1, 8, dtype=torch.int64))


# --- loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_kl_and_the_relative_distance_of_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    student_logits, teacher_logits = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    ours, theirs = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    losses = distillation_loss(student_logits, teacher_logits, [ours, theirs], [theirs, theirs], 0.5)
    flat = F.kl_div(
        F.log_softmax(student_logits, -1).reshape(6, 5),
        F.softmax(teacher_logits, -1).reshape(6, 5),
        reduction="batchmean",
    )
    assert float(losses.kl) == pytest.approx(float(flat), rel=1e-5)
    rows = [
        float((ours[b, t] - theirs[b, t]).square().sum() / theirs[b, t].square().sum())
        for b in range(2)
        for t in range(3)
    ]
    assert float(losses.blocks) == pytest.approx(sum(rows) / 6 / 2, rel=1e-5)  # the second block has no distance
    assert float(losses.total) == pytest.approx(float(losses.kl) + 0.5 * float(losses.blocks), rel=1e-6)


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    logits, block = torch.randn(1, 4, 9), torch.randn(1, 4, 6)
    assert float(distillation_loss(logits, logits, [block], [block], 1.0).total) == pytest.approx(0, abs=1e-6)


# --- one linear ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_paths", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_sign_linear_is_its_dense_weight_or_its_teachers(n_paths: int, bias: bool) -> None:
    linear = nn.Linear(24, 16, bias=bias).requires_grad_(False)
    factors = dual_svid(linear.weight.detach(), Rank(8, n_paths))
    module = SignLinear(linear, factors, torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 24)
    # sums of 24 and of 16 float32 products in another order
    torch.testing.assert_close(module(x), F.linear(x, factors.dense(), linear.bias), rtol=0, atol=1e-5)
    torch.testing.assert_close(module.factors().dense(), factors.dense(), rtol=0, atol=1e-6)
    module.teaching = True
    assert torch.equal(module(x), linear(x))


def test_gradients_reach_every_trained_parameter_and_no_other() -> None:
    distillation = student(settings())
    loss = distillation._losses(distillation.model, distillation.train_ids[:2]).total
    loss.backward()
    for name, parameter in distillation.model.named_parameters():
        trained = name.rpartition(".")[2] in ("left", "right", "rows", "latent_scales", "columns")
        assert (parameter.grad is not None and bool(parameter.grad.any())) is trained, name


def test_the_teacher_keeps_the_norms_that_the_student_trains() -> None:
    model = student(settings()).model
    norm = model.model.norm.weight.requires_grad_()
    distillation = Distillation(model, list(model.model.layers), TOKENS, settings(), 0, Team(CPU, sparse=False))
    assert list(distillation.rest) == ["model.norm.weight"]
    before = distillation._teacher(input_ids=TOKENS[:2]).logits
    loss = distillation._losses(model, TOKENS[:2]).total
    loss.backward()
    assert norm.grad is not None
    assert bool(norm.grad.any())
    norm.data *= 2
    assert torch.equal(distillation._teacher(input_ids=TOKENS[:2]).logits, before)
    assert float(distillation._losses(model, TOKENS[:2]).total.detach()) != float(loss.detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_replayed_batch_gives_the_gradients_of_an_eager_one() -> None:
    """Recorded with one batch, replayed with others; gradients add up as they do without a graph."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 32).cuda()

    def work(x: torch.Tensor) -> torch.Tensor:
        loss = layer(x).square().mean()
        loss.backward()
        return loss.detach()

    captured, batches = Captured(work, list(layer.parameters()), torch.device("cuda")), torch.randn(3, 4, 32).cuda()
    losses = [captured(batch) for batch in batches]
    assert captured.records
    found = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    expected = [work(batch) for batch in batches]
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
    torch.testing.assert_close(found, [parameter.grad for parameter in layer.parameters()])


def test_the_gradient_of_a_latent_is_the_formula() -> None:
    """Of one linear: upstream gradient of the signs times a (1 - tanh(a x)^2)."""
    linear = nn.Linear(12, 10, bias=False).requires_grad_(False)
    module = SignLinear(linear, dual_svid(linear.weight.detach(), Rank(4, 1)), torch.Generator().manual_seed(0))
    x = torch.randn(7, 12)
    module(x).square().sum().backward()
    S = module.left.detach().sign().requires_grad_()
    T, h = module.right.detach().sign(), module.rows.detach()[0]
    hidden = F.linear(x * module.columns.detach()[0], T) * module.latent_scales.detach()
    (F.linear(hidden, S) * h).square().sum().backward()
    assert S.grad is not None
    expected = S.grad * 100 * (1 - torch.tanh(100 * module.left.detach()).square())
    torch.testing.assert_close(module.left.grad, expected, rtol=1e-4, atol=1e-6)


# --- training -----------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_keeps_the_best(tmp_path: Path) -> None:
    distillation = student(settings("steps=20", "check_every=4", "lr=1e-3"))
    seen: list[tuple[int, int, float, float]] = []
    distillation.run(tmp_path, lambda *numbers: seen.append(numbers))
    progress = distillation.progress
    assert [step for step, _ in progress.checks] == [0, 4, 8, 12, 16, 20]
    assert [row[0] for row in seen] == [4, 8, 12, 16, 20]
    assert len(progress.losses) == progress.step == 20
    assert seen[-1][2] == pytest.approx(sum(progress.losses[16:]) / 4)
    assert seen[-1][2] < 0.8 * progress.losses[0]
    assert distillation._held_out_loss() == pytest.approx(min(loss for _, loss in progress.checks), rel=1e-6)


@pytest.mark.parametrize("stop", [2, 6])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_interrupted_training_goes_on_bit_for_bit(stop: int, accumulate: int, tmp_path: Path) -> None:
    recipe = settings(f"accumulate={accumulate}")
    whole, first, second = student(recipe), student(recipe), student(recipe)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole.run(tmp_path / "a", lambda *numbers: None)

    def end(step: int, *numbers: float) -> None:
        if step == stop:
            raise Stopped

    with pytest.raises(Stopped):
        first.run(tmp_path / "b", end)
    second.run(tmp_path / "b", lambda *numbers: None)
    assert second.progress == whole.progress
    for name, parameter in whole._trained().items():
        assert torch.equal(second._trained()[name], parameter), name


def test_steps_after_the_last_checkpoint_are_done_again(tmp_path: Path) -> None:
    recipe = settings("check_every=4")
    whole, first, second = student(recipe), student(recipe), student(recipe)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole.run(tmp_path / "a", lambda *numbers: None)
    original, done = first._step, []

    def step(number: int) -> float:
        if number == 6:
            raise Stopped
        done.append(number)
        return original(number)

    first._step = step  # type: ignore[method-assign]  # as a kill in the middle of a step
    with pytest.raises(Stopped):
        first.run(tmp_path / "b", lambda *numbers: None)
    assert done == [0, 1, 2, 3, 4, 5]
    second.run(tmp_path / "b", lambda *numbers: None)
    assert second.progress.losses == whole.progress.losses


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    """Gradients are means: 2 x 2 sequences give the losses of 4 at once, up to float32 sums."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    large, small = student(settings("batch=4", "steps=3")), student(settings("accumulate=2", "steps=3"))
    large.run(tmp_path / "a", lambda *numbers: None)
    small.run(tmp_path / "b", lambda *numbers: None)
    assert small.progress.losses[0] == pytest.approx(large.progress.losses[0], rel=1e-5)
    assert small.progress.losses == pytest.approx(large.progress.losses, rel=0.05)  # a sign near 0 may turn or not


def test_it_ends_early_when_nothing_gets_better(tmp_path: Path) -> None:
    """A learning rate that turns signs at random from a good start."""
    distillation = student(settings("steps=40", "check_every=1", "patience=3", "lr=1"))
    distillation.run(tmp_path, lambda *numbers: None)
    losses = [loss for _, loss in distillation.progress.checks]
    best = losses.index(min(losses))
    assert distillation.progress.step < 40
    assert len(losses) - 1 - best >= 3


def test_a_loss_that_is_no_number_ends_it(tmp_path: Path) -> None:
    distillation = student(settings())
    next(iter(distillation.linears.values())).rows.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match=r"^training: the loss is nan at step 0; use a --set lr below 0\.005"):
        distillation.run(tmp_path, lambda *numbers: None)


def test_latents_of_other_seeds_differ() -> None:
    first, second = (latent_start(torch.ones(4, 4), torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert math.isclose(float(first.sign().mean()), 1.0)


# --- several processes --------------------------------------------------------------------------------------------


def launch(arguments: list[str], cwd: Path, n: int) -> list[subprocess.CompletedProcess[str]]:
    """What ``accelerate launch --cpu`` starts: n processes that know of each other by their environment."""
    port = 20_000 + os.getpid() % 10_000
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "quantkit", *arguments],
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(n),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                ACCELERATE_USE_CPU="true",
            ),
        )
        for rank in range(n)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batches(tmp_path: Path) -> None:
    source, text = tiny_model("llama", tmp_path), calibration_text(tmp_path)
    flags = ["quantize", str(source), "--method", "littlebit", "--bits", "1.25", "--calib", str(text)]
    flags += ["--n-samples", "9", "--seq-len", "32", "--device", "cpu"]
    for setting in ("refine=qat", "sign_rounds=0", "steps=2", "check_every=2", "batch=2", "lr=5e-3"):
        flags += ["--set", setting]
    leader, follower = launch([*flags, "-o", "two", "--json"], tmp_path, 2)
    assert (leader.returncode, follower.returncode) == (0, 0), leader.stderr + follower.stderr
    assert follower.stdout == ""
    (one,) = launch([*flags, "--set", "accumulate=2", "-o", "one"], tmp_path, 1)
    assert one.returncode == 0, one.stderr
    rows = [read_json(tmp_path / name / "report.json")["training"]["checks"] for name in ("one", "two")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [0, 2]
    assert rows[1][0]["held_out_loss"] == rows[0][0]["held_out_loss"]
    assert rows[1][1]["loss"] == pytest.approx(rows[0][1]["loss"], rel=0.05)  # a sign near 0 may turn or not


def test_processes_are_for_training(tmp_path: Path) -> None:
    source, text = tiny_model("llama", tmp_path), calibration_text(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", "quantize", str(source), "--method", "rtn", "--calib", str(text)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(WORLD_SIZE="2", RANK="0"),
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: several processes share the work of --set refine=qat only; start this command without them\n"
    )
