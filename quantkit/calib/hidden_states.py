"""The calibration set on its way through the model: what enters the first block, kept and advanced block by block."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import FileError, RequestError


class _Captured(Exception):
    """Raised by the last block's stand-in: nothing after the blocks needs to run."""


class HiddenStates:
    """Hidden states of every calibration sample, one tensor ``[1, seq_len, hidden]`` each.

    They stay on the compute device, on the CPU, or in a memory-mapped file of ``folder`` (``offload="disk"``).
    """

    def __init__(self, offload: str = "cpu", folder: Path | None = None, name: str = "hidden") -> None:
        self._offload = offload
        self._folder = folder
        self._name = name
        self._samples: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._samples)

    def append(self, hidden: Tensor) -> None:
        self._samples.append(self._empty(len(self._samples), hidden) if self._offload == "disk" else hidden)
        self[len(self._samples) - 1] = hidden

    def __getitem__(self, index: int) -> Tensor:
        return self._samples[index]

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        if self._offload == "disk":
            self._samples[index].copy_(hidden)
        else:
            self._samples[index] = hidden.cpu() if self._offload == "cpu" else hidden

    def _empty(self, index: int, like: Tensor) -> Tensor:
        assert self._folder is not None
        path = self._folder / f"{self._name}-{index:05d}.bin"
        path.unlink(missing_ok=True)  # a fresh file: an older one may have another size
        _reserve(path, like.numel() * like.itemsize)
        mapped = torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype)
        return mapped.reshape(like.shape)


def _reserve(path: Path, n_bytes: int) -> None:
    """Take the disk blocks now: a disk that fills up under a memory map kills the process without a message."""
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise FileError(f"cannot write {path}: {error.strerror}; free space or use --offload cpu") from error


class BlockCalls:
    """Keyword arguments with which the model calls each block, per sample; equal ones are stored once."""

    def __init__(self, n_blocks: int) -> None:
        self._kwargs: list[list[dict[str, Any]]] = [[] for _ in range(n_blocks)]

    def append(self, block: int, kwargs: dict[str, Any]) -> None:
        known = [calls[-1] for calls in (self._kwargs[block], *self._kwargs[:block]) if calls]
        same = next((other for other in known if _equal(kwargs, other)), None)
        self._kwargs[block].append(kwargs if same is None else same)

    def __getitem__(self, block: int) -> list[dict[str, Any]]:
        return self._kwargs[block]


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or (left.dtype == right.dtype and torch.equal(left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(_equal, left, right))
    return type(left) is type(right) and bool(left == right)


def capture_block_inputs(
    run: Callable[[Any], Any], samples: Iterator[Any], blocks: list[nn.Module], hidden: HiddenStates
) -> BlockCalls:
    """Run the model's own forward with identities in place of the blocks.

    The model decides what each block is called with (masks, rotary embeddings, per layer type where they differ); none
    of it depends on what the blocks compute, so the blocks need no weights yet.

    Args:
        run: calls the model on one sample.
        samples: the calibration samples.
        blocks: the decoder blocks.
        hidden: empty; receives the input of the first block for every sample.

    Raises:
        RequestError: the model does not call its blocks one after the other with hidden states first.
    """
    calls = BlockCalls(len(blocks))
    returns_tuple = False
    for sample in samples:
        stand_ins = _StandIns(blocks, hidden, calls, returns_tuple)
        returns_tuple = stand_ins.run(partial(run, sample))
    return calls


def run_behind(run: Callable[[], Any], blocks: list[nn.Module], hidden: Tensor) -> Any:
    """The model's own forward on what its last block might put out: norm, output head, and what else follows.

    Args:
        run: calls the model on any sample and returns its logits.
        blocks: the decoder blocks; they need no weights.
        hidden: float ``[n, n_tokens, hidden]``.

    Returns:
        What `run` returns, for these hidden states.
    """

    def forward(is_last: bool, as_tuple: bool) -> Callable[..., Any]:
        def stand_in(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = hidden if is_last else hidden_states
            return (output,) if as_tuple else output

        return stand_in

    found = None
    for as_tuple in (False, True):
        for index, block in enumerate(blocks):
            block.forward = forward(index == len(blocks) - 1, as_tuple)
        try:
            found = run()
        finally:
            for block in blocks:
                del block.forward
        if found.shape[:2] == hidden.shape[:2]:  # else the model took element 0 of our tensor: it expects a tuple
            break
    return found


class _StandIns:
    """Replaces the blocks' forward for one sample."""

    def __init__(self, blocks: list[nn.Module], hidden: HiddenStates, calls: BlockCalls, returns_tuple: bool) -> None:
        self._blocks, self._hidden, self._calls = blocks, hidden, calls
        self._returns_tuple = returns_tuple
        self._passed: Tensor | None = None
        self._pending: list[dict[str, Any]] = []

    def run(self, call: Callable[[], Any]) -> bool:
        """Returns whether this model wants tuples from its blocks."""
        if not self._attempt(call):  # the model took element 0 of our tensor: it expects a tuple
            self._returns_tuple = not self._returns_tuple
            refusal = RequestError("the model does not pass hidden states from block to block; it is not supported")
            try:
                followed = self._attempt(call)
            except (TypeError, AttributeError) as error:  # it wanted no tuple either
                raise refusal from error
            if not followed:
                raise refusal
        assert self._passed is not None
        self._hidden.append(self._passed)
        for index, kwargs in enumerate(self._pending):
            self._calls.append(index, kwargs)
        return self._returns_tuple

    def _attempt(self, call: Callable[[], Any]) -> bool:
        self._passed, self._pending = None, []
        for index, block in enumerate(self._blocks):
            block.forward = self._forward(index)
        try:
            call()
        except _Captured:
            return len(self._pending) == len(self._blocks)
        finally:
            for block in self._blocks:
                del block.forward
        return False

    def _forward(self, index: int) -> Callable[..., Any]:
        signature = inspect.signature(type(self._blocks[index]).forward)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index != len(self._pending) or (index > 0 and hidden_states is not self._passed):
                raise _Captured
            self._passed = hidden_states
            positional = signature.bind_partial(None, None, *args).arguments  # None: self and the hidden states
            self._pending.append({**dict(list(positional.items())[2:]), **kwargs})
            if index == len(self._blocks) - 1:
                raise _Captured
            return (hidden_states,) if self._returns_tuple else hidden_states

        return forward
