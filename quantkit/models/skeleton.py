"""A model without its weights: built on the meta device, filled and emptied piece by piece from safetensors.

Nothing here ever holds more than what was asked for: one block, or the parts around the blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.errors import FileError, NumericalError, RequestError
from quantkit.formats.safetensors_io import TensorRef, find_tensors, read_tensor
from quantkit.models.experts import unfuse_experts
from quantkit.models.structure import Block, describe_blocks, find_block_list


class Skeleton:
    """A meta model, its blocks, and the place of every tensor in the source checkpoint.

    Attributes:
        config: the transformers config.
        model: the model; parameters are on the meta device unless loaded.
        blocks: the decoder blocks, in running order.
        tensors: source tensor name to `TensorRef`.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        """Raises `RequestError` for a folder that is no model or is quantized already, `FileError` for damaged files."""
        self.folder = folder
        self.config = _read_config(folder, trust_remote_code)
        self.tensors = find_tensors(folder)
        self.model = _build(self.config, trust_remote_code)
        self._source_names = _source_names(self.model, self.tensors)
        unfused = unfuse_experts(self.model)
        self._source_names |= _unfused_names(self.model, unfused, self._source_names, self.tensors)
        self.block_list = find_block_list(self.model)
        self.blocks: list[Block] = describe_blocks(self.model, self.block_list)

    def block_module(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.blocks[index].name)

    def source_name(self, runtime_name: str) -> str:
        """Name of a parameter in the source files. Raises `FileError` when they do not hold it."""
        try:
            return self._source_names[runtime_name]
        except KeyError:
            raise FileError(f"{self.folder}: no tensor for parameter {runtime_name}; the checkpoint is incomplete") from None

    def load_block(self, index: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Fill one block with its weights. Raises `NumericalError` when a weight holds NaN or Inf."""
        module = self.block_module(index)
        self._fill(module, self.blocks[index].name, device, dtype)
        return module

    def release_block(self, index: int) -> None:
        """Back to the meta device."""
        self.block_module(index).to("meta")

    def load_surroundings(self, device: torch.device, dtype: torch.dtype) -> None:
        """Fill everything that runs before the blocks: all but the blocks, the output head and what follows them."""
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        for name, module in self.model.named_modules():
            if module is head or name == self.block_list or name.startswith(f"{self.block_list}."):
                continue
            self._fill_own(module, name, device, dtype)

    def release_surroundings(self) -> None:
        """Back to the meta device, the blocks included."""
        self.model.to("meta")

    def _fill(self, module: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
        for path, child in module.named_modules():
            self._fill_own(child, f"{name}.{path}" if path else name, device, dtype)

    def _fill_own(self, module: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
        """The module's own parameters and buffers, not those of its children."""
        prefix = f"{name}." if name else ""
        persistent = set(module.state_dict(keep_vars=True)) & {key for key, _ in module.named_buffers(recurse=False)}
        derived = [key for key, _ in module.named_buffers(recurse=False) if key not in persistent]
        for key in derived:
            module._buffers[key] = torch.empty_like(module._buffers[key], device=device)  # type: ignore[arg-type]
        if derived:  # rotary frequencies, embedding scales: recomputed by the model's own initialization
            with torch.no_grad():
                self._owner(name)._init_weights(module)
        for key, parameter in list(module.named_parameters(recurse=False)):
            tensor = self._read(f"{prefix}{key}", tuple(parameter.shape), device, dtype)
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        for key in persistent:
            buffer = module._buffers[key]
            assert buffer is not None
            wanted = dtype if buffer.is_floating_point() else buffer.dtype
            module._buffers[key] = self._read(f"{prefix}{key}", tuple(buffer.shape), device, wanted)

    def _read(self, name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        ref = self.tensors[self.source_name(name)]
        if ref.shape != shape:
            raise FileError(f"{ref.path}: tensor {ref.name} has shape {list(ref.shape)}, the model needs {list(shape)}")
        tensor = read_tensor(ref)
        if not torch.isfinite(tensor).all():
            raise NumericalError(f"{ref.path.name}: tensor {ref.name} holds NaN or Inf; the checkpoint is damaged")
        return tensor.to(device=device, dtype=dtype)

    def _owner(self, name: str) -> Any:
        """The innermost transformers model around a module: the one that knows how to initialize it."""
        owner: Any = self.model
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            candidate = self.model.get_submodule(".".join(parts[:end]))
            if hasattr(candidate, "_init_weights"):
                owner = candidate
        return owner


def _read_config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise RequestError(f"{folder}: config.json cannot be read as a transformers model ({first_line})") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        how = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise RequestError(f"{folder}: the model is quantized already ({how}); start from the unquantized model")
    return config


def _build(config: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForCausalLM
    if type(config) not in AutoModelForCausalLM._model_mapping and type(config) in AutoModelForImageTextToText._model_mapping:
        kind = AutoModelForImageTextToText
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _source_names(model: Any, tensors: dict[str, TensorRef]) -> dict[str, str]:
    """Runtime parameter name to source tensor name, through the renamings that transformers itself applies."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    state = model.state_dict()
    names = {name: name for name in tensors if name in state}
    renamings = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
    for source in tensors:
        if source not in names:
            renamed, _ = rename_source_key(source, renamings, [], model.base_model_prefix, state)
            names.setdefault(renamed, source)
    return names


def _unfused_names(
    model: nn.Module, unfused: list[str], names: dict[str, str], tensors: dict[str, TensorRef]
) -> dict[str, str]:
    """Source names of the experts' linears: published checkpoints store them one by one."""
    found = {}
    for experts in unfused:
        for path, _ in model.get_submodule(experts).named_parameters():
            name = f"{experts}.{path}"
            if name not in names and name in tensors:
                found[name] = name
    return found
