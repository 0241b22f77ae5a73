"""Model folders: local ones as they are, hub ids through the local cache or a download."""

from __future__ import annotations

from pathlib import Path

from quantkit.errors import FileError, first_line

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "README.md"]


def download(model_id: str) -> Path:
    """The folder of a hub model, downloaded unless the cache has it.

    Raises:
        FileError: no such model, no permission, or no network.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, allow_patterns=_WANTED))
    except Exception as error:  # the hub's client raises a dozen unrelated classes; each means: not to be had
        raise FileError(
            f"{model_id}: no such folder here, and it cannot be fetched from the hub ({first_line(error)}); "
            "check the name, the network, or pass a local folder"
        ) from error
