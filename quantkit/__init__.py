"""quantkit: post-training quantization of transformers models, to real bytes.

    quantkit.quantize("folder", method="gptq", bits=3)   calibrate, quantize, pack, save
    quantkit.load("folder-gptq-3b")                      the packed model, ready to generate
    quantkit.evaluate(...)                               perplexity and its companions
    quantkit.kv_cache(model, "akvq-vl")                  a quantized KV cache, for model.generate(past_key_values=...)

The functions are resolved on first use: importing quantkit imports neither torch nor transformers nor triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.evaluation import evaluate
    from quantkit.pipeline import quantize
    from quantkit.runtime.kv_cache import kv_cache
    from quantkit.runtime.loading import load

__all__ = ["__version__", "evaluate", "kv_cache", "load", "quantize"]
__version__ = "0.1.0"

_WHERE = {
    "evaluate": "quantkit.evaluation",
    "kv_cache": "quantkit.runtime.kv_cache",
    "load": "quantkit.runtime.loading",
    "quantize": "quantkit.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
