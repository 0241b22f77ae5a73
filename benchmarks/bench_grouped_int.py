"""Times the grouped_int product against its peers, per layer shape, width and number of tokens.

    python benchmarks/bench_grouped_int.py            # GPU if there is one, else CPU
    python benchmarks/bench_grouped_int.py --json out.json --bits 2 4 --tokens 1 16

GPU: a CUDA graph of launches, each with its own copy of the weights (together at least 512 MB, eight times the L2
cache of an H200), replayed; median of the replays divided by the launches. Peers: cuBLAS (bf16 F.linear) and, at
4 bits, tinygemm (aten::_weight_int4pack_mm). Every result is compared with float64 before it is timed. "floor" is the
time to read the packed bytes, x and y once at 4.3 TB/s (the copy bandwidth measured on an H200), or the time of the
arithmetic at 790 TFLOP/s if that is longer. The table starts with the cells that lose most to their best peer.

CPU: best of several runs, against F.linear with a float32 and a bfloat16 weight.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout without installation

from quantkit.formats.grouped_int import GroupedInt, GroupedIntSpec, pack, symmetric_zero
from quantkit.kernels.grouped_int import matmul
from quantkit.kernels.planar import to_planar

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]  # [out_features, in_features]: q/o, gate/up, down of an 8B model
TOKENS = [1, 8, 16, 64, 512, 2048]
BITS = [1, 2, 3, 4, 8]
GROUP_SIZE = 128
ROTATED_BYTES = 512 << 20
BYTES_PER_US = 4.3e6
FLOP_PER_US = 790e6
TINYGEMM_MAX_TOKENS = 64  # above, it is slower than a dense product by far


@dataclass(frozen=True, kw_only=True)
class Result:
    what: str
    out_features: int
    in_features: int
    bits: int
    n_tokens: int
    us: float  # median per launch
    p10: float
    p90: float
    relative_error: float
    n_bytes: int  # weight with scales, x and y


def random_layer(out_features: int, in_features: int, bits: int, device: str) -> GroupedInt:
    """Symmetric, group size 128: what `quantize` makes by default."""
    n_groups = in_features // GROUP_SIZE
    shape = (out_features, n_groups)
    return GroupedInt(
        codes=torch.randint(2**bits, (out_features, in_features), dtype=torch.uint8, device=device),
        scales=(torch.rand(shape, device=device) * 0.01 + 0.001).half().float(),
        zeros=torch.full(shape, symmetric_zero(bits), device=device),
        bits=(bits,) * n_groups,
        symmetric=True,
    )


def relative_error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    reference = x.double() @ weight.double().t()
    return float((y.double() - reference).norm() / reference.norm())


def graph_times(launches: Sequence[Callable[[], object]], replays: int = 15) -> list[float]:
    """Microseconds per launch of each replay of a graph of all launches."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches[:2]:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # a compiled kernel freed during capture would end it
    try:
        with torch.cuda.graph(graph, stream=stream):
            for launch in launches:
                launch()
    finally:
        gc.enable()
    for _ in range(4):
        graph.replay()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / len(launches))
    return times


