"""A request made concrete: its model, device, calibration set, and the settings that decide about the bytes."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantkit import __version__
from quantkit.calib.datasets import load_calibration
from quantkit.calib.pictures import CalibrationSet, holds_pictures, load_pictures
from quantkit.errors import RequestError
from quantkit.models.hub import download
from quantkit.models.modality import sees_images
from quantkit.models.skeleton import Skeleton
from quantkit.pipeline.outside import packed_parameters
from quantkit.pipeline.request import QuantizeRequest
from quantkit.pipeline.rotate import StreamRotation
from quantkit.runtime.loading import load_processor, load_tokenizer
from quantkit.runtime.loading import resolve as resolve_model


def open_model(request: QuantizeRequest) -> tuple[Skeleton, torch.device]:
    """The model without its weights, with the recipe's transform, and where it will be computed.

    Raises:
        RequestError: no usable device of that name; a model that cannot be quantized, or not be transformed.
        FileError: no such model, or one with damaged files.
    """
    device = _device(request.device)
    found = resolve_model(request.model)
    folder = found if isinstance(found, Path) else download(found)
    skeleton = Skeleton(folder, trust_remote_code=request.trust_remote_code)
    if request.recipe.transform == "hadamard":
        skeleton.transform = StreamRotation(
            skeleton,
            request.seed,
            device,
            values=request.recipe.rotate_values,
            packed=packed_parameters(skeleton, request.recipe),
        )
    return skeleton, device


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"unknown device {name!r}; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RequestError("device cuda: this machine has no usable CUDA device; use --device cpu")
    return device


def compute_dtype(request: QuantizeRequest, skeleton: Skeleton, device: torch.device) -> torch.dtype:
    """Of weights and activations of the calibration forward."""
    if request.dtype != "auto":
        return getattr(torch, request.dtype)  # type: ignore[no-any-return]
    stored = getattr(skeleton.config, "dtype", None)
    return stored if device.type != "cpu" and isinstance(stored, torch.dtype) else torch.float32


def sequence_length(skeleton: Skeleton, request: QuantizeRequest) -> int:
    """Tokens per calibration sample, with pictures at most. Raises `RequestError` beyond the model's context."""
    limit = getattr(skeleton.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2048
    if request.seq_len is not None and request.seq_len > limit:
        raise RequestError(f"seq_len {request.seq_len} exceeds the model's context of {limit} tokens")
    return request.seq_len or (limit if holds_pictures(request.calib) else min(2048, limit))


def read_calibration(request: QuantizeRequest, skeleton: Skeleton, seq_len: int) -> CalibrationSet | None:
    """See `load_pictures` and `load_calibration`, also for the errors; None when the recipe needs none.

    Raises:
        RequestError: pictures for a model that takes none, or a recipe that tells image tokens apart without pictures.
    """
    if not request.recipe.needs_calibration:
        return None
    pictures = holds_pictures(request.calib)
    if pictures and not sees_images(skeleton.config):
        raise RequestError(
            f"{Path(request.calib).name}: holds pictures, and {type(skeleton.model).__name__} takes text only; "
            "pass a text file or a folder of text files"
        )
    if request.recipe.weighs_tokens and not pictures:
        raise RequestError(
            "tokens and image_weight tell image tokens from text tokens; "
            "give --calib a folder with metadata.jsonl and pictures"
        )
    if request.template is not None and not pictures:
        raise RequestError("a template says how questions about pictures are put; --calib holds no pictures")
    if pictures:
        return load_pictures(
            request.calib,
            load_processor(skeleton.folder, trust_remote_code=request.trust_remote_code),
            skeleton.config,
            n_samples=request.n_samples,
            max_tokens=seq_len,
            seed=request.seed,
            shuffle=request.calib_shuffle,
            template=request.template,
        )
    return load_calibration(
        request.calib,
        load_tokenizer(skeleton.folder, trust_remote_code=request.trust_remote_code),
        n_samples=request.n_samples,
        seq_len=seq_len,
        seed=request.seed,
        shuffle=request.calib_shuffle,
        vocab_size=skeleton.config.get_text_config(decoder=True).vocab_size,
    )


def deciding_settings(
    request: QuantizeRequest,
    skeleton: Skeleton,
    calibration: CalibrationSet | None,
    training: CalibrationSet | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What determines the bytes of the packed tensors; weight files by size and time (a hash would read them all)."""
    files = sorted({ref.path for ref in skeleton.tensors.values()})
    return {
        "recipe": request.recipe.to_json(),
        "calibration": calibration.to_json() if calibration else None,
        **({"training": training.to_json()} if training else {}),
        "seed": request.seed,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"quantkit": __version__, "torch": torch.__version__, "transformers": version("transformers")},
        "config": hashlib.sha256((skeleton.folder / "config.json").read_bytes()).hexdigest(),
        "source": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
    }
