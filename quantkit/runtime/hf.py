"""transformers integration: after importing this module, ``from_pretrained`` loads quantkit folders.

    import quantkit.runtime.hf
    model = AutoModelForCausalLM.from_pretrained("folder")

The quantizer swaps the linears that ``quantization_config["modules"]`` lists for `PackedLinear` while the model is on
the meta device; the ordinary loader then fills their buffers by name. Experts that the family keeps stacked are
unfused first, and the loader's rules that would stack them again are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit.errors import FileError
from quantkit.formats.checkpoint import (
    QUANT_METHOD,
    PackedModule,
    check_tensors,
    check_values,
    has_tripwire,
    parse_modules,
    read_header,
)
from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.models.embeddings import embedding_scale
from quantkit.models.experts import unfuse_experts
from quantkit.runtime.packed_embedding import PackedEmbedding, TiedHead
from quantkit.runtime.packed_linear import PackedLinear, PackedWeight


class QuantkitConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """``quantization_config`` of a quantkit folder, kept as it is in ``config.json`` and written back unchanged."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)
        self.quant_method = QUANT_METHOD


class QuantkitQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Loads packed folders; it never quantizes (that is ``quantkit.quantize``)."""

    requires_calibration = True

    def __init__(self, quantization_config: QuantkitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.modules = parse_modules(quantization_config.to_dict())
        self.unfused: list[str] = []
        self.shapes: dict[str, Any] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        """`generate` on a static cache may compile the step: products are operators that a compiler keeps."""
        return True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        tensors = {name: ref for file in checkpoint_files or () for name, ref in read_header(Path(file)).items()}
        if tensors:
            check_tensors(self.modules, tensors)
        if not all(_has_module(model, name) for name in self.modules):
            self.unfused = unfuse_experts(model)
        for module in self.modules.values():
            _swap(model, module)
        _untie_packed_head(model, self.modules)
        _share_packed_embedding(model, self.modules)
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """Keep the experts apart: replace each rule that stacks them by renamings to our names."""
        if not self.unfused:
            return weight_conversions
        kept: list[Any] = []
        for conversion in weight_conversions:
            if isinstance(conversion, WeightConverter) and _stacks_experts(conversion):
                kept += _expert_renamings(conversion)
            else:
                kept.append(conversion)
        return kept

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._check_shapes(model)
        self._cast_renamed(model)
        for name, module in model.named_modules():
            if not isinstance(module, PackedWeight) or any(tensor.is_meta for tensor in module.buffers()):
                continue  # meta: offloaded, an accelerate hook reads the tensors for each call
            check_values(name, module.spec, module.stored_tensors())
            module.weight = module.weight.to(model.dtype)  # as loaded it is float16, like in the file
            module.use_device_form()
        return model

    def _cast_renamed(self, model: Any) -> None:
        """transformers 5.17 keeps the file's dtype of every parameter that the file calls otherwise than the model."""
        kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        for name, parameter in model.named_parameters():
            required = self.dtypes.get(name, parameter.dtype)
            if parameter.dtype != required and not parameter.is_meta and not kept & set(name.split(".")):
                parameter.data = parameter.data.to(required)

    def _check_shapes(self, model: nn.Module) -> None:
        """transformers 5.17 takes any shape while a quantizer is active."""
        for name, tensor in sorted(model.state_dict().items()):
            required = self.shapes.get(name, tensor.shape)
            if tensor.shape != required:
                found = list(tensor.shape)
                raise FileError(f"tensor {name} is {found} in the files, {list(required)} in the model of config.json")


def register() -> None:
    """Make transformers know ``quant_method: "quantkit"``; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(QuantkitConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(QuantkitQuantizer)


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _swap(model: nn.Module, packed: PackedModule) -> None:
    """Put a `PackedLinear` or a `PackedEmbedding` where the model has the module of that name."""
    if not _has_module(model, packed.name):
        raise FileError(
            f"quantization_config: the model has no module {packed.name}; wrong config.json for these files"
        )
    module = model.get_submodule(packed.name)
    if not isinstance(module, nn.Linear | nn.Embedding):
        kind = type(module).__name__
        raise FileError(f"quantization_config: module {packed.name} is a {kind}, only linears are packed")
    found = tuple(module.weight.shape)
    required = (packed.spec.out_features, packed.spec.in_features)
    if found != required:
        raise FileError(f"quantization_config: module {packed.name} is {found} in the model, {required} in its spec")
    parent, _, child = packed.name.rpartition(".")
    replacement = _packed_linear(packed, module) if isinstance(module, nn.Linear) else _packed_embedding(packed, module)
    setattr(model.get_submodule(parent), child, replacement.train(module.training))


def _packed_linear(packed: PackedModule, linear: nn.Linear) -> PackedLinear:
    return PackedLinear(
        packed.spec,
        bias=linear.bias is not None,
        dtype=linear.weight.dtype,
        tripwire=has_tripwire(packed.name),
        device=linear.weight.device,
    )


def _packed_embedding(packed: PackedModule, embedding: nn.Embedding) -> PackedEmbedding:
    spec = packed.spec
    if not isinstance(spec, GroupedIntSpec) or len(spec.segments) > 1:
        raise FileError(f"quantization_config: module {packed.name} is an embedding, which is stored in one width only")
    scale = embedding_scale(embedding)
    return PackedEmbedding(spec, scale=scale, dtype=embedding.weight.dtype, device=embedding.weight.device)


def _untie_packed_head(model: Any, modules: dict[str, PackedModule]) -> None:
    """A packed output head no longer shares the embedding, whatever the source model's config says."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    packed = {target for target in tied if target.removesuffix(".weight") in modules}
    if packed:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {target: source for target, source in tied.items() if target not in packed}


def _share_packed_embedding(model: Any, modules: dict[str, PackedModule]) -> None:
    """A head that the model ties to an embedding computes from the embedding's packed table."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    shared = {target: source for target, source in tied.items() if source.removesuffix(".weight") in modules}
    for target, source in shared.items():
        name = target.removesuffix(".weight")
        embedding, head = model.get_submodule(source.removesuffix(".weight")), model.get_submodule(name)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, TiedHead(embedding, head.bias).train(head.training))
    if shared:  # there is no weight left to tie, now or when tie_weights() reads the class's rules again
        model.all_tied_weights_keys = {key: value for key, value in tied.items() if key not in shared}
        model._tied_weights_keys = dict(model.all_tied_weights_keys)


def _stacks_experts(conversion: Any) -> bool:
    return any(re.search(r"experts\.(gate_up_proj|down_proj)$", target) for target in conversion.target_patterns)


def _expert_renamings(conversion: Any) -> list[Any]:
    """Renamings for families whose files say w1, w3, w2; none for those that say gate_proj, up_proj, down_proj."""
    names = ["down_proj"] if conversion.target_patterns[0].endswith("down_proj") else ["gate_proj", "up_proj"]
    matches = [re.search(r"experts\.\*\.(\w+)\.weight$", source) for source in conversion.source_patterns]
    if len(matches) != len(names) or not all(matches):
        return []  # the files stack the experts already: there is no per-expert name to translate
    tails = [match[1] for match in matches if match]
    pairs = [(tail, name) for tail, name in zip(tails, names, strict=True) if tail != name]
    return [WeightRenaming(rf"\.experts\.(\d+)\.{tail}\.", rf".experts.\1.{name}.") for tail, name in pairs]


register()
