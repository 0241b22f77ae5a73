"""A run that ends in the middle loses at most the block in hand, and its repetition ends in the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from quantized_models import Events, Interrupted, StopAfter, calibration_text, sha256_of, small_request, small_run
from tiny_models import tiny_model

from quantkit.errors import FileError, RequestError
from quantkit.formats.checkpoint import verify_checksums
from quantkit.pipeline import Listener, run
from quantkit.pipeline.journal import Journal, work_folder

N_BLOCKS = 3


@pytest.fixture(scope="module")
def source(models: Path) -> Path:
    return tiny_model("llama", models, num_hidden_layers=N_BLOCKS)


@pytest.fixture(scope="module")
def undisturbed(source: Path, text: Path, models: Path) -> dict[str, str]:
    return sha256_of(small_run(source, models / "undisturbed", text).output)


class Processes:
    """Runs in processes of their own; see `killed_runs`."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        script = Path(__file__).parents[1] / "killed_runs.py"
        self._forker = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )

    def run(self, **job: Any) -> tuple[int | None, str]:
        """The signal that ended the run (None: it ended by itself), and what it said."""
        assert self._forker.stdin
        assert self._forker.stdout
        job = {key: str(value) if isinstance(value, Path) else value for key, value in job.items()}
        self._forker.stdin.write(json.dumps({"options": {}} | job) + "\n")
        self._forker.stdin.flush()
        answer = json.loads(self._forker.stdout.readline())
        status = answer["status"]
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None, answer["said"]

    def close(self) -> None:
        self._forker.communicate(timeout=60)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes()
    yield started
    started.close()


@pytest.fixture
def stopped(source: Path, text: Path, tmp_path: Path) -> Path:
    """The output of a run that stopped in its third block."""
    with pytest.raises(Interrupted):
        run(small_request(source, tmp_path / "out", text), StopAfter(2))
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


def assert_resumes(
    source: Path, output: Path, text: Path, n_resumed: int, undisturbed: dict[str, str], **options: Any
) -> None:
    events = Events()
    result = small_run(source, output, text, listener=events, **options)
    assert result.resumed_blocks == n_resumed
    assert events.seen[0] == ("started", N_BLOCKS, n_resumed)
    assert [index for kind, index, *_ in events.seen if kind == "block_done"] == list(range(n_resumed, N_BLOCKS))
    assert len(result.modules) == 7 * N_BLOCKS
    assert sha256_of(output) == undisturbed
    assert not work_folder(output).exists()


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "block"), [(signal.SIGKILL, 0), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_signals_keep_the_finished_blocks(
    signum: int,
    block: int,
    source: Path,
    text: Path,
    tmp_path: Path,
    undisturbed: dict[str, str],
    processes: Processes,
) -> None:
    output = tmp_path / "out"
    ended = processes.run(source=source, output=output, text=text, signal=signum, after_block=block)
    assert ended == ((signal.SIGKILL, "") if signum == signal.SIGKILL else (None, "KeyboardInterrupt: "))
    assert not output.exists()
    assert_resumes(source, output, text, block + 1, undisturbed)


@pytest.mark.slow
def test_kill_before_every_single_change_of_the_file_system(
    models: Path, text: Path, tmp_path: Path, processes: Processes
) -> None:
    source = tiny_model("llama", models, seed=1)
    reference = sha256_of(small_run(source, tmp_path / "reference", text, "rtn").output)
    output = tmp_path / "here" / "out"
    output.parent.mkdir()
    job = {"source": source, "output": output, "text": text, "options": {"method": "rtn"}}
    kills: list[tuple[str, int]] = []  # before what, and how many blocks the repetition resumed
    for number in count():
        signum, before = processes.run(**job, kill_before=number)
        if signum is None:
            break
        if output.exists():  # killed while clearing away the work folder
            assert before.partition(" ")[0] in ("os.remove", "os.rmdir")
            assert sha256_of(output) == reference
            with pytest.raises(RequestError, match=r"output .*out exists; choose another folder with -o, or pass"):
                small_run(source, output, text, "rtn")
        else:
            kills.append((before, small_run(source, output, text, "rtn").resumed_blocks))
            assert sha256_of(output) == reference, before
            assert not work_folder(output).exists()
        shutil.rmtree(output)
        shutil.rmtree(work_folder(output), ignore_errors=True)
    assert len(kills) > 25
    assert [resumed for _, resumed in kills] == sorted(resumed for _, resumed in kills)
    # between a block's file and its line, and before the folder is renamed into place
    assert [kill for kill in kills if kill[0] == "open journal.jsonl"] == [("open journal.jsonl", i) for i in range(2)]
    assert kills[-1] == ("os.rename final", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("touching", "before"),
    [(".rotated-00001", "open .rotated-00001"), ("block-00001", "os.rename .block-00001"), ("final", "os.mkdir final")],
)
def test_kill_while_a_rotated_model_is_written(
    touching: str, before: str, models: Path, text: Path, tmp_path: Path, processes: Processes
) -> None:
    source = tiny_model("llama", models, seed=1)
    options = {"method": "rtn", "settings": ["transform=hadamard"]}
    reference = sha256_of(small_run(source, tmp_path / "reference", text, **options).output)
    output = tmp_path / "here" / "out"
    output.parent.mkdir()
    job = {"source": source, "output": output, "text": text, "options": options}
    killed = processes.run(**job, kill_before=0, touching=work_folder(output) / touching)
    assert killed[0] == signal.SIGKILL
    assert killed[1].startswith(before)
    assert sha256_of(small_run(source, output, text, **options).output) == reference


@pytest.mark.slow
@pytest.mark.parametrize(
    ("touching", "settings"),
    [
        (".block-00001", ["block_steps=3"]),
        (".first.quantkit/.block-00001", ["transform=restore", "restore_steps=2"]),
        (".restored", ["transform=restore", "restore_steps=2"]),
        (".block-00001", ["transform=restore", "restore_steps=2", "block_steps=2"]),
    ],
    ids=["scales", "first pass", "tuning", "second pass"],
)
def test_kill_after_gradient_steps(
    touching: str, settings: list[str], models: Path, text: Path, tmp_path: Path, processes: Processes
) -> None:
    source = tiny_model("llama", models, seed=1)
    options = {"method": "ptq161", "bits": 1.6, "group_size": None, "settings": settings}
    reference = sha256_of(small_run(source, tmp_path / "reference", text, **options).output)
    output = tmp_path / "here" / "out"
    output.parent.mkdir()
    job = {"source": source, "output": output, "text": text, "options": options}
    assert processes.run(**job, kill_before=0, touching=work_folder(output) / touching)[0] == signal.SIGKILL
    assert sha256_of(small_run(source, output, text, **options).output) == reference


@pytest.mark.slow
def test_kill_while_a_finished_output_is_replaced(
    models: Path, text: Path, tmp_path: Path, processes: Processes
) -> None:
    """It is whole at any moment, and missing only between two renames."""
    source = tiny_model("llama", models, seed=1)
    reference = sha256_of(small_run(source, tmp_path / "reference", text, "rtn").output)
    old = small_run(source, tmp_path / "old", text, "rtn", bits=8).output
    output = tmp_path / "here" / "out"
    job = {"source": source, "output": output, "text": text, "options": {"method": "rtn", "overwrite": True}}
    for number, before, left in ((0, "os.rename out", sha256_of(old)), (1, "os.rename final", None)):
        shutil.copytree(old, output)
        killed = processes.run(**job, kill_before=number, touching=output)
        assert killed == (signal.SIGKILL, before)
        assert (sha256_of(output) if output.exists() else None) == left
        assert sha256_of(small_run(source, output, text, "rtn", overwrite=True).output) == reference
        shutil.rmtree(output)


def test_a_cut_off_last_line_is_forgotten(source: Path, text: Path, stopped: Path, undisturbed: dict[str, str]) -> None:
    journal = work_folder(stopped) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-1])  # all but the newline: it was the last byte to come
    assert_resumes(source, stopped, text, 1, undisturbed)


