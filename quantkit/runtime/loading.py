"""`load` and `load_tokenizer`: a quantkit folder, an ordinary model folder, a hub id or ``demo``, with named errors."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

import quantkit.runtime.hf  # noqa: F401 - registers the quantizer with transformers
from quantkit.errors import FileError, RequestError, first_line
from quantkit.formats.checkpoint import QUANT_METHOD, find_tensors, open_folder, verify_checksums
from quantkit.formats.files import read_json
from quantkit.models.modality import sees_images

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model for inference: packed by quantkit, or an ordinary one.

    Args:
        path: a model folder, a hub id such as ``"org/name"``, or ``"demo"`` for the embedded model.
        device: where the whole model goes; "auto" is CUDA if there is a device, else the CPU. None: the CPU, or what
            ``device_map`` says.
        dtype: of everything that is not packed, such as "float32"; None: as the model's config says.
        verify: compare every file with ``checksums.json`` first.
        trust_remote_code: allow code from the model folder to run; needed by very few models.
        kwargs: passed to ``from_pretrained``: ``device_map="auto"``, ``attn_implementation``, and so on.

    Returns:
        A transformers model in evaluation mode.

    Raises:
        FileError: not there, incomplete, damaged, or not reachable without network.
        RequestError: an unknown dtype or device, ``device`` together with ``device_map``, an unsupported architecture.
    """
    source = resolve(path)
    if isinstance(source, Path):
        _check_folder(source, verify)
    elif verify:
        raise RequestError(f"verify needs a local folder, {source} is a hub id; download it first")
    options = dict(kwargs, trust_remote_code=trust_remote_code)
    config = _read_config(source, options)
    model_class = AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
    options |= _placement(device, kwargs)
    options["dtype"] = _parse_dtype(dtype)
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _no_loading_report():
            model, info = model_class.from_pretrained(source, config=config, **options)
    except OSError as error:
        raise FileError(f"{source}: the model cannot be loaded: {first_line(error)}") from error
    except ValueError as error:
        raise RequestError(f"{source}: the model cannot be loaded: {first_line(error)}") from error
    _check_complete(source, info)
    loaded: PreTrainedModel = model
    return loaded


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, a hub id or ``"demo"``. Raises `FileError` when there is none."""
    source = resolve(path)
    if isinstance(source, Path) and not any((source / name).is_file() for name in _TOKENIZER_FILES):
        raise FileError(f"{source}: no tokenizer (tokenizer.json or the like); copy it from the original model")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise FileError(f"{source}: the tokenizer cannot be loaded: {first_line(error)}") from error


def load_processor(path: str | Path, *, trust_remote_code: bool = False) -> ProcessorMixin:
    """The processor of a vision-language model: its tokenizer and its image processor.

    Raises:
        FileError: there is none, or a package that it needs is missing.
    """
    source = resolve(path)
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise FileError(f"{source}: the processor cannot be loaded: {first_line(error)}") from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise FileError(f"{source}: no processor for pictures (processor_config.json or preprocessor_config.json)")
    return processor


def resolve(path: str | Path) -> Path | str:
    """An existing folder as a `Path`, a hub id unchanged. Raises `FileError` for everything else.

    >>> resolve("no/such/folder")
    Traceback (most recent call last):
        ...
    quantkit.errors.FileError: no folder no/such/folder
    """
    if str(path) == "demo" and not Path("demo").is_dir():
        from quantkit.demo import model_path  # imported here: only this name needs the embedded model

        return model_path()
    if path == "":
        raise FileError("no folder given")
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileError(f"{folder} is a file; give the folder of the model")
    if isinstance(path, str) and _HUB_ID.fullmatch(path) and not Path(path).parent.is_dir():
        return path
    raise FileError(f"no folder {path}")


def _check_folder(folder: Path, verify: bool) -> None:
    """Everything that can be known before transformers is asked; its own messages are for other cases."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileError(f"{folder}: no config.json; give the folder of a model")
    if verify:
        verify_checksums(folder)
    quantization = read_json(config_file).get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        open_folder(folder)
    else:
        find_tensors(folder)


def _read_config(source: Path | str, options: dict[str, Any]) -> Any:
    hub = {name: options[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in options}
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=options["trust_remote_code"], **hub)
    except OSError as error:
        if isinstance(source, Path):
            raise FileError(f"{source}: config.json cannot be used: {first_line(error)}") from error
        raise FileError(
            f"no folder {source} here, and no such model in the local hub cache or on the hub, or no network"
        ) from error
    except (ValueError, KeyError) as error:
        raise FileError(f"{source}: config.json cannot be used: {first_line(error)}") from error


@contextmanager
def _no_loading_report() -> Iterator[None]:
    """Keep transformers from logging its table of missing and mismatched tensors: `_check_complete` names the first."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _check_complete(source: Path | str, info: dict[str, Any]) -> None:
    """Refuse what transformers would initialize at random."""
    for name in sorted(info["missing_keys"]):
        raise FileError(f"{source}: tensor {name} is missing; the folder is not complete, copy it again")
    for name, found, required in sorted(info["mismatched_keys"]):
        raise FileError(
            f"{source}: tensor {name} is {list(found)} in the files, {list(required)} in the model of config.json"
        )


def _placement(device: str | torch.device | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """``from_pretrained`` arguments for a device."""
    if device is None:
        # packed weights are buffers: an offloaded module would otherwise stay where it runs
        return {"offload_buffers": True} if "device_map" in kwargs and "offload_buffers" not in kwargs else {}
    if "device_map" in kwargs:
        raise RequestError("give either device or device_map, not both")
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"unknown device {device!r}; use cpu, cuda, cuda:1 or auto") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device {str(device)!r}: no CUDA device is available here; use cpu")
    return {"device_map": {"": target}}


def _parse_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None or dtype == "auto":
        return "auto"
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise RequestError(f"unknown dtype {dtype!r}; use float32, bfloat16 or float16")
    return parsed
