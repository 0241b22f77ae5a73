"""`quantkit eval`: its object, its table, its default text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_runs import Inputs, Terminal, quantkit
from rich.console import Console

from quantkit.cli.evaluate import default_data
from quantkit.cli.progress import window_progress


def test_json_is_the_contract(inputs: Inputs, packed: Path) -> None:
    arguments = ("eval", packed, "--data", inputs.text, "--seq-len", 32, "--limit", 2, "--json")
    plain = quantkit(*arguments)
    assert plain.exit_code == 0
    assert plain.json.keys() == {"model", "perplexity", "seconds"}
    assert plain.json["model"] == str(packed)
    assert plain.json["perplexity"]["calib"].keys() == {"ppl", "windows", "seq_len"}
    assert plain.stderr.startswith("calib: 2 windows, ")
    compared = quantkit(*arguments, "--reference", inputs.model).json["perplexity"]["calib"]
    assert compared.keys() == {"ppl", "windows", "seq_len", "kl_mean", "top1_agreement"}
    assert compared["ppl"] == plain.json["perplexity"]["calib"]["ppl"]


def test_the_table_names_its_protocol(inputs: Inputs, packed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(inputs.text.read_text()[::-1])
    flags = ("--seq-len", 32, "--limit", 2, "--reference", packed, "--data", inputs.text, "--data", other)
    shown = quantkit("eval", packed, *flags)
    assert shown.exit_code == 0
    rows = [line.split() for line in shown.stdout.splitlines() if line.startswith(("calib ", "other "))]
    assert [(row[0], row[2:]) for row in rows] == [
        ("calib", ["2", "32", "0.00000", "100.00", "%"]),  # a model is at no distance from itself
        ("other", ["2", "32", "0.00000", "100.00", "%"]),
    ]
    assert "calib: GPTQ-line windows of 32 tokens, no special tokens" in shown.stdout
    assert shown.stdout.splitlines()[-1].startswith("time: ")


def test_default_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(name: str, source: str | None) -> str:
        calibration = None if source is None else {"source": source}
        (tmp_path / name).mkdir()
        config = {"quantization_config": {"calibration": calibration}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return str(tmp_path / name)

    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    assert default_data("demo", None) == "builtin"
    assert default_data(folder("a", "builtin")) == "builtin"
    assert default_data(folder("b", None), "demo") == "builtin"
    assert default_data(folder("c", "c4")) == "wikitext2"
    assert default_data(folder("d", None), None) == "wikitext2"
    assert default_data(str(plain), "org/name") == "wikitext2"
    assert default_data(str(tmp_path / "nowhere")) == "wikitext2"


def test_refusals(inputs: Inputs, packed: Path, tmp_path: Path) -> None:
    text = ("--data", inputs.text)
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((tmp_path / "nowhere", *text), 1, "no folder"),
        ((packed, "--data", "wikitext"), 2, "did you mean 'wikitext2'?"),
        ((packed, *text, "--seq-len", 999), 2, "the model's limit is 256 tokens"),
        ((packed, *text, "--limit", 0), 2, "limit is 0"),
        ((packed, *text, "--seq-len", 32, "--device", "abacus"), 2, "unknown device 'abacus'"),
        ((packed, *text, "--seq-len", 32, "--dtype", "int3"), 2, "unknown dtype 'int3'"),
        ((packed, *text, "--seq-len", 32, "--reference", tmp_path / "nowhere"), 1, "no folder"),
        ((packed, "--tasks", "a,b", "--tasks-path", tmp_path / "nowhere"), 1, "no such folder"),
    ]
    for arguments, exit_code, message in cases:
        done = quantkit("eval", *arguments, "--json")
        assert (done.exit_code, message) == (exit_code, message if message in done.error else done.error)


def _cursor(file: Terminal) -> str:
    """Bars hide it as long as they are up."""
    written = file.getvalue()
    return "hidden" if written.rfind("\x1b[?25l") > written.rfind("\x1b[?25h") else "shown"


def test_bars_on_a_terminal_are_down_between_texts() -> None:
    """So that what draws bars of its own afterwards finds a free screen."""
    file = Terminal()
    console = Console(file=file, force_terminal=True, width=80, legacy_windows=False)
    with window_progress(console) as progress:
        for name in ("first", "second"):
            progress(name, 1, 2)
            assert _cursor(file) == "hidden"
            progress(name, 2, 2)
            assert _cursor(file) == "shown"
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert re.search(r"first +\S+ 0/2 windows", shown)
    assert re.search(r"second +\S+ 2/2 windows", shown)


def test_kv(inputs: Inputs) -> None:
    flags = ("--data", inputs.text, "--seq-len", 128, "--limit", 2, "--kv", "int4:window=8", "--kv-steps", 10)
    result = quantkit("eval", inputs.model, *flags, "--json")
    assert result.exit_code == 0, result.stderr
    kv = json.loads(result.stdout)["kv"]
    assert kv["spec"] == "int4:window=8"
    assert set(kv["decode_ppl"]) == {inputs.text.stem} == set(kv["reference_ppl"])
    assert 0 < kv["kl_mean"] < 1
    assert kv["bytes_per_token"] > 0 < kv["bf16_bytes_per_token"]
    shown = quantkit("eval", inputs.model, *flags)
    assert "KV cache int4:window=8" in shown.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kv", "int3"), "unknown KV policy 'int3'; did you mean 'int"),
        (("--kv", "kivi", "--kv-steps", "65"), "65 steps do not fit; use kv_steps of at most 64"),
    ],
)
def test_kv_is_checked_before_the_model_is_loaded(inputs: Inputs, flags: tuple[str, ...], message: str) -> None:
    result = quantkit("eval", inputs.model, "--data", inputs.text, "--seq-len", 128, *flags)
    assert result.exit_code == 2
    assert message in result.stderr
