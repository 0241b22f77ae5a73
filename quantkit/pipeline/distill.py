"""refine=qat: the sign factors of the whole model trained by distillation from the float model.

Paper      LittleBit, arXiv:2506.13771. Loss: KL(teacher || student) of the next-token distributions, plus the squared
           distance of every block's output; AdamW without weight decay, warm-up over 2 % of the steps, then a cosine.
Trained    latents of the signs (float32, through `smooth_sign`), all scales, and the vectors of norms, which the file
           holds in 16 bits anyway; embedding and head with ``also_train=all``. Biases of linears stay as they are.
Deviates   KL is a mean over tokens and the blocks' distances are relative to the teacher's output, token by token, and
           averaged, so that neither grows with length, depth or width. The authors: sums over a sequence, times 10.
           Training starts at the factors of refine=signs; `best on held-out text` is what is kept.
Memory     one model: each linear holds its float weight and its factors, and computes with either.
Speed      on one GPU the passes of a batch are recorded once and replayed (`quantkit/pipeline/captured.py`): a small
           model spends its time on launches.
Resume     every ``check_every`` steps latents, moments and losses go to one file of the work folder, whole or not at
           all; data order and learning rate are functions of the step. On a CPU a resumed run is bit for bit the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from quantkit.errors import NumericalError, RequestError
from quantkit.formats.safetensors_io import read_header, read_tensor, write_tensors
from quantkit.pipeline.captured import Captured
from quantkit.pipeline.sign_linear import SignLinear
from quantkit.pipeline.team import Team
from quantkit.recipe import Recipe

CHECKPOINT, BEST = "training.safetensors", "training-best.safetensors"  # in the work folder
_HELD_OUT, _MAX_HELD_OUT = 16, 32  # one sequence of 16 is held out; one at least, 32 at most
_WARM_UP = 0.02
_SCALES_LR, _REST_LR = 1.0, 0.25  # shares of the latents' learning rate
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_SCALES = ("rows", "latent_scales", "columns")

Report = Callable[[int, int, float, float], None]  # (steps done, steps at most, training loss, held-out loss)


class Losses(NamedTuple):
    """Of one batch."""

    total: Tensor
    kl: Tensor  # nats per token
    blocks: Tensor  # squared distance of the blocks' outputs, relative


def split_samples(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(training, held out): the last sixteenth is held out, 32 at most. Raises `RequestError` for a single sequence."""
    n = len(input_ids)
    if n < 2:
        raise RequestError("refine=qat holds out one calibration sequence and trains on the others: give 2 or more")
    n_held_out = max(1, min(n // _HELD_OUT, _MAX_HELD_OUT))
    return input_ids[:-n_held_out], input_ids[-n_held_out:]


def learning_rate(step: int, n_steps: int, peak: float) -> float:
    """Of step 0 to n_steps - 1: linear over the first 2 %, then a cosine towards 0."""
    warm_up = max(1, round(_WARM_UP * n_steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, n_steps - warm_up)))


def sample_indices(position: int, count: int, n: int, seed: int) -> list[int]:
    """Which of n sequences stand at places ``position`` to ``position + count - 1`` of the endless stream of epochs."""
    indices: list[int] = []
    while len(indices) < count:
        epoch, first = divmod(position + len(indices), n)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)).tolist()
        indices += order[first : first + count - len(indices)]
    return indices


def distillation_loss(
    student: Tensor, teacher: Tensor, student_blocks: Sequence[Tensor], teacher_blocks: Sequence[Tensor], weight: float
) -> Losses:
    """KL of the logits ``[batch, seq_len, vocabulary]`` and the distance of block outputs ``[batch, seq_len, hidden]``.

    Args:
        weight: of the blocks' distance in the total.
    """
    logs, targets = (F.log_softmax(logits.float(), -1) for logits in (student, teacher))
    kl = (targets.exp() * (targets - logs)).sum(-1).mean()
    distances = []
    for ours, theirs in zip(student_blocks, teacher_blocks, strict=True):
        far = (ours.float() - theirs.float()).square().sum(-1)
        distances.append((far / theirs.float().square().sum(-1).clamp_min(1e-12)).mean())
    blocks = torch.stack(distances).mean()
    return Losses(kl + weight * blocks, kl, blocks)


