"""Capture against hooks on the dense model, disk against memory, and models that do not fit the scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build
from torch import Tensor, nn

from quantkit.calib.hidden_states import BlockCalls, HiddenStates, capture_block_inputs
from quantkit.errors import FileError, RequestError

SAMPLES = [torch.randint(4, 260, (1, 20), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def blocks_of(model: Any) -> list[nn.Module]:
    decoder = model.get_decoder()
    return list(decoder.layers)


def first_of(output: Any) -> Tensor:
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def captured(model: Any, hidden: HiddenStates) -> BlockCalls:
    with torch.no_grad():
        return capture_block_inputs(
            lambda ids: model(input_ids=ids, use_cache=False), iter(SAMPLES), blocks_of(model), hidden
        )


def dense_inputs(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of all blocks in the model's own forward."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    handles = []
    for block in blocks_of(model):
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        )
        handles.append(block.register_forward_hook(lambda _, __, output: outputs.append(first_of(output))))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, outputs


# --- capture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_called_alone_compute_what_the_model_computes(family: str) -> None:
    """Bit for bit, sample by sample: the first input, each block's output, hence masks, rotations and all."""
    model = build(family)
    hidden = HiddenStates()
    calls = captured(model, hidden)
    assert len(hidden) == len(SAMPLES)
    for index, ids in enumerate(SAMPLES):
        inputs, outputs = dense_inputs(model, ids)
        assert torch.equal(hidden[index], inputs[0])
        for number, block in enumerate(blocks_of(model)):
            with torch.no_grad():
                hidden[index] = first_of(block(hidden[index], **calls[number][index]))
            assert torch.equal(hidden[index], outputs[number]), number


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_blocks_need_no_weights_and_are_restored(family: str) -> None:
    """Weights of NaN change nothing, and afterwards the model runs its own blocks again."""
    model = build(family)
    _, expected = dense_inputs(model, SAMPLES[0])
    kept = [{name: value.clone() for name, value in block.state_dict().items()} for block in blocks_of(model)]
    for block in blocks_of(model):
        for parameter in block.parameters():
            parameter.data.fill_(float("nan"))
    hidden = HiddenStates()
    captured(model, hidden)
    assert torch.isfinite(hidden[0]).all()
    for block, state in zip(blocks_of(model), kept, strict=True):
        block.load_state_dict(state)
        assert "forward" not in vars(block)
    assert torch.equal(dense_inputs(model, SAMPLES[0])[1][-1], expected[-1])


def test_different_kinds_of_layers_get_their_own_masks() -> None:
    """gemma3 alternates sliding and full attention; within a kind, equal arguments are stored once for all samples."""
    model = build("gemma3", sliding_window=4)
    calls = captured(model, HiddenStates())
    sliding, full = calls[0], calls[1]
    differing = [key for key in full[0] if not same(sliding[0].get(key), full[0][key])]
    assert differing  # masks or rotations
    assert all(kwargs is sliding[0] for kwargs in sliding)
    assert all(kwargs is full[0] for kwargs in full)
    llama = captured(build("llama"), HiddenStates())
    assert all(kwargs is llama[0][0] for block in range(2) for kwargs in llama[block])


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and bool(left == right)


def test_samples_of_different_length_keep_their_own_arguments() -> None:
    model = build("llama")
    samples = [SAMPLES[0], SAMPLES[1][:, :7], SAMPLES[2]]
    hidden = HiddenStates()
    with torch.no_grad():
        calls = capture_block_inputs(
            lambda ids: model(input_ids=ids, use_cache=False), iter(samples), blocks_of(model), hidden
        )
    assert [state.shape[1] for state in (hidden[0], hidden[1], hidden[2])] == [20, 7, 20]
    for index, ids in enumerate(samples):
        _, outputs = dense_inputs(model, ids)
        with torch.no_grad():
            out = first_of(blocks_of(model)[0](hidden[index], **calls[0][index]))
        assert torch.equal(out, outputs[0])


