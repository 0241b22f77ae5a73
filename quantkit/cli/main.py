"""``quantkit``: the verbs, and how an error becomes one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quantkit import __version__
from quantkit.cli.bench import bench
from quantkit.cli.evaluate import evaluate
from quantkit.cli.generate import generate
from quantkit.cli.inspect import inspect
from quantkit.cli.methods import methods
from quantkit.cli.options import DEBUG_KEY, INTERRUPTED
from quantkit.cli.quantize import quantize
from quantkit.cli.screen import note, show_error
from quantkit.errors import QuantkitError, first_line


class Verbs(TyperGroup):
    """Runs a verb; what it raises ends in one line on stderr and an exit code. Wrong usage is Typer's (exit 2)."""

    def invoke(self, ctx: Any) -> Any:
        try:
            returned = super().invoke(ctx)
            _flush()
            return returned
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader of our output has enough, such as `head`; nobody is left to tell
            raise
        except Exception as error:
            message = _explain(error)
            if message is None:
                raise
            if ctx.meta.get(DEBUG_KEY):
                traceback.print_exc()
            show_error(message)
            raise typer.Exit(getattr(error, "exit_code", 1)) from None


def _flush() -> None:
    """Find out now whether stdout took everything, while that can still be said; a failed rest is dropped."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _explain(error: Exception) -> str | None:
    """The line for an error that the user or the machine caused; None for everything else."""
    if isinstance(error, QuantkitError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"disk is full{where}; free some space and run the same command again"
    if isinstance(error, OSError):
        reason = error.strerror or first_line(error)
        return f"{error.filename}: {reason}" if error.filename else reason
    torch = sys.modules.get("torch")  # an error of torch can only come from a verb that has imported it
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return "out of memory; use a shorter --seq-len, --device cpu, or with quantize --offload disk"
    return None


app = typer.Typer(
    name="quantkit",
    cls=Verbs,
    help="Quantize transformers models to real bytes: calibrate block by block, pack, evaluate, generate.",
    epilog="Example: quantkit quantize demo --bits 3",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(value: bool) -> None:
    if value:
        print(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command(epilog="Example: quantkit quantize demo --bits 3")(quantize)
app.command("eval", epilog="Example: quantkit eval demo --limit 8")(evaluate)
app.command(epilog="Example: quantkit inspect demo-gptq-3b --verify")(inspect)
app.command(epilog="Example: quantkit methods gptq")(methods)
app.command(epilog='Example: quantkit generate demo --prompt "def main():"')(generate)
app.add_typer(bench, name="bench")


def main() -> None:
    """The entry point of the command ``quantkit``."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of data sets and tasks; read when tqdm is imported
    app()
