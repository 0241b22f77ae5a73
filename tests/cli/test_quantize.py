"""`quantkit quantize`: the object it prints, the screen it ends with, what it refuses, and how it goes on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from cli_runs import Inputs, Terminal, quantkit
from rich.console import Console

from quantkit.cli.options import parse_bytes
from quantkit.cli.progress import run_progress
from quantkit.cli.screen import duration, size
from quantkit.errors import RequestError
from quantkit.pipeline import Listener, QuantizeRequest, run
from quantkit.pipeline.request import ModuleReport
from quantkit.recipe import resolve

KEYS = {
    "output",
    "method",
    "bpw",
    "size_bytes",
    "bytes",
    "bits_per_parameter",
    "original_bytes",
    "seconds",
    "peak_rss_bytes",
    "resumed_blocks",
    "modules",
}


def test_json_is_the_contract(inputs: Inputs, tmp_path: Path) -> None:
    done = quantkit("quantize", inputs.model, *inputs.flags, "--bits", 5, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0
    assert done.json.keys() == KEYS
    assert (done.json["output"], done.json["method"]) == (str(tmp_path / "out"), "gptq")
    assert done.json["resumed_blocks"] == 0
    assert len(done.json["modules"]) == 14
    assert done.json["modules"][0].keys() == {"name", "format", "bpw", "relative_error"}
    assert done.json["bpw"] == 5 + (16 + 5) / 32  # per group of 32 a float16 scale and a 5-bit zero


def test_progress_of_a_log_is_one_line_per_block(inputs: Inputs, tmp_path: Path) -> None:
    done = quantkit("quantize", inputs.model, *inputs.flags, "-o", tmp_path / "out")
    title, first, second = done.stderr.splitlines()
    assert title == f"gptq, 4 bits: {inputs.model} -> {tmp_path / 'out'}"
    assert re.fullmatch(r"block 1/2: 7 linears in \S+ s, worst relative error 0\.\d{4} \(model.+\), \S+ s left", first)
    assert re.fullmatch(r"block 2/2: 7 linears .+, writing the folder", second)


def test_the_last_screen_is_the_answer(inputs: Inputs, tmp_path: Path) -> None:
    output = tmp_path / "an output"
    done = quantkit("quantize", inputs.model, *inputs.flags, "--method", "rtn", "-o", output)
    lines = done.stdout.splitlines()
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    rest = 4 * (2 * 288 * 64 + 5 * 64)  # embedding, head, norms
    before, after = 4 * weights + rest, weights * (4 + 20 / 32) / 8 + rest
    assert lines[0] == f"size             {size(before)} -> {size(after)} ({before / after:.2f} times smaller)"
    assert lines[1].startswith("bits per weight  4.625 ")
    parameters = weights + 2 * 288 * 64 + 5 * 64
    assert lines[2].startswith(f"whole model      {8 * after / parameters:.3f} bits per parameter: quantized ")
    assert lines[3].startswith("time")
    assert lines[4].startswith("peak memory")
    worst = [float(line.split()[-1]) for line in lines if line.startswith("model.layers.")]
    assert len(worst) == 5
    assert worst == sorted(worst, reverse=True)
    assert f"written  '{output}'" in lines
    assert f"next     quantkit eval '{output}' --reference {inputs.model}" in lines
    assert lines[-1].strip().startswith(f"quantkit generate '{output}' --prompt ")


def test_the_default_output_is_named_after_the_settings(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = quantkit("quantize", inputs.model, "--method", "rtn", "--group-size", 0, "--json")
    assert done.json["output"] == f"{inputs.model.name}-rtn-4b"
    assert (tmp_path / done.json["output"] / "config.json").is_file()


def test_flags_reach_the_recipe(inputs: Inputs, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: rtn\nbits: 5\ngroup_size: 64\n")
    flags = ("--recipe", recipe, "--symmetric", "--set", "grid=mse", "--set", "bits=6", "-o", tmp_path / "out")
    assert quantkit("quantize", inputs.model, *flags).exit_code == 0
    described = quantkit("inspect", tmp_path / "out", "--json").json
    assert described["method"] == "rtn"
    assert {module["group_size"] for module in described["modules"]} == {64}
    assert described["bpw"] == 6 + 16 / 64  # symmetric: no zeros


def test_small_shards(inputs: Inputs, tmp_path: Path) -> None:
    flags = ("--method", "rtn", "--group-size", 32, "--max-shard-size", "100kB", "-o", tmp_path / "out")
    assert quantkit("quantize", inputs.model, *flags).exit_code == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert quantkit("inspect", tmp_path / "out", "--verify").exit_code == 0


def test_dry_run_shows_the_plan_and_writes_nothing(inputs: Inputs, tmp_path: Path) -> None:
    arguments = ("quantize", inputs.model, *inputs.flags, "-o", tmp_path / "out", "--dry-run")
    shown = quantkit(*arguments)
    assert shown.exit_code == 0
    assert re.search(r"^model\.layers\.\*\.mlp\.down_proj +2 +64 x 128 +4\.625 ", shown.stdout, re.MULTILINE)
    assert "not quantized: lm_head.weight (outside the decoder blocks)" in shown.stdout
    assert "(nothing was written)" in shown.stdout
    content = quantkit(*arguments, "--json").json
    assert content["dry_run"] is True
    assert len(content["modules"]) == 14
    assert list(tmp_path.iterdir()) == []


def test_refusals(inputs: Inputs, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(inputs.model / "config.json", bare)
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    model = inputs.model
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((tmp_path / "nowhere",), 1, f"no folder {tmp_path / 'nowhere'}"),
        ((bare,), 1, "no weights"),
        ((model, "--bits", "9"), 2, "bits must be 1 to 8, not 9"),
        ((model, "--bits", "4.5"), 2, "--bits 4.5 needs an allocator"),
        ((model, "--bits", "two"), 2, "bits are a number from 1 to 8, such as 3 (or 2.5 on average), not 'two'"),
        ((model, "--bits", "3", "--bpw", "3"), 2, "the budget is either bits"),
        ((model, "--bits", "1", "--method", "slim"), 2, "slim works at 2 to 7 bits, not 1"),
        ((model, "--group-size", "48"), 2, "in_features 64 is not a multiple of group_size 48"),
        ((model, "--method", "gtpq"), 2, "unknown method 'gtpq'; did you mean 'gptq'?"),
        ((model, "--set", "dampin=1"), 2, "unknown setting 'dampin'; did you mean 'damping'?"),
        ((model, "--set", "damping"), 2, "--set takes KEY=VALUE, not 'damping'"),
        ((model, "--recipe", tmp_path / "none.yaml"), 1, "cannot read recipe"),
        ((model, "-o", full, "--group-size", "32"), 2, f"output {full} exists; choose another folder with -o"),
        ((model, "--max-shard-size", "5 apples"), 2, "a size is a number with a unit, such as 5GB or 500MB"),
        ((model, "--dtype", "int3"), 2, "unknown dtype 'int3'"),
        ((model, "--offload", "tape"), 2, "unknown offload 'tape'"),
        ((model, "--device", "abacus"), 2, "unknown device 'abacus'"),
        ((model, "--seq-len", "9999"), 2, "seq_len 9999 exceeds the model's context of 256 tokens"),
        ((model, "--group-size", "32", "--calib", "nothing"), 2, "nothing: no such file or folder"),
    ]
    for arguments, exit_code, message in cases:
        defaults = () if "-o" in arguments else ("-o", tmp_path / "out")
        done = quantkit("quantize", *arguments, *defaults, "--json")
        assert (done.exit_code, message) == (exit_code, message if message in done.error else done.error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "full"]


class _StopAfterOneBlock(Listener):
    def block_done(self, index: int, seconds: float) -> None:
        raise KeyboardInterrupt


def test_an_unfinished_run_goes_on_with_its_settings_only(inputs: Inputs, tmp_path: Path) -> None:
    output = tmp_path / "out"
    recipe = resolve("gptq", bits=5, group_size=32)
    request = QuantizeRequest(
        model=str(inputs.model), output=output, recipe=recipe, calib=str(inputs.text), n_samples=4, seq_len=32
    )
    with pytest.raises(KeyboardInterrupt):
        run(request, _StopAfterOneBlock())
    arguments = ("quantize", inputs.model, *inputs.flags, "-o", output)
    refused = quantkit(*arguments, "--bits", 4)
    assert refused.exit_code == 2
    assert "an unfinished run had other settings (recipe.bits: 5 then, 4 now)" in refused.error
    resumed = quantkit(*arguments, "--bits", 5, "--json")
    assert resumed.json["resumed_blocks"] == 1
    assert "resuming: 1 of 2 blocks are finished already" in resumed.stderr.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert quantkit(*arguments, "--bits", 4, "--overwrite", "--json").json["resumed_blocks"] == 0


def test_bars_on_a_terminal() -> None:
    file = Terminal()
    console = Console(file=file, force_terminal=True, width=80, legacy_windows=False)
    with run_progress(console, "a run") as progress:
        progress.started(3, 1)
        progress.block_started(1, 2)
        progress.linear_done(ModuleReport("model.layers.1.mlp.up_proj", "grouped_int", 4.25, 0.125))
        progress.note("a note")
        progress.bars.refresh()  # type: ignore[attr-defined]
        progress.block_done(1, 10.0)
        progress.bars.refresh()  # type: ignore[attr-defined]
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert shown.splitlines()[0] == "a run"
    assert re.search(r"blocks +\S+ 1/3 calibrating", shown)
    assert re.search(r"linears +\S+ 1/2 mlp.up_proj error 0.1250", shown)
    assert "a note" in shown
    assert re.search(r"blocks +\S+ 2/3 10.0 s left", shown)
    assert max(len(line) for line in re.split(r"[\r\n]", shown)) <= 80


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1.5 MiB", 3 << 19), ("2GiB", 2 << 30), ("1000", 1000), ("1B", 1)],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "0", "0.1B", "-5GB", "5 G B", "GB", "5PB", "1e9", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(RequestError, match="a size is a number with a unit"):
        parse_bytes(text)


def test_how_numbers_look() -> None:
    assert [size(n) for n in (0, 999, 1000, 9_999_000, 10**8, 999_600_000, 10**15)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "10.0 MB",
        "100 MB",
        "1.00 GB",
        "1000 TB",
    ]
    assert [duration(s) for s in (0.04, 59.94, 60, 3599.6, 7384)] == ["0.0 s", "59.9 s", "1:00", "1:00:00", "2:03:04"]
