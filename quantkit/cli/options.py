"""Flags that several verbs share, and how their values are read."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from quantkit.errors import RequestError

ADVANCED = "Advanced options"
INTERRUPTED = 130  # exit code: 128 + SIGINT, as shells count
DEBUG_KEY = "quantkit.debug"  # in the context's meta, which nested contexts share

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_bits(text: str) -> float:
    """A number; its range, and whether it may be a fraction, is the recipe's to check."""
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"bits are a number from 1 to 8, such as 3 (or 2.5 on average), not {text!r}") from None


def parse_bytes(text: str | int) -> int:
    """Bytes of a size such as ``5GB``, ``500MB``, ``2GiB`` or ``1000000``.

    >>> parse_bytes("5GB"), parse_bytes("1.5 MiB")
    (5000000000, 1572864)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise RequestError(f"a size is a number with a unit, such as 5GB or 500MB, not {text!r}")
    return int(float(match[1]) * unit)


def _remember(ctx: typer.Context, value: bool) -> bool:
    if value:
        ctx.meta[DEBUG_KEY] = True
    return value


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or demo (comes with quantkit).")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1; auto takes a GPU if there is one.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.", rich_help_panel=ADVANCED)]
LoadDtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="float32, bfloat16 or float16, for everything that is not packed.",
        show_default="float32 on the CPU, the model's own on a GPU",
        rich_help_panel=ADVANCED,
    ),
]
Kv = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="A quantized KV cache: akvq-vl, zipcache, kivi:bits=2,group=32, int4, ... (docs/kv_cache.md).",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=ADVANCED),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_remember, is_eager=True, help="Show tracebacks of errors.", rich_help_panel=ADVANCED
    ),
]
