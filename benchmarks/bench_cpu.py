"""Times the packed product on a CPU against dense ones, per format and number of tokens.

    python benchmarks/bench_cpu.py --formats int2 int4 ptq161 --tokens 1 512 --threads 1

The torch twin of the format against ``F.linear`` with a weight of the same shape, in float32 and in bfloat16, in turns;
best of several runs. On a GPU: ``quantkit bench kernels``.
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


def best_times(calls: dict[str, Callable[[], Tensor]], seconds: float = 2.0) -> dict[str, float]:
    """Microseconds of each call, the best of several; calls take turns, so that other load falls on all of them."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    while len(times[next(iter(calls))]) < 3 or time.perf_counter() < stop:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: min(each) for name, each in times.items()}


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
    weights = {dtype: torch.randn(*arguments.shape, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    with torch.inference_mode():
        for m in arguments.tokens:
            for name in arguments.formats:
                spec = random_spec(name, *arguments.shape)
                tensors, matmul = random_tensors(spec), kernel_of(spec).matmul
                held = PeerWeight(
                    lambda x, *_, spec=spec, tensors=tensors, matmul=matmul: matmul(x, spec, tensors, None),
                    [],
                    storage.unpack(spec, tensors).dequantize(),
                )
                for dtype, weight in weights.items():
                    x = torch.randn(m, arguments.shape[1], dtype=dtype)
                    times = best_times(
                        {
                            "dense": lambda x=x, weight=weight: linear(x, weight),
                            "packed": lambda x=x, held=held: held.product(x),
                        }
                    )
                    print(
                        f"{m:>4} tokens {name:>16} {str(dtype)[6:]:>9}  {times['packed']:>9.0f} us, dense "
                        f"{times['dense']:>9.0f}, ratio {times['packed'] / times['dense']:.2f}, "
                        f"relative error {relative_error(held, x):.1e}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