def test_a_line_in_the_middle_that_is_no_json(
    source: Path, text: Path, stopped: Path, undisturbed: dict[str, str]
) -> None:
    journal = work_folder(stopped) / "journal.jsonl"
    first, second = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first[:40] + b"\n" + second)
    assert_resumes(source, stopped, text, 0, undisturbed)


@pytest.mark.parametrize("damage", ["edited", "cut", "removed"])
def test_a_damaged_block_file_is_made_again(
    damage: str, source: Path, text: Path, stopped: Path, undisturbed: dict[str, str]
) -> None:
    block = work_folder(stopped) / "block-00001.safetensors"
    content = bytearray(block.read_bytes())
    content[-1] ^= 1
    if damage == "removed":
        block.unlink()
    else:
        block.write_bytes(content if damage == "edited" else content[:-1])
    assert_resumes(source, stopped, text, 1, undisturbed)


def test_resume_with_another_offload_and_shard_size(
    source: Path, text: Path, stopped: Path, undisturbed: dict[str, str]
) -> None:
    """What does not decide about the bytes of a block may change."""
    assert_resumes(source, stopped, text, 2, undisturbed, offload="disk")


@pytest.mark.parametrize(
    ("settings", "n_finished"),
    [
        (["sequential=true"], 2),
        (["correction=0.5", "refine=1"], 2),
        (["allocator=lim", "lo=2", "hi=4"], 0),
        (["allocator=error", "granularity=linear", "lo=2", "hi=4"], 2),
        (["allocator=sba", "grid=sqc"], 1),
        (["transform=hadamard", "correction=0.5"], 2),
        (["solver=ptq161", "group_size=0", "block_steps=4"], 1),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_every_kind_of_recipe_resumes(
    settings: list[str], n_finished: int, source: Path, text: Path, tmp_path: Path
) -> None:
    whole = sha256_of(small_run(source, tmp_path / "whole", text, settings=settings).output)
    with pytest.raises(Interrupted):
        run(small_request(source, tmp_path / "out", text, settings=settings), StopAfter(n_finished))
    assert_resumes(source, tmp_path / "out", text, n_finished, whole, settings=settings)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"bits": 4}, "recipe.bits: 3 then, 4 now"),
        ({"settings": ["damping=0.1"]}, "recipe.damping: 0.01 then, 0.1 now"),
        ({"group_size": 0}, "recipe.group_size: 32 then, None now"),
        ({"seed": 5}, "seed: 0 then, 5 now"),
        ({"n_samples": 3}, "calibration.n_samples: 4 then, 3 now"),
        ({"method": "rtn"}, "recipe.method: 'gptq' then, 'rtn' now"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' then, 'bfloat16' now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_changed_settings_are_refused_by_name(
    options: dict[str, Any], difference: str, source: Path, text: Path, stopped: Path
) -> None:
    before = sha256_of(work_folder(stopped))
    with pytest.raises(RequestError) as refused:
        small_run(source, stopped, text, **options)
    message = str(refused.value)
    assert message.startswith(f"{stopped}: an unfinished run had other settings (")
    assert difference in message
    assert message.endswith("repeat its settings to resume, or pass --overwrite to start anew")
    assert "\n" not in message
    assert sha256_of(work_folder(stopped)) == before


