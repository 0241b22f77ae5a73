"""The verbs and flags are a contract; help is quick, in two panels, and ends with a command that works."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from cli_runs import environment
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import app
from quantkit.pipeline import QuantizeRequest

COMMAND: Any = typer.main.get_command(app)  # Typer's own class or click's, by Typer's version
VERBS = ("quantize", "eval", "inspect", "methods", "generate")


def describe_surface() -> str:
    lines = []
    subjects = COMMAND.commands["bench"].commands.items()
    verbs = [item for item in COMMAND.commands.items() if item[0] != "bench"]
    for verb, command in (("", COMMAND), *verbs, *((f"bench {name}", subject) for name, subject in subjects)):
        for parameter in command.params:
            names = ", ".join([*parameter.opts, *parameter.secondary_opts])
            if verb or "completion" not in names:  # those two are Typer's
                repeats = " (repeatable)" if getattr(parameter, "multiple", False) else ""
                required = " (required)" if parameter.required else ""
                lines.append(f"quantkit {verb} {names}".replace("  ", " ") + required + repeats)
    return "\n".join(lines) + "\n"


def test_the_surface_is_as_recorded() -> None:
    """A changed surface is a decision: replace surface.txt by what `describe_surface` returns."""
    assert describe_surface() == (Path(__file__).parent / "surface.txt").read_text()


def test_defaults_are_those_of_the_request() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(QuantizeRequest)}
    flags = {parameter.name: parameter.default for parameter in COMMAND.commands["quantize"].params}
    shared = (fields.keys() & flags.keys()) - {"model", "output"}
    assert len(shared) == 11
    assert {name: flags[name] for name in shared} == {name: fields[name] for name in shared}
    assert flags["max_shard_size"] == "5GB"
    assert fields["max_shard_bytes"] == 5_000_000_000


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str) -> None:
    short, long = (CliRunner().invoke(app, [verb, flag]) for flag in ("-h", "--help"))
    assert short.exit_code == long.exit_code == 0
    assert short.stdout == long.stdout
    assert short.stderr == ""
    assert short.stdout.rstrip().splitlines()[-1].strip().startswith("Example: quantkit ")
    assert "Options" in short.stdout
    assert "Advanced options" in short.stdout


@pytest.mark.parametrize("subject", ["attention", "kernels", "decode"])
def test_help_of_a_bench(subject: str) -> None:
    shown = CliRunner().invoke(app, ["bench", subject, "--help"])
    assert (shown.exit_code, shown.stderr) == (0, "")
    command = COMMAND.commands["bench"].commands[subject]
    assert shown.stdout.rstrip().splitlines()[-1].strip() == command.epilog
    name, verb, given, *arguments = shlex.split(command.epilog.removeprefix("Example: "))
    assert (name, verb, given) == ("quantkit", "bench", subject)
    command.make_context(subject, arguments).close()


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_the_help_parses(verb: str) -> None:
    command = COMMAND.commands[verb]
    name, given, *arguments = shlex.split(command.epilog.removeprefix("Example: "))
    assert (name, given) == ("quantkit", verb)
    command.make_context(verb, arguments).close()


def test_without_arguments_the_help_is_shown() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert all(verb in result.output for verb in VERBS)


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"quantkit {quantkit.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantise"], "Did you mean 'quantize'"),
        (["quantize"], "Missing argument"),
        (["quantize", "model", "--bit", "3"], "No such option"),
        (["quantize", "model", "--seq-len", "many"], "Invalid value for '--seq-len'"),
        (["generate", "model"], "--prompt"),
        (["generate", "model", "--prompt", "a", "--temperature", "-1"], "temperature"),
    ],
)
def test_misuse_exits_with_2_and_prints_no_result(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr


def test_help_imports_no_heavy_library(tmp_path: Path) -> None:
    """Modules, not seconds: a test must not depend on the machine's load."""
    code = (
        "import sys\n"
        "from quantkit.cli.main import app\n"
        "for arguments in (['--help'], ['quantize', '--help'], ['methods'], ['quantize', 'x', '--method', 'gtpq']):\n"
        "    try: app(arguments)\n"
        "    except SystemExit: pass\n"
        "heavy = ('torch', 'transformers', 'triton', 'numpy', 'datasets', 'lm_eval', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment(), check=True
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_help_has_no_colour_where_there_is_no_terminal() -> None:
    assert not re.search(r"\x1b\[", CliRunner().invoke(app, ["quantize", "--help"]).stdout)
