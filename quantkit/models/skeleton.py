"""A model without its weights: built on the meta device, filled and emptied piece by piece from safetensors.

Nothing here ever holds more than what was asked for: one block, or the parts around the blocks.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from quantkit.errors import FileError, NumericalError, RequestError, first_line
from quantkit.formats.files import read_json
from quantkit.formats.safetensors_io import TensorRef, find_tensors, read_tensor
from quantkit.models.experts import unfuse_experts
from quantkit.models.source_names import source_names, split_stacked
from quantkit.models.structure import Block, describe_blocks, find_block_list

_PIECE_BYTES = 1 << 24


class Transform(Protocol):
    """What is changed about parameters as they are read, and about what is stored beside the quantized weights."""

    @property
    def touched(self) -> Collection[str]:
        """Runtime names of the parameters that it changes; all others are left alone."""

    @property
    def outside(self) -> Sequence[TensorRef]:
        """What `write_outside` writes: names, dtypes and shapes of the output, places of the source."""

    @property
    def extra_bytes(self) -> int:
        """That the output needs beyond the source: of a head that can no longer share the embedding."""

    @property
    def config_changes(self) -> dict[str, Any]:
        """Fields of config.json."""

    @property
    def multiplications(self) -> int:
        """About how many it takes per number of a weight."""

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The changed parameter: in its stored dtype if it is stored so, in more digits if it is to be quantized."""

    def block_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """What a block holds beside its quantized weights, changed, by its name in the output: norms, biases."""

    def write_outside(self, folder: Path) -> list[TensorRef]:
        """Write what is changed outside the blocks to files in ``folder``, in pieces. Raises `FileError`."""