def test_a_changed_source_or_text_is_refused(models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path, seed=2)
    with pytest.raises(Interrupted):
        run(small_request(source, tmp_path / "out", text), StopAfter(1))
    other = calibration_text(tmp_path)
    other.write_text(other.read_text()[::-1])
    with pytest.raises(RequestError, match=r"calibration\.fingerprint: '\w+' then, '\w+' now"):
        small_run(source, tmp_path / "out", other)
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(RequestError, match=r"source\.model\.safetensors: \[.*\] then, \[.*, 1\] now"):
        small_run(source, tmp_path / "out", text)


def test_overwrite_starts_anew(source: Path, text: Path, stopped: Path, undisturbed: dict[str, str]) -> None:
    assert_resumes(source, stopped, text, 0, undisturbed, overwrite=True)


def test_overwrite_replaces_a_finished_output(source: Path, text: Path, tmp_path: Path) -> None:
    output = small_run(source, tmp_path / "out", text, "rtn", bits=8).output
    (output / "note.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"output .*out exists; choose another folder with -o, or pass --overwrite"):
        small_run(source, output, text, "rtn")
    assert (output / "note.txt").exists()
    small_run(source, output, text, "rtn", overwrite=True)
    assert not (output / "note.txt").exists()
    verify_checksums(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_process_at_a_time(source: Path, text: Path, stopped: Path, undisturbed: dict[str, str]) -> None:
    settings = json.loads((work_folder(stopped) / "run.json").read_text())
    with (
        Journal(stopped, settings, overwrite=False),
        pytest.raises(RequestError, match=r"out: another process is writing it; wait for it, or choose another"),
    ):
        small_run(source, stopped, text)
    assert_resumes(source, stopped, text, 2, undisturbed)


@pytest.mark.slow
def test_no_space_for_the_final_folder(
    source: Path, text: Path, tmp_path: Path, undisturbed: dict[str, str], processes: Processes
) -> None:
    """Blocks fit under the limit, the assembled file does not: everything finished is kept, and the rest goes on."""
    output = tmp_path / "out"
    ended = processes.run(source=source, output=output, text=text, file_size_limit=100_000)
    assert ended == (None, f"FileError: cannot write {work_folder(output)}/final/model.safetensors: File too large")
    assert not output.exists()
    assert_resumes(source, output, text, N_BLOCKS, undisturbed)


@pytest.mark.slow
def test_no_space_for_a_block(
    source: Path, text: Path, tmp_path: Path, undisturbed: dict[str, str], processes: Processes
) -> None:
    output = tmp_path / "out"
    ended = processes.run(source=source, output=output, text=text, file_size_limit=10_000)
    assert ended == (None, f"FileError: cannot write {work_folder(output)}/block-00000.safetensors: File too large")
    assert_resumes(source, output, text, 0, undisturbed)


def test_a_full_disk(source: Path, text: Path, tmp_path: Path) -> None:
    """A file system of its own that something else fills up during the run."""
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    ballast = tmp_path / "ballast"

    class Fill(Listener):
        def block_started(self, index: int, n_linears: int) -> None:
            if index == N_BLOCKS - 1:
                ballast.write_bytes(bytes(shutil.disk_usage(tmp_path).free - 100_000))

    try:
        request = small_request(source, tmp_path / "out", text, "rtn")
        with pytest.raises(
            FileError, match=r"^disk is full while writing .*final/model\.safetensors; free 1 MiB and run"
        ):
            run(request, Fill())
        assert not request.output.exists()
        ballast.unlink()
        assert run(request).resumed_blocks == N_BLOCKS
        verify_checksums(request.output)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
