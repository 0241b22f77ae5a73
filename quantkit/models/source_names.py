"""Which tensor of the source files is which parameter of the model."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from quantkit.errors import FileError
from quantkit.formats.safetensors_io import TensorRef


def source_names(model: Any, tensors: dict[str, TensorRef]) -> dict[str, str]:
    """Runtime name of a parameter or buffer to the name of its tensor, through the renamings of transformers itself.

    Args:
        model: a transformers model whose experts may be unfused.
        tensors: those of the source files.
    """
    from transformers.core_model_loading import rename_source_key

    state = model.state_dict()
    names = {name: name for name in tensors if name in state}
    renamings = _renamings(model)
    for source in tensors:
        if source not in names:
            renamed, _ = rename_source_key(source, renamings, [], model.base_model_prefix, state)
            names.setdefault(renamed, source)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():  # files hold one of a tied pair
        for stored, other in ((target, source), (source, target)):
            if stored in names:
                names.setdefault(other, names[stored])
    return names


def _renamings(model: Any) -> list[Any]:
    """The model's renamings, and those of its experts: the files of some families say w1, w3, w2."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = []
    for conversion in get_model_conversion_mapping(model):
        if isinstance(conversion, WeightRenaming):
            renamings.append(conversion)
            continue
        for tail, name in _expert_linears(conversion):
            if tail != name:
                renamings.append(WeightRenaming(rf"\.experts\.(\d+)\.{tail}\.", rf".experts.\1.{name}."))
    return renamings


def _expert_linears(conversion: Any) -> list[tuple[str, str]]:
    """Names of one expert's linears, in the files and here, when the conversion is one that stacks experts."""
    target = str(conversion.target_patterns[0])
    if re.search(r"experts\.gate_up_proj$", target):
        ours = ["gate_proj", "up_proj"]
    elif re.search(r"experts\.down_proj$", target):
        ours = ["down_proj"]
    else:
        return []
    tails = [source.rpartition("experts.*.")[2].removesuffix(".weight") for source in conversion.source_patterns]
    return list(zip(tails, ours, strict=True)) if len(tails) == len(ours) else []


def split_stacked(
    model: nn.Module, unfused: list[str], names: dict[str, str], tensors: dict[str, TensorRef]
) -> dict[str, TensorRef]:
    """Stacked expert weights of the files as one tensor per linear: byte ranges of the same file.

    Args:
        model: with its experts unfused.
        unfused: runtime names of those modules.
        names: `source_names` of the model before that.
        tensors: those of the source files; not changed.

    Raises:
        FileError: a stacked tensor has another shape than the model's experts.
    """
    split = dict(tensors)
    for experts in unfused:
        n_experts = len(list(model.get_submodule(experts).children()))
        for stacked, linears in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            source = names.get(f"{experts}.{stacked}")
            if source is None:
                continue
            shape = tuple(model.get_submodule(f"{experts}.0.{linears[0]}").weight.shape)  # type: ignore[arg-type]
            prefix = source.removesuffix(f".{stacked}")
            for part, ref in enumerate(_parts(split.pop(source), n_experts, len(linears), shape)):
                index, linear = divmod(part, len(linears))
                name = f"{prefix}.{index}.{linears[linear]}.weight"
                split[name] = replace(ref, name=name)
    return split


def _parts(ref: TensorRef, n_experts: int, n_linears: int, shape: tuple[int, ...]) -> list[TensorRef]:
    """``[n_experts, n_linears * out, in]`` cut into ``n_experts * n_linears`` matrices ``[out, in]``, in file order."""
    required = (n_experts, n_linears * shape[0], shape[1])
    if ref.shape != required:
        found = list(ref.shape)
        raise FileError(f"{ref.path}: tensor {ref.name} has shape {found}, the model needs {list(required)}")
    n_bytes = prod(shape) * ref.torch_dtype.itemsize
    count = n_experts * n_linears
    return [replace(ref, shape=shape, offset=ref.offset + part * n_bytes, n_bytes=n_bytes) for part in range(count)]
