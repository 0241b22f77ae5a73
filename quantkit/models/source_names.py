"""Which tensor of the source files is which parameter of the model."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from quantkit.errors import FileError, RequestError
from quantkit.formats.safetensors_io import TensorRef


def source_names(model: Any, tensors: dict[str, TensorRef]) -> dict[str, str]:
    """Runtime name of a parameter or buffer to the name of its tensor, through the renamings of transformers itself.

    Args:
        model: a transformers model whose experts may be unfused.
        tensors: those of the source files.

    Raises:
        RequestError: the files keep a tensor in another layout (transposed, interleaved, cut in other pieces), which
            transformers converts while it loads.
    """
    from transformers.core_model_loading import rename_source_key

    state = model.state_dict()
    renamings, converters = _conversions(model)
    names = {name: name for name in tensors if name in state}
    for source in tensors:
        renamed, converted = rename_source_key(source, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            kind = type(model).__name__
            raise RequestError(
                f"tensor {source} is stored in another layout than {kind} computes with (as {renamed}); "
                "checkpoints that are converted while they are loaded are not supported"
            )
        if source not in names:
            names.setdefault(renamed, source)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():  # files hold one of a tied pair
        for stored, other in ((target, source), (source, target)):
            if stored in names:
                names.setdefault(other, names[stored])
    return names


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """The model's renamings, with those of its experts (some files say w1, w3, w2), and what is no mere renaming."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings, converters = [], []
    for conversion in get_model_conversion_mapping(model):
        linears = _expert_linears(conversion)
        if isinstance(conversion, WeightRenaming):
            renamings.append(conversion)
        elif not linears:
            converters.append(conversion)
        for tail, name in linears:
            if tail != name:
                renamings.append(WeightRenaming(rf"\.experts\.(\d+)\.{tail}\.", rf".experts.\1.{name}."))
    return renamings, converters


def _expert_linears(conversion: Any) -> list[tuple[str, str]]:
    """Names of one expert's linears, in the files and here, when the conversion is one that stacks experts."""
    target = str(conversion.target_patterns[0])
    if re.search(r"experts\.gate_up_proj$", target):
        ours = ["gate_proj", "up_proj"]
    elif re.search(r"experts\.down_proj$", target):
        ours = ["down_proj"]
    else:
        return []
    found = [re.search(r"experts\.\*\.(\w+)\.weight$", source) for source in conversion.source_patterns]
    tails = [match[1] for match in found if match]  # none where the files stack the experts themselves
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
