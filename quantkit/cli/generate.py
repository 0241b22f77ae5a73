"""``quantkit generate``: text from a packed or an ordinary model, as it comes."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any, TextIO

import typer

from quantkit.cli.options import Debug, Device, Json, Kv, LoadDtype, Model, Seed, TrustRemoteCode
from quantkit.cli.screen import busy, duration, note, print_json, quiet_libraries
from quantkit.errors import RequestError

Prompt = Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What the model continues.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens to generate at most.")]
Temperature = Annotated[
    float, typer.Option(min=0, metavar="T", help="0 takes the most likely token; 1 samples as the model says.")
]


def generate(
    model: Model,
    prompt: Prompt,
    max_new_tokens: NewTokens = 64,
    temperature: Temperature = 0.0,
    kv: Kv = None,
    device: Device = "auto",
    as_json: Json = False,
    dtype: LoadDtype = None,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt. The text goes to stdout as it comes, the speed to stderr."""
    out = sys.stdout
    if kv is not None:
        _check_kv(kv)
    with quiet_libraries():
        loaded, tokenizer = _load(model, device, dtype, trust_remote_code)
        ids = _encode(prompt, tokenizer, loaded)
        cache = None if kv is None else _kv_cache(loaded, kv)
        began = time.perf_counter()
        new_ids = _continue(loaded, tokenizer, ids, max_new_tokens, temperature, seed, None if as_json else out, cache)
        seconds = time.perf_counter() - began
    speed = len(new_ids) / seconds
    if as_json:
        text = tokenizer.decode(new_ids, skip_special_tokens=True)
        counts = {"new_tokens": len(new_ids), "seconds": round(seconds, 3), "tokens_per_second": round(speed, 2)}
        held = {} if cache is None else {"kv": {"spec": kv, "bytes": cache.nbytes}}
        print_json({"model": model, "prompt": prompt, "text": text} | counts | held)
    else:
        print()
        note(f"{len(new_ids)} tokens in {duration(seconds)} ({speed:.1f} tokens per second)")
        if cache is not None:
            note(f"KV cache {kv}: {cache.nbytes} bytes for {ids.shape[1] + len(new_ids) - 1} tokens")


def _check_kv(spec: str) -> None:
    from quantkit.algorithms.kv.registry import parse_kv_spec

    parse_kv_spec(spec)  # before the model is loaded


def _kv_cache(model: Any, spec: str) -> Any:
    from quantkit.runtime.kv_cache import kv_cache

    cache = kv_cache(model, spec)
    if cache.reason is not None:
        note(f"{cache.reason}: attention gets dequantized tensors, so the cache saves memory but no time")
    return cache


def _load(model: str, device: str, dtype: str | None, trust: bool) -> tuple[Any, Any]:
    import torch

    from quantkit.runtime.loading import load, load_tokenizer

    if dtype is None and (device == "cpu" or (device == "auto" and not torch.cuda.is_available())):
        dtype = "float32"  # half precision is slow on a CPU
    busy(f"loading {model}")
    tokenizer = load_tokenizer(
        model, trust_remote_code=trust
    )  # first: it is small, and without it the weights are of no use
    return load(model, device=device, dtype=dtype, trust_remote_code=trust), tokenizer


def _encode(prompt: str, tokenizer: Any, model: Any) -> Any:
    """Token ids [1, n_tokens] on the model's device."""
    import torch

    ids = tokenizer(prompt)["input_ids"] or [tokenizer.bos_token_id]
    if ids == [None]:
        raise RequestError("the prompt is empty, and the model has no token to begin with; pass some text")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and len(ids) >= limit:
        raise RequestError(f"the prompt has {len(ids)} tokens, the model's limit is {limit}; shorten it")
    return torch.tensor([ids], device=next(model.parameters()).device)


def _continue(
    model: Any,
    tokenizer: Any,
    ids: Any,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    out: TextIO | None,
    cache: Any = None,
) -> list[int]:
    """The ids that follow; their text goes to ``out`` as it comes. ``cache``: None for the stock KV cache."""
    import torch

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        max_new_tokens = limit - ids.shape[1]
        note(f"the model's limit is {limit} tokens: generating at most {max_new_tokens}")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=_streamer(tokenizer, out) if out is not None else None,
            past_key_values=cache,
            **sampling,
        )
    new_ids: list[int] = output[0, ids.shape[1] :].tolist()
    return new_ids


def _streamer(tokenizer: Any, out: TextIO) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]  # transformers is untyped
        """Writes to the stream it was given instead of printing."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            out.write(text)
            out.flush()

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
