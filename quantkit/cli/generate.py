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
# Fields of a generation config that a decoder with a graph heeds, or that change no token.
_HEEDED = {
    "bos_token_id",
    "cache_implementation",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "pad_token_id",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
    "_from_model_config",
}


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
        max_new_tokens = _that_fit(loaded, ids, max_new_tokens)
        cache = None if kv is None else _kv_cache(loaded, kv)
        streamer = None if as_json else _streamer(tokenizer, out)
        decoder = _decoder(loaded, ids, max_new_tokens) if cache is None else None
        began = time.perf_counter()
        if decoder is not None:
            new_ids = _stream(decoder, loaded.generation_config, ids, max_new_tokens, temperature, seed, streamer)
        else:
            new_ids = _continue(loaded, tokenizer, ids, max_new_tokens, temperature, seed, streamer, cache)
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


def _that_fit(model: Any, ids: Any, max_new_tokens: int) -> int:
    """The number of new tokens that the model's limit leaves room for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or ids.shape[1] + max_new_tokens <= limit:
        return max_new_tokens
    fit: int = limit - ids.shape[1]
    note(f"the model's limit is {limit} tokens: generating at most {fit}")
    return fit


def _decoder(model: Any, ids: Any, max_new_tokens: int) -> Any:
    """On a GPU, steps in a CUDA graph, if the model allows it (and is taken apart for it then); else None.

    A generation config that asks for more than temperature, top_k and top_p is left to ``generate``.
    """
    from quantkit.runtime.graphs import fastest_decoder

    if set(model.generation_config.to_diff_dict()) - _HEEDED:
        return None
    decoder = fastest_decoder(model, ids.shape[1] + max_new_tokens)
    if decoder is not None:
        busy("recording a decoding step")
        decoder.prepare()
    return decoder


def _stream(
    decoder: Any, config: Any, ids: Any, max_new_tokens: int, temperature: float, seed: int, streamer: Any
) -> list[int]:
    """The ids that follow, from a `GraphDecoder`."""
    import torch

    from quantkit.runtime.sampling import sampler

    choose = sampler(config, temperature) if temperature > 0 else None
    if streamer is not None:
        streamer.put(ids.cpu())  # the prompt, which it skips
    new_ids = []
    with torch.random.fork_rng(devices=[ids.device]):
        torch.manual_seed(seed)
        for token in decoder.stream(ids, max_new_tokens, config.eos_token_id, choose):
            new_ids.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    return new_ids


def _continue(
    model: Any,
    tokenizer: Any,
    ids: Any,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    streamer: Any,
    cache: Any = None,
) -> list[int]:
    """The ids that follow, from the model's own ``generate``. ``cache``: None for the stock KV cache."""
    import torch

    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
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