def copies(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Enough copies of a weight's tensors that no launch finds them in a cache."""
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    return [[tensor.clone() for tensor in tensors] for _ in range(max(2, -(-ROTATED_BYTES // n_bytes)))]


def measure(
    what: str, call: Callable[..., Tensor], weight: Sequence[Tensor], dense: Tensor, x: Tensor, bits: int
) -> Result:
    """Check and time ``call(x, *weight)``."""
    y = call(x, *weight)
    error = relative_error(y, x, dense)
    assert error < 0.02, (what, error)
    times = graph_times([lambda tensors=tensors: call(x, *tensors) for tensors in copies(weight)])
    times.sort()
    return Result(
        what=what,
        out_features=dense.shape[0],
        in_features=dense.shape[1],
        bits=bits,
        n_tokens=x.shape[0],
        us=statistics.median(times),
        p10=times[len(times) // 10],
        p90=times[-1 - len(times) // 10],
        relative_error=error,
        n_bytes=sum(tensor.nbytes for tensor in weight) + x.nbytes + y.nbytes,
    )


def ours(layer: GroupedInt, spec: GroupedIntSpec, x: Tensor, dense: Tensor) -> Result:
    planar = to_planar(spec, pack(layer))
    names = list(planar)

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return matmul(x, spec, dict(zip(names, tensors, strict=True)))

    return measure("quantkit", call, list(planar.values()), dense, x, layer.bits[0])


def tinygemm(layer: GroupedInt, x: Tensor, dense: Tensor) -> Result:
    """4-bit: weight = (code - 8) * scale, which is our symmetric grid."""
    packed = torch.ops.aten._convert_weight_to_int4pack(layer.codes[:, ::2] << 4 | layer.codes[:, 1::2], 8)
    scales = torch.stack([layer.scales.t(), torch.zeros_like(layer.scales.t())], dim=-1).bfloat16().contiguous()

    def call(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP_SIZE, scales)

    return measure("tinygemm", call, [packed, scales], dense, x, 4)


def bench_gpu(shapes: Sequence[tuple[int, int]], widths: Sequence[int], tokens: Sequence[int]) -> list[Result]:
    results = []
    for out_features, in_features in shapes:
        x_of = {m: torch.randn(m, in_features, device="cuda", dtype=torch.bfloat16) for m in tokens}
        dense = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
        for m in tokens:
            results.append(measure("cublas", lambda x, weight: linear(x, weight), [dense], dense, x_of[m], 16))
        for bits in widths:
            layer = random_layer(out_features, in_features, bits, "cuda")
            spec, dense = layer.spec(), layer.dequantize()
            for m in tokens:
                results.append(ours(layer, spec, x_of[m], dense))
                if bits == 4 and m <= TINYGEMM_MAX_TOKENS:
                    results.append(tinygemm(layer, x_of[m], dense))
        torch.cuda.empty_cache()
    return results


def bench_cpu(shapes: Sequence[tuple[int, int]], widths: Sequence[int], tokens: Sequence[int]) -> list[Result]:
    results = []
    for out_features, in_features in shapes:
        for bits in widths:
            layer = random_layer(out_features, in_features, bits, "cpu")
            spec, tensors, dense = layer.spec(), pack(layer), layer.dequantize()
            for m in tokens:
                x = torch.randn(m, in_features)
                calls = {"quantkit": lambda x=x, spec=spec, tensors=tensors: matmul(x, spec, tensors)}
                if bits == widths[0]:
                    half, x_half = dense.bfloat16(), x.bfloat16()
                    calls["float32"] = lambda x=x, dense=dense: linear(x, dense)
                    calls["bfloat16"] = lambda x=x_half, dense=half: linear(x, dense)
                for what, call in calls.items():
                    times = sorted(wall_times(call))
                    stored = {"quantkit": spec.n_bytes, "float32": dense.nbytes, "bfloat16": dense.nbytes // 2}[what]
                    result = Result(
                        what=what,
                        out_features=out_features,
                        in_features=in_features,
                        bits={"quantkit": bits, "float32": 32, "bfloat16": 16}[what],
                        n_tokens=m,
                        us=times[0],
                        p10=times[0],
                        p90=times[-1],
                        relative_error=relative_error(call(), x, dense),
                        n_bytes=stored + 4 * m * (in_features + out_features),
                    )
                    results.append(result)
    return results


def wall_times(call: Callable[[], Tensor], seconds: float = 0.5) -> list[float]:
    call()
    times = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def table(results: Sequence[Result]) -> str:
    """One line per cell of ours, the largest loss first."""
    lines = []
    for ours_ in results:
        if ours_.what != "quantkit":
            continue
        cell = (ours_.out_features, ours_.in_features, ours_.n_tokens)
        peers = {
            peer.what: peer.us
            for peer in results
            if peer.what != "quantkit"
            and (peer.out_features, peer.in_features, peer.n_tokens) == cell
            and (peer.what != "tinygemm" or ours_.bits == 4)
        }
        best = min(peers, key=lambda name: peers[name])
        flop = 2.0 * ours_.n_tokens * ours_.out_features * ours_.in_features
        floor = max(ours_.n_bytes / BYTES_PER_US, flop / FLOP_PER_US)
        ratio = ours_.us / peers[best]
        shape = f"{ours_.out_features}x{ours_.in_features}"
        others = "  ".join(f"{name} {us:.1f}" for name, us in sorted(peers.items()))
        text = f"{shape:>11}  {ours_.bits} bits  {ours_.n_tokens:>4} tokens  {ours_.us:>9.1f} us"
        text += f"  {ratio:>5.2f}x of {best:<8}  error {ours_.relative_error:.1e}  {others}"
        if "cublas" in peers:
            text += f"  floor {floor:.1f}"
        lines.append((ratio, text))
    return "\n".join(text for _, text in sorted(lines, reverse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--cpu", action="store_true", help="time the torch twin although there is a GPU")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    on_cpu = arguments.cpu or not torch.cuda.is_available()
    tokens = arguments.tokens or ([1, 8, 64, 512] if on_cpu else TOKENS)
    with torch.inference_mode():
        results = bench_cpu(SHAPES[:1], arguments.bits, tokens) if on_cpu else bench_gpu(SHAPES, arguments.bits, tokens)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name())
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
