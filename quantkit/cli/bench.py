"""``quantkit bench``: how fast our kernels are, beside the stock ones, on this machine's GPU."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from quantkit.cli.options import Debug, Json
from quantkit.cli.screen import busy, print_json, results, table


class Subject(StrEnum):
    """What can be measured."""

    attention = "attention"


Contexts = Annotated[list[int] | None, typer.Option("--context", metavar="N", help="Cached tokens. Repeatable.")]
Groups = Annotated[list[int] | None, typer.Option("--group", metavar="G", help="Query heads per KV head. Repeatable.")]
Specs = Annotated[list[str] | None, typer.Option("--kv", metavar="SPEC", help="KV policies to compare. Repeatable.")]


def bench(
    subject: Annotated[Subject, typer.Argument(help="attention: one decode step over a quantized KV cache.")],
    context: Contexts = None,
    group: Groups = None,
    kv: Specs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure kernels on the GPU, side by side with the stock ones."""
    from quantkit.evaluation.attention_speed import bench_attention

    busy("measuring")
    given = {"contexts": context, "groups": group, "specs": kv}
    report = bench_attention(**{name: value for name, value in given.items() if value})  # type: ignore[arg-type]
    if as_json:
        print_json(report)
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
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
