"""Times the packed product on a CPU against dense ones, per shape, format and number of tokens.

    python benchmarks/bench_cpu.py --shape 4096x4096 512x512 --formats int2 ptq161 --tokens 1 512 --threads 1

A `PackedLinear` of random weights against ``F.linear`` with a weight of the same shape, in float32 and in bfloat16, in
turns; best and median of many runs. On a GPU: ``quantkit bench kernels``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout without installation

from quantkit.evaluation.kernel_peers import PeerWeight
from quantkit.evaluation.kernel_speed import relative_error
from quantkit.evaluation.random_weights import GROUP_SIZE, random_spec, random_tensors
from quantkit.formats import storage
from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.formats.spec import Spec
from quantkit.runtime.packed_linear import PackedLinear


def times_in_turns(calls: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, list[float]]:
    """Microseconds of each run of each call; calls take turns, so that other load falls on all of them."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    while len(times[next(iter(calls))]) < 5 or time.perf_counter() < stop:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e6)
    return times


def spec_of(name: str, out_features: int, in_features: int) -> Spec:
    """Of `random_spec`, and for small weights of 1 to 8 bits too; one group per row where groups do not fit."""
    if in_features % (8 * GROUP_SIZE) == 0 or not name.startswith("int"):
        return random_spec(name, out_features, in_features)
    group_size = in_features if in_features % GROUP_SIZE else GROUP_SIZE
    return GroupedIntSpec(
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        segments=((int(name[3]), in_features // group_size),),
        symmetric=not name.endswith("-zeros"),
    )


def packed_linear(spec: Spec) -> tuple[PackedLinear, Tensor]:
    """Random weights as a CPU holds them, and the float32 weight that they stand for."""
    packed = PackedLinear(spec)
    stored = random_tensors(spec)
    packed.load_state_dict({**stored, "weight": torch.empty(0)})
    return packed, storage.unpack(spec, stored).dequantize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["4096x4096"], metavar="OUTxIN")
    parser.add_argument("--formats", nargs="+", default=["int1", "int2", "int3", "int4", "int8"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each cell")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("ratios packed / dense of the best runs, of the medians in brackets")
    for shape in arguments.shape:
        out_features, in_features = map(int, shape.split("x"))
        dtypes = (torch.float32, torch.bfloat16)
        weights = {dtype: torch.randn(out_features, in_features, dtype=dtype) for dtype in dtypes}
        for name in arguments.formats:
            packed, dequantized = packed_linear(spec_of(name, out_features, in_features))
            for m in arguments.tokens:
                for dtype, weight in weights.items():
                    x = torch.randn(m, in_features, dtype=dtype)
                    with torch.inference_mode():
                        calls = {"dense": lambda x=x, w=weight: linear(x, w), "packed": lambda x=x, p=packed: p(x)}
                        times = times_in_turns(calls, arguments.seconds)
                        error = relative_error(PeerWeight(lambda x, *_, p=packed: p(x), [], dequantized), x)
                    best, middle = ({key: of(each) for key, each in times.items()} for of in (min, median))
                    print(
                        f"{shape:>11} {name:>8} {m:>4} tokens {str(dtype)[6:]:>8}  {best['packed']:>8.0f} us, dense "
                        f"{best['dense']:>8.0f}, ratio {best['packed'] / best['dense']:.2f} "
                        f"({middle['packed'] / middle['dense']:.2f}), relative error {error:.1e}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