@dataclass(slots=True)
class Progress:
    """What a checkpoint holds beside parameters and moments."""

    best: float = math.inf  # held-out loss
    losses: list[float] = field(default_factory=list)  # of every step so far
    checks: list[tuple[int, float]] = field(default_factory=list)  # (steps done, held-out loss)

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)


class Distillation:
    """Trains the `SignLinear` modules of a model.

    Args:
        model: a causal language model with `SignLinear` in place of the linears, on ``team.device``. Of its other
            parameters those are trained that require gradients; the teacher computes with what they are now.
        blocks: its decoder blocks.
        input_ids: int64 ``[n, seq_len]``, on the CPU.
        recipe: one that trains.
        seed: of the order of the sequences.
        team: the processes at work.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], input_ids: Tensor, recipe: Recipe, seed: int, team: Team
    ) -> None:
        self.recipe, self.seed, self.team = recipe, seed, team
        self.train_ids, self.held_out_ids = split_samples(input_ids)
        self.linears = {name: part for name, part in model.named_modules() if isinstance(part, SignLinear)}
        inside = {f"{name}.{key}" for name, linear in self.linears.items() for key in linear.trained()}
        self.rest = {name: part for name, part in model.named_parameters() if part.requires_grad and name not in inside}
        self.originals = {name: part.detach().clone() for name, part in self.rest.items()}
        self.blocks = blocks
        self.model, self.wrapped = model, team.wrap(model)
        latents = [part for linear in self.linears.values() for part in (linear.left, linear.right)]
        scales = [linear.get_parameter(name) for linear in self.linears.values() for name in _SCALES]
        groups = [{"params": latents, "share": 1.0}, {"params": scales, "share": _SCALES_LR}]
        groups += [{"params": list(self.rest.values()), "share": _REST_LR}] if self.rest else []
        self._is_fused = team.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            groups, lr=recipe.highest_lr, betas=(0.9, 0.999), weight_decay=0.0, fused=self._is_fused
        )
        self.progress = Progress()
        self._backward: Callable[[Tensor], Tensor] = self._backward_of
        if self._is_fused and team.size == 1:
            self._backward = Captured(self._backward_of, list(self._trained().values()), team.device)

    def run(self, folder: Path, report: Report) -> None:
        """Train to the end, going on from the checkpoint in ``folder`` if there is one; then load the best.

        Raises:
            NumericalError: the loss became NaN or infinite.
            FileError: the folder cannot be written.
        """
        self.team.wait()  # followers: until the leader has finished its walk
        resumed = (folder / CHECKPOINT).exists()
        self.team.wait()
        if resumed:
            self._load(folder)
        else:
            self._check(folder)  # the start is the first candidate
        recipe, progress = self.recipe, self.progress
        while progress.step < recipe.steps and not self._has_stalled():
            progress.losses.append(self._step(progress.step))
            if progress.step % recipe.check_every and progress.step < recipe.steps:
                continue
            last = progress.checks[-1][0]
            self._check(folder)
            recent = progress.losses[last:]
            report(progress.step, recipe.steps, sum(recent) / len(recent), progress.checks[-1][1])
        self.team.wait()
        self._set_trained(_read(folder / BEST))

    def _step(self, step: int) -> float:
        recipe, team = self.recipe, self.team
        rate = learning_rate(step, recipe.steps, recipe.highest_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self.optimizer.zero_grad(set_to_none=False)  # a recorded pass adds to the same memory every time
        total = 0.0
        for micro in range(recipe.accumulate):
            position = ((step * recipe.accumulate + micro) * team.size + team.rank) * recipe.batch
            ids = self.train_ids[sample_indices(position, recipe.batch, len(self.train_ids), self.seed)]
            with nullcontext() if micro == recipe.accumulate - 1 else team.no_sync(self.wrapped):
                total += team.mean(self._backward(ids.to(team.device)))
        if not math.isfinite(total):
            raise NumericalError(
                f"training: the loss is {total} at step {step}; use a --set lr below {recipe.highest_lr:g}"
            )
        self.optimizer.step()
        return total

    def _backward_of(self, ids: Tensor) -> Tensor:
        """The loss of one batch, its gradients added to those of the parameters."""
        loss = self._losses(self.wrapped, ids).total / self.recipe.accumulate
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        return loss.detach()

    def _losses(self, model: nn.Module, ids: Tensor) -> Losses:
        """Teacher and student on the same sequences ``[batch, seq_len]``; gradients flow if they are enabled."""
        ids = ids.to(self.team.device)
        half = torch.autocast(self.team.device.type, torch.bfloat16, enabled=self.team.device.type == "cuda")
        with half, torch.no_grad(), self._teaching():
            teacher, teacher_blocks = self._forward(self._teacher, ids)
        with half:
            student, student_blocks = self._forward(model, ids)
        return distillation_loss(student, teacher, student_blocks, teacher_blocks, self.recipe.intermediate)

    def _teacher(self, **inputs: Any) -> Any:
        return functional_call(self.model, self.originals, kwargs=inputs)

    def _forward(self, model: Callable[..., Any], ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        outputs: list[Tensor] = []

        def keep(block: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits, outputs

    @contextmanager
    def _teaching(self) -> Iterator[None]:
        for linear in self.linears.values():
            linear.teaching = True
        try:
            yield
        finally:
            for linear in self.linears.values():
                linear.teaching = False

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        batches = torch.split(self.held_out_ids, self.recipe.batch)
        return sum(float(self._losses(self.model, ids).total) * len(ids) for ids in batches) / len(self.held_out_ids)

    def _has_stalled(self) -> bool:
        """No check of the last ``patience`` was better than those before."""
        patience, losses = self.recipe.patience, [loss for _, loss in self.progress.checks]
        return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])

    def _check(self, folder: Path) -> None:
        """Measure on held-out text, keep the parameters if they are the best, and write a checkpoint."""
        loss, progress = self._held_out_loss(), self.progress
        progress.checks.append((progress.step, loss))
        is_best = loss < progress.best
        progress.best = min(loss, progress.best)
        if self.team.rank:
            return
        trained = {name: parameter.detach() for name, parameter in self._trained().items()}
        if is_best:
            write_tensors(folder / BEST, trained)
        numbers = {
            "losses": torch.tensor(progress.losses, dtype=torch.float64),
            "checks": torch.tensor(progress.checks, dtype=torch.float64).reshape(-1, 2),
        }
        write_tensors(folder / CHECKPOINT, trained | self._moments() | numbers)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{key}": parameter
            for name, linear in self.linears.items()
            for key, parameter in linear.trained().items()
        } | self.rest

    def _moments(self) -> dict[str, Tensor]:
        """Of AdamW, by parameter; nothing before the first step."""
        state = self.optimizer.state
        return {
            f"{name}.{key}": state[parameter][key]
            for name, parameter in self._trained().items()
            for key in (_MOMENTS if parameter in state else ())
        }

    def _load(self, folder: Path) -> None:
        tensors = _read(folder / CHECKPOINT)
        self._set_trained(tensors)
        checks = [(int(step), loss) for step, loss in tensors["checks"].tolist()]
        self.progress = Progress(min(loss for _, loss in checks), tensors["losses"].tolist(), checks)
        for name, parameter in self._trained().items():
            found = {key: tensors[f"{name}.{key}"] for key in _MOMENTS if f"{name}.{key}" in tensors}
            if found:
                moments = {key: found[key].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
                counter = found["step"].to(parameter.device if self._is_fused else "cpu")
                self.optimizer.state[parameter] = {"step": counter, **moments}

    def _set_trained(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._trained().items():
            parameter.data.copy_(tensors[name])


def _read(path: Path) -> dict[str, Tensor]:
    return {name: read_tensor(ref) for name, ref in read_header(path).items()}
