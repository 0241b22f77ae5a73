"""``quantkit bench``: how fast our kernels and whole models are, beside the stock ones, on this machine's GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.options import ADVANCED, Debug, Json
from quantkit.cli.screen import busy, note, print_json, results, table
from quantkit.errors import RequestError

bench = typer.Typer(
    help="Measure kernels and decoding on the GPU, side by side with the stock ones.", no_args_is_help=True
)

Contexts = Annotated[list[int] | None, typer.Option("--context", metavar="N", help="Cached tokens. Repeatable.")]
Groups = Annotated[list[int] | None, typer.Option("--group", metavar="G", help="Query heads per KV head. Repeatable.")]
Specs = Annotated[list[str] | None, typer.Option("--kv", metavar="SPEC", help="KV policies to compare. Repeatable.")]
Shapes = Annotated[list[str] | None, typer.Option("--shape", metavar="OUTxIN", help="Shape of a weight. Repeatable.")]
Bits = Annotated[list[int] | None, typer.Option("--bits", metavar="N", help="The format intN. Repeatable.")]
Formats = Annotated[
    list[str] | None,
    typer.Option("--format", metavar="NAME", help="int1 to int8, int4-zeros, slim-2, ptq161, ... Repeatable."),
]
Tokens = Annotated[list[int] | None, typer.Option("--tokens", metavar="M", help="Rows of activations. Repeatable.")]
Peers = Annotated[
    str | None, typer.Option("--peers", metavar="NAMES", help="tinygemm, gemlite, humming, or none; comma between.")
]
Search = Annotated[
    bool,
    typer.Option("--search", help="Let peers search their whole list of settings.", rich_help_panel=ADVANCED),
]
Journal = Annotated[
    Path | None,
    typer.Option("--journal", metavar="FILE", help="Append each result as a line of JSON once it is there."),
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the result (needs matplotlib).")]

Variants = Annotated[
    list[str] | None,
    typer.Option("--variant", metavar="NAME", help="bf16, int2, int4, ptq161, littlebit-0.55, ... Repeatable."),
]
StepNames = Annotated[
    list[str] | None,
    typer.Option("--step", metavar="NAME", help="eager, graph, compiled, fused; default graph and fused. Repeatable."),
]
Folders = Annotated[list[str] | None, typer.Option("--model", metavar="FOLDER", help="A model folder. Repeatable.")]


@bench.command(epilog="Example: quantkit bench attention --json")
def attention(
    context: Contexts = None,
    group: Groups = None,
    kv: Specs = None,
    journal: Journal = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One decode step over a quantized KV cache."""
    from quantkit.evaluation.attention_speed import bench_attention

    busy("measuring")
    given = {"contexts": context, "groups": group, "specs": kv}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value}
    report = bench_attention(**chosen, progress=lambda cell: _tell(_attention_line(cell), cell, journal))
    if as_json:
        print_json(report)
    else:
        _show_attention(report)


@bench.command(epilog="Example: quantkit bench kernels --shape 4096x4096 --bits 4 --tokens 1")
def kernels(
    shape: Shapes = None,
    bits: Bits = None,
    format: Formats = None,
    tokens: Tokens = None,
    peers: Peers = None,
    plot: Plot = None,
    journal: Journal = None,
    as_json: Json = False,
    search: Search = False,
    debug: Debug = False,
) -> None:
    """Products with packed weights, beside cuBLAS and the low-bit kernels that are installed."""
    from quantkit.evaluation.kernel_speed import bench_kernels

    named = [*(f"int{width}" for width in bits or ()), *(format or ())]
    given = {"shapes": [_parse_shape(text) for text in shape or ()], "formats": named, "tokens": tokens}
    if peers is not None:
        given["peers"] = [name for name in peers.split(",") if name != "none"]
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value or name == "peers"}
    busy("measuring")
    report = bench_kernels(**chosen, search=search, progress=lambda cell: _tell(_cell_line(cell), cell, journal))
    if plot is not None:
        from quantkit.evaluation.speed_plot import plot_kernels

        plot_kernels(report, plot)
    if as_json:
        print_json(report)
    else:
        _show_kernels(report)


