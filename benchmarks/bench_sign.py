"""Times the products with weights below two bits against cuBLAS, per format and number of tokens.

    python benchmarks/bench_sign.py                                  # 4096 x 14336; needs a GPU
    python benchmarks/bench_sign.py --json out.json --formats sign_salient --tokens 1 16

As bench_grouped_int.py: a CUDA graph of launches, each with its own copy of the weight (together more than the L2
cache holds), median of the replays; every result is compared with float64 first. "floor" is the time to read the stored
bytes, x and y once at 4.3 TB/s, or the time of the arithmetic at 790 TFLOP/s if that is longer. The table starts with
the cells that lose most to cuBLAS. ``--warm`` compiles and checks without timing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from bench_grouped_int import BYTES_PER_US, FLOP_PER_US, Result, copies, graph_times, measure, relative_error
from torch import Tensor
from torch.nn.functional import linear

from quantkit.formats import storage
from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.formats.sign_factors import SignFactorsSpec
from quantkit.formats.sign_salient import SignSalientSpec
from quantkit.formats.spec import Spec
from quantkit.kernels.storage import kernel_of

OUT, IN = 4096, 14336  # the down projection of an 8B model
TOKENS = [1, 16, 64, 2048]


def specs(out_features: int, in_features: int) -> dict[str, Spec]:
    """Two paths at 0.1, 0.55 and 1 bit per weight; signs alone; signs with a fifth of the columns at 4 bits."""
    found: dict[str, Spec] = {}
    for target in (0.1, 0.55, 1.0):
        room = (in_features * out_features * target - 32 * (in_features + out_features)) / 2
        rank = max(8, int(room / (in_features + out_features + 16)) // 8 * 8)
        found[f"sign_factors {target:g}"] = SignFactorsSpec(
            out_features=out_features, in_features=in_features, ranks=(rank, rank)
        )
    n_salient = in_features // 5 // 256 * 256
    salient = GroupedIntSpec(
        out_features=out_features,
        in_features=n_salient,
        group_size=128,
        segments=((4, n_salient // 128),),
        symmetric=False,
    )
    shape = {"out_features": out_features, "in_features": in_features}
    found["signs alone"] = SignSalientSpec(**shape, row_means=False, column_scales=False, salient=None)
    found["sign_salient"] = SignSalientSpec(**shape, row_means=True, column_scales=True, salient=salient)
    return found


def random_tensors(spec: Spec, device: str) -> dict[str, Tensor]:
    """Random codes and signs; scales of one size."""
    tensors = {}
    for name, (dtype, shape) in spec.tensor_layout().items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(256, shape, dtype=torch.uint8, device=device)
        else:
            tensors[name] = (0.01 + 0.01 * torch.rand(shape, device=device)).to(dtype)
    if isinstance(spec, SignSalientSpec) and spec.salient:
        mask = torch.zeros(spec.in_features // 8, dtype=torch.uint8)
        mask[torch.randperm(len(mask))[: spec.n_salient // 8]] = 255
        tensors["salient_columns"] = mask.to(device)
    if isinstance(spec, SignFactorsSpec):
        tensors["column_scales"] *= 60  # as solvers leave them: the latent scales carry the size
    return tensors


def measure_format(name: str, spec: Spec, tokens: Sequence[int], warm: bool) -> list[Result]:
    kernel, stored = kernel_of(spec), random_tensors(spec, "cuda")
    dense = storage.unpack(spec, stored).dequantize()
    planar = kernel.to_planar(spec, stored)
    names = list(planar)

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return kernel.matmul(x, spec, dict(zip(names, tensors, strict=True)), None)

    results = []
    for m in tokens:
        x = torch.randn(m, spec.in_features, device="cuda", dtype=torch.bfloat16)
        if warm:
            error = relative_error(call(x, *planar.values()), x, dense)
            print(f"{name}, {m} tokens: relative error {error:.1e}", flush=True)
            assert error < 0.02, (name, m, error)
            continue
        error = relative_error(call(x, *planar.values()), x, dense)
        assert error < 0.02, (name, m, error)
        times = sorted(
            graph_times([lambda t=t, x=x: call(x, *t) for t in copies(list(planar.values()))[:96]], replays=9)
        )
        results.append(
            Result(
                what=name,
                out_features=spec.out_features,
                in_features=spec.in_features,
                bits=0,
                n_tokens=m,
                us=times[len(times) // 2],
                p10=times[len(times) // 10],
                p90=times[-1 - len(times) // 10],
                relative_error=error,
                n_bytes=spec.n_bytes + 2 * m * (spec.in_features + spec.out_features),
            )
        )
        print(results[-1], flush=True)
    return results


def floor_us(result: Result, spec: Spec | None) -> float:
    """Of a product with the weight; two thin products for factors."""
    n_weights = result.out_features * result.in_features
    if isinstance(spec, SignFactorsSpec):
        n_weights = spec.total_rank * (spec.in_features + spec.out_features)
    return max(result.n_bytes / BYTES_PER_US, 2.0 * result.n_tokens * n_weights / FLOP_PER_US)


def table(results: Sequence[Result], known: dict[str, Spec]) -> str:
    lines = []
    dense = {result.n_tokens: result.us for result in results if result.what == "cublas"}
    for result in results:
        if result.what == "cublas" or result.n_tokens not in dense:
            continue
        ratio, spec = result.us / dense[result.n_tokens], known[result.what]
        text = f"{result.what:>18}  {spec.bpw:.3f} bpw  {result.n_tokens:>4} tokens  {result.us:>8.1f} us"
        text += f"  {ratio:>5.2f}x of cublas {dense[result.n_tokens]:.1f}  floor {floor_us(result, spec):.2f}"
        lines.append((ratio, f"{text}  error {result.relative_error:.1e}"))
    return "\n".join(text for _, text in sorted(lines, reverse=True))


def main() -> None:
    known = specs(OUT, IN)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all results here, after each format")
    parser.add_argument("--formats", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--shape", type=int, nargs=2, default=[OUT, IN], metavar=("OUT", "IN"))
    parser.add_argument("--warm", action="store_true", help="compile and check only")
    arguments = parser.parse_args()
    known = specs(*arguments.shape)
    results: list[Result] = []
    with torch.inference_mode():
        if not arguments.warm:
            dense = torch.randn(arguments.shape, device="cuda", dtype=torch.bfloat16)
            for m in arguments.tokens:
                x = torch.randn(m, dense.shape[1], device="cuda", dtype=torch.bfloat16)
                results.append(measure("cublas", lambda x, weight: linear(x, weight), [dense], dense, x, 16))
            del dense
        for name in arguments.formats:
            results += measure_format(name, known[name], arguments.tokens, arguments.warm)
            if arguments.json:
                arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
            torch.cuda.empty_cache()
    print(torch.cuda.get_device_name())
    print(table(results, known))


if __name__ == "__main__":
    main()
