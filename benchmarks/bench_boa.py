"""Seconds and peak memory to quantize one decoder block by GPTQ, BoA and TurboBoA, on random weights.

    python benchmarks/bench_boa.py                                   a Llama-3-8B block, 128 x 2048 tokens, on the GPU
    python benchmarks/bench_boa.py --hidden 512 --heads 8 --kv-heads 4 --intermediate 1408 --n-samples 4 --device cpu

What a run does for each block is timed apart: forward passes that gather statistics, the attention's own statistics,
the projections of queries, keys and values, all other linears. Reading, packing and writing are not included. On a
CPU the seconds are the processor's, of all threads together, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout without installation

from quantkit.calib.statistics import StatisticsRecorder
from quantkit.models.structure import Linear
from quantkit.pipeline.attend import AttentionWatch
from quantkit.pipeline.solve import solve_linear
from quantkit.recipe import Recipe, resolve

RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "gptq": ("gptq", ()),
    "boa": ("boa", ()),
    "boa, block_v=false": ("boa", ("block_v=false",)),
    "boa, the paper's": ("boa", ("qk_metric=logits", "v_row_factor=false", "center_keys=false")),
    "turboboa": ("turboboa", ("correction=0",)),  # the correction's second stream of hidden states is not timed here
}


class Block:
    """A random decoder block and its calibration inputs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        config = LlamaConfig(
            hidden_size=arguments.hidden,
            intermediate_size=arguments.intermediate,
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.kv_heads,
            max_position_embeddings=max(2048, arguments.seq_len),
            attn_implementation="sdpa",
        )
        self.device = torch.device(arguments.device)
        dtype = getattr(torch, arguments.dtype)
        torch.manual_seed(0)
        with torch.device(self.device):
            self.module: nn.Module = LlamaDecoderLayer(config, 0).to(dtype).eval()
            positions = torch.arange(arguments.seq_len).unsqueeze(0)
            shape = (arguments.n_samples, arguments.seq_len, arguments.hidden)
            channels = torch.logspace(0, -1.2, arguments.hidden)[torch.randperm(arguments.hidden)]
            mixing = torch.randn(arguments.hidden, arguments.hidden) * arguments.hidden**-0.5 * channels
            self.hidden = [(torch.randn(1, *shape[1:]) @ mixing).to(dtype) for _ in range(shape[0])]
            self.rotary = LlamaRotaryEmbedding(config)(self.hidden[0], positions)
        for linear in self.linears():
            weight = self.module.get_submodule(linear.path).weight
            weight.data = (torch.randn_like(weight) * linear.in_features**-0.5).to(dtype)  # type: ignore[operator]

    def linears(self) -> list[Linear]:
        found = ((path, module) for path, module in self.module.named_modules() if isinstance(module, nn.Linear))
        return [Linear(path, path, module.out_features, module.in_features) for path, module in found]

    def forward(self, sample: int) -> None:
        self.module(self.hidden[sample], position_embeddings=self.rotary, attention_mask=None)


def measure(block: Block, recipe: Recipe) -> dict[str, float]:
    """Seconds of each part and the peak memory in GiB; the block's weights stay as they are."""
    seconds: dict[str, float] = {}
    clock = time.perf_counter if block.device.type == "cuda" else time.process_time

    def timed(name: str, run: Callable[[], Any]) -> Any:
        _synchronize(block.device)
        began = clock()
        result = run()
        _synchronize(block.device)
        seconds[name] = seconds.get(name, 0.0) + clock() - began
        return result

    if block.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    linears = block.linears()
    recorder = StatisticsRecorder({linear.path: block.module.get_submodule(linear.path) for linear in linears})
    watch = AttentionWatch("block", block.module, [linear.path for linear in linears], recipe, _refuse)
    with recorder.recording():
        for sample in range(len(block.hidden)):
            recorder.next_call()
            timed("statistics", lambda sample=sample: block.forward(sample))
    if recipe.solver == "boa":
        with watch.recording():
            for sample in range(len(block.hidden)):
                timed("attention", lambda sample=sample: block.forward(sample))
    heads = timed("attention", watch.factors)
    for linear in linears:
        weight: Tensor = block.module.get_submodule(linear.path).weight  # type: ignore[assignment]
        part = "query, key, value" if linear.path.endswith(("q_proj", "k_proj", "v_proj")) else "others"
        statistics = recorder.statistics(linear.path)
        timed(part, lambda: solve_linear(linear, weight, statistics, recipe, heads.get(linear.path, ())))  # noqa: B023
    seconds["total"] = sum(seconds.values())
    if block.device.type == "cuda":
        seconds["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return seconds


def _refuse(reason: str) -> None:
    raise RuntimeError(reason)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 4096, "intermediate": 14336, "heads": 32, "kv-heads": 8, "n-samples": 128, "seq-len": 2048}
    for name, default in {**sizes, "bits": 2, "group-size": 128, "blocks": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="default: all")
    parser.add_argument("--json", help="file to append one line per recipe to")
    arguments = parser.parse_args()
    block = Block(arguments)
    with torch.no_grad():
        block.forward(0)  # whatever is built on the first call is not the recipe's time
        for name in arguments.recipe or RECIPES:
            method, settings = RECIPES[name]
            recipe = resolve(method, bits=arguments.bits, group_size=arguments.group_size, settings=settings)
            found = measure(block, recipe)
            minutes = found["total"] * arguments.blocks / 60
            parts = "  ".join(f"{part} {value:.2f}" for part, value in found.items())
            print(f"{name:22s} {parts}  -> {minutes:.1f} min for {arguments.blocks} blocks", flush=True)
            if arguments.json:
                with open(arguments.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"recipe": name, **vars(arguments), **found}) + "\n")


if __name__ == "__main__":
    main()
