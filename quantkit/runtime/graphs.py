"""Decoding with one CUDA graph: a step of a transformers model on a static cache, recorded once and replayed.

    decoder = GraphDecoder(model, max_length=1024, fuse=True)
    ids = decoder.generate(prompt_ids, max_new_tokens=100)

An eager step of a large language model is some thousand small launches, and the processor takes longer to issue them
than the device to run them. A graph issues them all at once. What a step needs to know lies on the device: the token,
the number of cached tokens and the cache, which `transformers.StaticCache` allocates for ``max_length`` tokens.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.errors import RequestError
from quantkit.kernels.decode_step import PickScratch, pick
from quantkit.runtime.fused_steps import FusedSteps, why_not

# Families whose forward asks the host for nothing; a recording that fails spoils the process's random numbers.
_RECORDABLE = ("gemma", "gemma2", "gemma3_text", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3")


class Steps(Protocol):
    """How a model takes a prompt, and then a token at a time, with a cache of its own."""

    def prefill(self, ids: Tensor) -> Tensor: ...
    def step(self, token: Tensor) -> Tensor: ...
    def rewind(self, n_tokens: int) -> None: ...
    def n_tokens(self) -> int: ...


class StaticSteps:
    """The model's own forward on a `transformers.StaticCache`.

    Raises:
        RequestError: the model has layers without a static cache, or with sliding windows shorter than ``max_length``:
            what such a layer does depends on the length of the text, and it cannot forget what it overwrote.
    """

    def __init__(self, model: Any, max_length: int, compile: bool = False) -> None:
        from transformers import StaticCache

        self.cache = StaticCache(config=model.config, max_cache_len=max_length)
        if not all(hasattr(layer, "cumulative_length") for layer in self.cache.layers):
            raise RequestError(f"{type(model).__name__} has layers without a static cache; use model.generate")
        windows = [layer.max_cache_len for layer in self.cache.layers if layer.is_sliding]
        if min(windows, default=max_length) < max_length:
            raise RequestError(
                f"{type(model).__name__} attends to windows of {min(windows)} tokens, max_length is {max_length}; "
                "make it as short, or use model.generate"
            )
        self.model = model
        self.forward: Callable[..., Any] = torch.compile(model.forward, fullgraph=True) if compile else model.forward

    def prefill(self, ids: Tensor) -> Tensor:
        """Token ids ``[1, n]`` into an empty cache; logits ``[1, vocabulary]`` of the last."""
        self.rewind(0)
        return self._run(self.model.forward, ids)

    def step(self, token: Tensor) -> Tensor:
        """One more token id ``[1, 1]``; logits ``[1, vocabulary]``."""
        return self._run(self.forward, token)

    def rewind(self, n_tokens: int) -> None:
        """Forget what is cached beyond ``n_tokens``."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(n_tokens)
            if layer.is_sliding:
                layer.cumulative_length_int = n_tokens  # counted on the host too

    def n_tokens(self) -> int:
        """Cached tokens; waits for the device."""
        return int(self.cache.layers[0].cumulative_length)

    def _run(self, forward: Callable[..., Any], ids: Tensor) -> Tensor:
        output = forward(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits


def fastest_decoder(model: Any, max_length: int) -> GraphDecoder | None:
    """A decoder with a graph: of the fused step if the model has one, else of its own forward.

    None where neither can be recorded: without a CUDA device or Triton, for families that were not tried, for sliding
    windows shorter than ``max_length``.
    """
    if model.device.type != "cuda" or find_spec("triton") is None or model.config.model_type not in _RECORDABLE:
        return None
    try:
        return GraphDecoder(model, max_length, fuse=why_not(model) is None)
    except RequestError:
        return None


class GraphDecoder:
    """One sequence, the most probable token each time, or one that `stream` is told how to choose. On the CPU the same
    steps run without a graph.

    Args:
        model: a causal language model, packed or not, wholly on one device.
        max_length: tokens of prompt and continuation together that the cache has room for.
        fuse: rebuild the step of a Llama, Mistral or Qwen2 model with few launches (fused_steps.py). The fastest; the
            model itself can be neither called nor saved afterwards.
        compile: compile the step with ``torch.compile`` first, which fuses the small operations between the products
            (minutes for a large model).

    Raises:
        RequestError: the model cannot decode on a static cache, lies on several devices, or cannot be fused.
    """

    def __init__(self, model: Any, max_length: int = 2048, *, fuse: bool = False, compile: bool = False) -> None:
        if fuse and compile:
            raise RequestError("a fused step is not compiled: give either fuse or compile")
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise RequestError("a graph holds one device; load the model with device='cuda' instead of a device map")
        self.max_length = max_length
        self.device: torch.device = model.device
        self.steps: Steps = FusedSteps(model, max_length) if fuse else StaticSteps(model, max_length, compile)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.logits: Tensor | None = None  # [1, vocabulary], of the last step
        self._scratch = PickScratch.on(self.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_logits: Tensor | None = None  # where a replay leaves them

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> None:
        """Start anew with a prompt ``[1, n]``; the first new token is then in ``token``."""
        if input_ids.ndim != 2 or len(input_ids) != 1 or not 0 < input_ids.shape[1] < self.max_length:
            shape = list(input_ids.shape)
            raise RequestError(f"the prompt is {shape}; one sequence of 1 to {self.max_length - 1} tokens is required")
        self.logits = self.steps.prefill(input_ids.to(self.device))
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    @torch.inference_mode()
    def step(self) -> None:
        """Replace ``token`` by the one that follows it."""
        if self.device.type != "cuda":
            self._step()
            return
        if self._graph is None:
            self._record()
        assert self._graph is not None
        with torch.cuda.device(self.device):
            self._graph.replay()
        self.logits = self._graph_logits

    def generate(
        self, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | Collection[int] | None = None
    ) -> Tensor:
        """``[1, n]`` to ``[1, n + new]``, on the CPU; ends after ``max_new_tokens`` or (one of) ``eos_token_id``.

        Raises:
            RequestError: prompt and continuation do not fit into ``max_length``.
        """
        new = list(self.stream(input_ids, max_new_tokens, eos_token_id))
        return torch.cat([input_ids.cpu(), torch.tensor([new], dtype=torch.long)], 1)

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        eos_token_id: int | Collection[int] | None = None,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[int]:
        """The tokens of `generate`, each as soon as it is there; the device makes the next one meanwhile.

        Args:
            input_ids, max_new_tokens, eos_token_id: see `generate`.
            choose: logits ``[1, vocabulary]`` to the next token ``[1, 1]``, such as a `sampling.sampler`; None: the
                most probable one.

        Raises:
            RequestError: prompt and continuation do not fit into ``max_length``.
        """
        if input_ids.shape[-1] + max_new_tokens > self.max_length:
            found = f"{input_ids.shape[-1]} + {max_new_tokens} tokens"
            raise RequestError(f"{found} do not fit into max_length {self.max_length}; make it larger")
        ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
        self.prefill(input_ids)
        for made in range(1, max_new_tokens + 1):
            if choose is not None:
                assert self.logits is not None
                with torch.inference_mode():
                    self.token.copy_(choose(self.logits))
            read = self._read_later()
            if made < max_new_tokens:
                self.step()
            token = read()
            yield token
            if token in ends:
                return

    def prepare(self) -> None:
        """Record the graph now instead of with the first step, so that `stream` starts without a pause."""
        if self.device.type == "cuda" and self._graph is None:
            with torch.inference_mode():
                self._record()

    def _read_later(self) -> Callable[[], int]:
        """Begin to copy the token to the host; the function that is returned waits for it, and for nothing after it."""
        if self.device.type != "cuda":
            token = int(self.token)
            return lambda: token
        copy = torch.empty(1, dtype=torch.long, pin_memory=True)
        copy.copy_(self.token[0], non_blocking=True)
        there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there.record(torch.cuda.current_stream(self.device))

        def read() -> int:
            there.synchronize()
            return int(copy)

        return read

    def _step(self) -> None:
        self.logits = self.steps.step(self.token)
        pick(self.logits, self.token, self._scratch)

    def _record(self) -> None:
        """Record a step; the trial runs before it leave cache, token and length as they were."""
        token, n_tokens = self.token.clone(), self.steps.n_tokens()
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets libraries allocate what they need
                self.steps.rewind(n_tokens)
                self._step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.steps.rewind(n_tokens)
        self.token.copy_(token)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        gc.disable()  # a kernel that is destroyed during capture ends it
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                self._step()
        finally:
            gc.enable()
        self._graph, self._graph_logits = graph, self.logits