class Skeleton:
    """A meta model, its blocks, and the place of every tensor in the source checkpoint.

    Attributes:
        config: the transformers config.
        model: the model; parameters are on the meta device unless loaded.
        blocks: the decoder blocks, in running order.
        tensors: source tensor name to `TensorRef`.
        transform: applied to each parameter as soon as it is read; None: parameters are taken as they are.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        """Build the model and find its tensors, reading none.

        Raises:
            RequestError: the folder is no language model, or is quantized already.
            FileError: files that are damaged, or lack a tensor, or hold one of another shape.
        """
        self.folder = folder
        self.transform: Transform | None = None
        self.config = _read_config(folder, trust_remote_code)
        stored = find_tensors(folder)
        self.model = _build(self.config, trust_remote_code)
        names = source_names(self.model, stored)
        unfused = unfuse_experts(self.model)
        self.tensors = split_stacked(self.model, unfused, names, stored)
        self._source_names = source_names(self.model, self.tensors)
        self.block_list = find_block_list(self.model)
        self.blocks: list[Block] = describe_blocks(self.model, self.block_list)
        self._check_complete()

    def block_module(self, index: int) -> nn.Module:
        module: nn.Module = self.model.get_submodule(self.blocks[index].name)
        return module

    def source_name(self, runtime_name: str) -> str:
        """Name of a parameter in the source files. Raises `FileError` when they do not hold it."""
        found = self._source_names.get(runtime_name)
        if found is None:
            raise FileError(f"{self.folder}: no tensor for parameter {runtime_name}; the checkpoint is incomplete")
        return found

    def read_source(self, name: str) -> torch.Tensor:
        """A parameter or buffer as it is stored, on the CPU. Raises `NumericalError` when it holds NaN or Inf."""
        ref = self.tensors[self.source_name(name)]
        tensor = read_tensor(ref)
        if not torch.isfinite(tensor).all():
            raise _damaged(ref)
        return tensor

    def load_block(self, index: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Fill one block with its weights. Raises `NumericalError` when a weight holds NaN or Inf."""
        module = self.block_module(index)
        self._fill(module, self.blocks[index].name, device, dtype)
        return module

    def read_parameter(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """One parameter by its runtime name, whatever is loaded. Raises `NumericalError` when it holds NaN or Inf."""
        return self._read(name, device, dtype)

    def release_block(self, index: int) -> None:
        """Back to the meta device, and the memory back to the system."""
        self.block_module(index).to("meta")
        _trim_heap()

    def load_surroundings(self, device: torch.device, dtype: torch.dtype, head: bool = False) -> None:
        """Fill everything around the blocks; the output head only if it is asked for."""
        output = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        for name, module in self.model.named_modules():
            if (module is output and not head) or self.in_blocks(name):
                continue
            self._fill_own(module, name, device, dtype)

    def load_model(self, device: torch.device, dtype: torch.dtype) -> None:
        """Fill all of it; `release_surroundings` is the way back."""
        for name, module in self.model.named_modules():
            self._fill_own(module, name, device, dtype)
        self.model.tie_weights()

    def release_surroundings(self) -> None:
        """Back to the meta device, the blocks included."""
        self.model.to("meta")

    def check_surroundings(self) -> None:
        """Raise `NumericalError` when a tensor outside the blocks, which is copied as it is, holds NaN or Inf."""
        inside = {self._source_names.get(name) for name in self.model.state_dict() if self.in_blocks(name)}
        for name, ref in self.tensors.items():
            if name not in inside and ref.torch_dtype.is_floating_point:
                _check_finite(ref)

    def in_blocks(self, name: str) -> bool:
        """Whether the module or parameter of that runtime name is a part of the blocks."""
        return name == self.block_list or name.startswith(f"{self.block_list}.")

    def _check_complete(self) -> None:
        """Every parameter has a tensor of its shape; known from the headers, before any tensor is read."""
        optional = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        for name, parameter in self.model.named_parameters():
            if name not in self._source_names and any(re.search(pattern, name) for pattern in optional):
                continue
            ref = self.tensors[self.source_name(name)]
            if ref.shape != tuple(parameter.shape):
                shapes = f"has shape {list(ref.shape)}, the model of config.json needs {list(parameter.shape)}"
                raise FileError(f"{ref.path}: tensor {ref.name} {shapes}")

    def _fill(self, module: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
        for path, child in module.named_modules():
            self._fill_own(child, f"{name}.{path}" if path else name, device, dtype)

    def _fill_own(self, module: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
        """The module's own parameters and buffers, not those of its children."""
        prefix = f"{name}." if name else ""
        derived = derived_buffers(module)
        persistent = {key for key, _ in module.named_buffers(recurse=False)} - set(derived)
        if derived:
            recompute_buffers(self.model, module, name, derived, device)
        for key, _ in list(module.named_parameters(recurse=False)):
            tensor = self._read(f"{prefix}{key}", device, dtype)
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        for key in persistent:
            buffer = module.get_buffer(key)
            wanted = dtype if buffer.is_floating_point() else buffer.dtype
            module._buffers[key] = self._read(f"{prefix}{key}", device, wanted).reshape(buffer.shape)

    def _read(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        tensor = self.read_source(name).to(device)
        if self.transform is not None and name in self.transform.touched:
            tensor = self.transform(name, tensor)
        converted = tensor.to(dtype)
        if dtype == torch.float16 and not torch.isfinite(converted).all():
            raise NumericalError(f"{self.source_name(name)} does not fit into float16; use --dtype bfloat16 or float32")
        return converted


def recompute_buffers(model: Any, module: nn.Module, name: str, keys: list[str], device: torch.device) -> None:
    """Rotary frequencies, embedding scales: set by the model's own initialization, whatever was there before.

    Raises:
        RequestError: the initialization leaves a buffer as it is.
    """
    outcomes = []
    for filler in (0, 1):
        for key in keys:
            module._buffers[key] = torch.full_like(module.get_buffer(key), filler, device=device)
        with torch.no_grad():
            _owner(model, name)._init_weights(module)
        outcomes.append([module.get_buffer(key).clone() for key in keys])
    for key, first, second in zip(keys, *outcomes, strict=True):
        if not torch.equal(first, second):
            raise RequestError(
                f"{name}: its buffer {key} is neither in the files nor recomputed from the config; "
                f"{type(model).__name__} is not supported"
            )


def derived_buffers(module: nn.Module) -> list[str]:
    """Names of the module's own buffers that no checkpoint holds."""
    stored = set(module.state_dict(keep_vars=True))
    return [key for key, _ in module.named_buffers(recurse=False) if key not in stored]


def _owner(model: Any, name: str) -> Any:
    """The innermost transformers model around a module: the one that knows how to initialize it."""
    owner: Any = model
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        candidate = model.get_submodule(".".join(parts[:end]))
        if hasattr(candidate, "_init_weights"):
            owner = candidate
    return owner


def _trim_heap() -> None:
    """glibc keeps pages between live pieces of its heap; over 56 blocks of 4 MiB they came to 50 MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def _check_finite(ref: TensorRef) -> None:
    """The tensor in pieces: an embedding can be larger than a block."""
    size = ref.torch_dtype.itemsize
    for start in range(0, ref.n_bytes, _PIECE_BYTES):
        n_bytes = min(_PIECE_BYTES, ref.n_bytes - start)
        piece = replace(ref, shape=(n_bytes // size,), offset=ref.offset + start, n_bytes=n_bytes)
        if not torch.isfinite(read_tensor(piece).float()).all():
            raise _damaged(ref)


def _damaged(ref: TensorRef) -> NumericalError:
    return NumericalError(f"{ref.path.name}: tensor {ref.name} holds NaN or Inf; the checkpoint is damaged")


def _read_config(folder: Path, trust_remote_code: bool) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    read_json(folder / "config.json")  # its errors say more
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise RequestError(
            f"{folder}: config.json cannot be read as a transformers model ({_first_line(error)})"
        ) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        how = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise RequestError(f"{folder}: the model is quantized already ({how}); start from the unquantized model")
    return config


def _build(config: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    writes = type(config) in AutoModelForCausalLM._model_mapping
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    kind = AutoModelForImageTextToText if sees and not writes else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    except ValueError as error:
        raise RequestError(
            f"{type(config).__name__}: this is no language model that can be quantized ({_first_line(error)})"
        ) from error
    return model.eval().requires_grad_(False)


def _first_line(error: BaseException) -> str:
    if isinstance(error.__cause__, TypeError):  # of a field's type; what wraps it says less
        error = error.__cause__
    return first_line(error)
