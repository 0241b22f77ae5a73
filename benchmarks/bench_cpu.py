"""Times the packed product on a CPU against dense ones, per format and number of tokens.

    python benchmarks/bench_cpu.py --formats int2 int4 ptq161 --tokens 1 512 --threads 1

The torch twin of the format against ``F.linear`` with a float32 and a bfloat16 weight of the same shape; best of
several runs. On a GPU: ``quantkit bench kernels``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout without installation

from quantkit.evaluation.kernel_peers import PeerWeight
from quantkit.evaluation.kernel_speed import relative_error
from quantkit.evaluation.random_weights import random_spec, random_tensors
from quantkit.formats import storage
from quantkit.kernels.storage import kernel_of


def best_time(call: Callable[[], Tensor], seconds: float = 0.5) -> float:
    """Microseconds."""
    call()
    times = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("OUT", "IN"))
    parser.add_argument("--formats", nargs="+", default=["int1", "int2", "int3", "int4", "int8"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--threads", type=int, help="default: torch's")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.shape[0]} x {arguments.shape[1]}")
    weight = torch.randn(*arguments.shape)
    half = weight.bfloat16()
    with torch.inference_mode():
        for m in arguments.tokens:
            x = torch.randn(m, arguments.shape[1])
            x_half = x.bfloat16()
            dense = best_time(lambda x=x: linear(x, weight))
            half_dense = best_time(lambda x=x_half: linear(x, half))
            print(f"{m:>4} tokens  float32 {dense:.0f} us, bfloat16 {half_dense:.0f} us")
            for name in arguments.formats:
                spec = random_spec(name, *arguments.shape)
                tensors, matmul = random_tensors(spec), kernel_of(spec).matmul
                held = PeerWeight(
                    lambda x, *_, spec=spec, tensors=tensors, matmul=matmul: matmul(x, spec, tensors, None),
                    [],
                    storage.unpack(spec, tensors).dequantize(),
                )
                error = relative_error(held, x)
                us = best_time(lambda x=x, held=held: held.product(x))
                print(f"      {name:>16}  {us:>9.0f} us  {us / dense:.2f}x of float32  relative error {error:.1e}")


if __name__ == "__main__":
    main()