class Chain(nn.Module):
    """Blocks in a row, as a model may call them in ways of its own."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Step() for _ in range(3))
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "unused":
            return x
        for block in reversed(self.blocks) if self.style == "reversed" else self.blocks:
            if self.style == "broken":
                raise ValueError("the model's own error")
            out = block(x, 0.5) if self.style == "positional" else block(x, scale=0.5)
            x = out[0] if self.style in ("tuple", "positional") else out
            if self.style == "between":
                x = x + 1
        return x


class Step(nn.Module):
    def forward(self, hidden: Tensor, scale: float, shift: float = 0.0) -> Tensor:
        return hidden * scale + shift


def capture_chain(style: str) -> tuple[Chain, HiddenStates, BlockCalls]:
    model, hidden = Chain(style), HiddenStates()
    calls = capture_block_inputs(model, iter([torch.ones(1, 4, 2)] * 2), list(model.blocks), hidden)
    return model, hidden, calls


@pytest.mark.parametrize("style", ["plain", "tuple", "positional"])
def test_ways_of_calling_blocks(style: str) -> None:
    """Element 0 of a tuple or the tensor itself; arguments by name or by position, which become names."""
    _, hidden, calls = capture_chain(style)
    assert len(hidden) == 2
    assert all(calls[block] == [{"scale": 0.5}] * 2 for block in range(3))


@pytest.mark.parametrize("style", ["reversed", "unused", "between"])
def test_models_that_do_not_pass_hidden_states_along(style: str) -> None:
    with pytest.raises(RequestError, match="the model does not pass hidden states from block to block"):
        capture_chain(style)


def test_errors_of_the_model_come_through_and_leave_it_whole() -> None:
    model = Chain("broken")
    with pytest.raises(ValueError, match="the model's own error"):
        capture_block_inputs(model, iter([torch.ones(1, 4, 2)]), list(model.blocks), HiddenStates())
    assert all("forward" not in vars(block) for block in model.blocks)


# --- storage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def every_storage(tmp_path: Path) -> dict[str, HiddenStates]:
    return {
        "none": HiddenStates("none"),
        "cpu": HiddenStates("cpu"),
        "disk": HiddenStates("disk", tmp_path),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_disk_equals_memory(every_storage: dict[str, HiddenStates], dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 5 + index, 8, generator=generator).to(dtype) for index in range(3)]
    advanced = [state * 3 for state in states]
    for storage in every_storage.values():
        for state in states:
            storage.append(state)
        assert len(storage) == 3
        for index, state in enumerate(states):
            assert torch.equal(storage[index], state)
            assert storage[index].dtype == dtype
        for index, state in enumerate(advanced):
            storage[index] = state
        for index, state in enumerate(advanced):
            assert torch.equal(storage[index], state)
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("hidden-*.bin"))]
    assert sizes == [state.nbytes for state in states]  # the states are there, and nothing else


def test_disk_holds_the_bytes(tmp_path: Path) -> None:
    storage = HiddenStates("disk", tmp_path)
    storage.append(torch.tensor([[[1.0, -2.0]]]))
    storage[0] = torch.tensor([[[0.5, 4.0]]])
    written = torch.frombuffer(bytearray((tmp_path / "hidden-00000.bin").read_bytes()), dtype=torch.float32)
    assert written.tolist() == [0.5, 4.0]


def test_files_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "hidden-00000.bin").write_bytes(b"x" * 1000)
    storage = HiddenStates("disk", tmp_path)
    storage.append(torch.zeros(1, 2, 3))
    assert (tmp_path / "hidden-00000.bin").read_bytes() == bytes(24)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    storage = HiddenStates("disk", tmp_path / "missing")
    with pytest.raises(
        FileError, match=r"cannot write .*hidden-00000.bin: No such file or directory; free space or use"
    ):
        storage.append(torch.zeros(1, 2, 3))


def test_captured_to_disk_equals_captured_to_memory(tmp_path: Path) -> None:
    model = build("llama")
    memory, disk = HiddenStates(), HiddenStates("disk", tmp_path)
    captured(model, memory)
    captured(model, disk)
    assert all(torch.equal(memory[index], disk[index]) for index in range(len(SAMPLES)))