@bench.command(epilog="Example: quantkit bench tune --shape 11008x4096 --bits 4")
def tune(
    shape: Shapes = None,
    bits: Bits = None,
    tokens: Tokens = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the fastest launch shapes of the kernels on this GPU, and use them from now on."""
    from quantkit.evaluation.launch_tuning import tune as tune_launches

    given = {"shapes": [_parse_shape(text) for text in shape or ()], "widths": bits, "tokens": tokens}
    busy("measuring")
    report = tune_launches(
        **{name: value for name, value in given.items() if value},  # type: ignore[arg-type]
        progress=lambda row: note(_tuned_line(row)),
    )
    if as_json:
        print_json(report)
    else:
        results().print(f"{len(report['rows'])} launch shapes for {report['device']} in {report['file']}")


@bench.command(epilog="Example: quantkit bench decode --variant bf16 --variant int2")
def decode(
    variant: Variants = None,
    model: Folders = None,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens in the cache.")] = 128,
    max_length: Annotated[int, typer.Option(metavar="N", help="Tokens the cache has room for.")] = 1024,
    step: StepNames = None,
    journal: Journal = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Milliseconds per token of whole models of the shape of Llama 3 8B, batch 1, beside bfloat16."""
    from quantkit.evaluation.decode_speed import VARIANTS, bench_decode

    busy("measuring")
    report = bench_decode(
        variant or ([] if model else tuple(VARIANTS)),
        model or [],
        context=context,
        max_length=max_length,
        steps=step or ("graph", "fused"),
        progress=lambda row: _tell(
            f"{row['name']} {row['step']}: {row['milliseconds']:.3f} ms per token", row, journal
        ),
    )
    if as_json:
        print_json(report)
    else:
        _show_decode(report)


def _tell(line: str, result: dict[str, Any], journal: Path | None) -> None:
    """One result on stderr, and at the end of a file: what is measured is not lost with what is interrupted."""
    note(line)
    if journal is not None:
        with journal.open("a") as file:
            file.write(json.dumps(result) + "\n")


def _parse_shape(text: str) -> tuple[int, int]:
    """
    >>> _parse_shape("14336x4096")
    (14336, 4096)
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise RequestError(f"a shape is rows x columns, such as 14336x4096, not {text!r}")
    return int(match[1]), int(match[2])


def _cell_line(cell: dict[str, Any]) -> str:
    times = ", ".join(f"{each['name']} {each['microseconds']:.2f}" for each in cell["results"])
    shape = f"{cell['out_features']}x{cell['in_features']}"
    return f"{shape} {cell['format']}, {cell['tokens']} tokens: {times} µs"


def _tuned_line(row: dict[str, Any]) -> str:
    shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
    gain = f"{row['microseconds']:.2f} µs, computed {row['computed_microseconds']:.2f}"
    weight = f"{row['out_features']}x{row['in_features']} int{row['bits']}, {row['tokens']} tokens"
    return f"{row['kernel']} {weight}: {shape}: {gain} ({row['candidates']} measured)"


def _show_kernels(report: dict[str, Any]) -> None:
    """Losses first."""
    screen = results()
    limits = report["ceilings"]
    screen.print(report["environment"]["device"], style="bold")
    screen.print(
        f"copy {limits['copy_tb_s']:.2f} TB/s, read {limits['read_tb_s']:.2f} TB/s, "
        f"bf16 {limits['bf16_tflop_s']:.0f} TFLOP/s, empty kernel {limits['t0_us']:.2f} µs"
    )
    for name, reason in report["peers"].items():
        if reason is not None:
            screen.print(f"{name}: absent ({reason})")
    numbers = ("tokens", "µs", "p10", "p90", "of floor", "best other", "speed-up")
    made = table("weight", "format", *numbers, "others", numbers=numbers[:-2])
    for cell in sorted(report["cells"], key=lambda cell: -cell["ratio_to_best_peer"]):
        ours = cell["results"][0]
        others = [f"{each['name']} {each['microseconds']:.1f}" for each in cell["results"][1:]]
        others += [f"{name}: {reason}" for name, reason in cell["failed"].items()]
        made.add_row(
            f"{cell['out_features']}x{cell['in_features']}",
            cell["format"],
            str(cell["tokens"]),
            *(f"{ours[key]:.1f}" for key in ("microseconds", "p10", "p90")),
            f"{cell['fraction_of_floor']:.2f}",
            cell["best_peer"],
            f"{1 / cell['ratio_to_best_peer']:.2f}x",
            ", ".join(others),
        )
    screen.print("", made, "")


def _show_decode(report: dict[str, Any]) -> None:
    screen = results()
    screen.print(report["environment"]["device"], style="bold")
    numbers = ("ms per token", "p10", "p90", "tokens/s", "GB", "against bf16")
    made = table("model", "step", *numbers, numbers=numbers)
    for row in sorted(report["rows"], key=lambda row: row["speedup"] or 0.0):
        speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        times = (f"{row[key]:.3f}" for key in ("milliseconds", "p10", "p90"))
        made.add_row(
            row["name"], row["step"], *times, f"{row['tokens_per_second']:.0f}", f"{row['gigabytes']:.2f}", speedup
        )
    screen.print("", made, "")


def _attention_line(cell: dict[str, Any]) -> str:
    times = ", ".join(f"{each['name']} {each['microseconds']:.1f}" for each in cell["results"])
    return f"{cell['context']} tokens, {cell['group']} query heads: {times} µs"


def _show_attention(report: dict[str, Any]) -> None:
    screen = results()
    screen.print(report["device"], style="bold")
    numbers = ("context", "group", "µs", "TB/s", "against best 16-bit")
    made = table("attention", *numbers, numbers=numbers)
    for cell in report["cells"]:
        stock = [each["microseconds"] for each in cell["results"] if each["name"].startswith("sdpa")]
        for each in cell["results"]:
            ratio = f"{min(stock) / each['microseconds']:.2f}x" if stock else ""
            speed = f"{each['terabytes_per_second']:.2f}"
            made.add_row(
                each["name"], str(cell["context"]), str(cell["group"]), f"{each['microseconds']:.1f}", speed, ratio
            )
    screen.print("", made, "")
