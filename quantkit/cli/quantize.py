"""``quantkit quantize``: flags into a request, a run, and the last screen."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.algorithms.registry import METHODS
from quantkit.cli.options import (
    ADVANCED,
    INTERRUPTED,
    Debug,
    Device,
    Json,
    Model,
    Seed,
    TrustRemoteCode,
    parse_bits,
    parse_bytes,
)
from quantkit.cli.screen import (
    busy,
    duration,
    note,
    notes,
    places,
    print_json,
    print_pairs,
    quiet_libraries,
    results,
    size,
    table,
)
from quantkit.recipe import Recipe, resolve

if TYPE_CHECKING:
    from quantkit.cli.progress import RunProgress
    from quantkit.pipeline import Plan, QuantizeRequest, QuantizeResult

_HELP = {item.name: f"{item.metadata['help'][0].upper()}{item.metadata['help'][1:]}." for item in fields(Recipe)}
_N_WORST = 5


def _option(*names: str, help: str, advanced: bool = True, **details: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=ADVANCED if advanced else None, **details)


def _complete_method(incomplete: str) -> list[tuple[str, str]]:
    return [(name, method.title) for name, method in METHODS.items() if name.startswith(incomplete)]


Method = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"One of {', '.join(METHODS)}; see: quantkit methods.",
        show_default="gptq",
        autocompletion=_complete_method,
    ),
]
Bits = Annotated[
    float | None,
    _option(
        "--bits", help=_HELP["bits"], parser=parse_bits, metavar="B", show_default=str(Recipe().bits), advanced=False
    ),
]
Bpw = Annotated[float | None, _option("--bpw", help=_HELP["bpw"], parser=parse_bits, metavar="B", show_default=False)]
GroupSize = Annotated[
    int | None,
    _option(
        "--group-size", help=_HELP["group_size"], metavar="G", show_default=str(Recipe().group_size), advanced=False
    ),
]
Output = Annotated[
    Path | None,
    _option("--output", "-o", help="The new folder.", metavar="DIR", show_default="MODEL-METHOD-Bb", advanced=False),
]
Calib = Annotated[
    str,
    _option(
        "--calib",
        help="Calibration text: builtin (no download), wikitext2, c4, or a .txt, .jsonl or .parquet file; "
        "or a folder with metadata.jsonl and pictures.",
        metavar="NAME|PATH",
        advanced=False,
    ),
]
NSamples = Annotated[int, _option("--n-samples", help="Calibration sequences.", metavar="N", advanced=False)]
SeqLen = Annotated[
    int | None,
    _option(
        "--seq-len",
        help="Tokens of each.",
        metavar="L",
        show_default="2048, or the model's limit if less",
        advanced=False,
    ),
]
DryRun = Annotated[bool, _option("--dry-run", help="Check everything, show what would be done, stop.", advanced=False)]
Overwrite = Annotated[bool, _option("--overwrite", help="Replace the output and forget an unfinished run.")]
Symmetric = Annotated[bool, _option("--symmetric", help=_HELP["symmetric"])]
RecipeFile = Annotated[Path | None, _option("--recipe", help="Settings from a YAML file.", metavar="FILE")]
Settings = Annotated[
    list[str] | None,
    _option("--set", help="Any other setting, such as damping=0.05. Repeatable.", metavar="KEY=VALUE"),
]
Shuffle = Annotated[bool, _option("--calib-shuffle", help="Sequences chosen at random instead of the first ones.")]
Template = Annotated[
    str | None,
    _option(
        "--template",
        help="Prompt for a picture, with {image} and {question}.",
        metavar="TEXT",
        show_default="the model's chat template, or its BOS token, {image}, a newline, {question}",
    ),
]
Offload = Annotated[str, _option("--offload", help="Where hidden states wait: none (on the device), cpu, disk.")]
Dtype = Annotated[
    str,
    _option("--dtype", help="Of the calibration: auto (float32 on the CPU), float32, bfloat16, float16.", metavar="T"),
]
ShardSize = Annotated[
    int, _option("--max-shard-size", help="Largest file of the output.", parser=parse_bytes, metavar="SIZE")
]


def quantize(
    model: Model,
    method: Method = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    output: Output = None,
    calib: Calib = "builtin",
    n_samples: NSamples = 128,
    seq_len: SeqLen = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    as_json: Json = False,
    bpw: Bpw = None,
    symmetric: Symmetric = False,
    recipe_file: RecipeFile = None,
    settings: Settings = None,
    calib_shuffle: Shuffle = False,
    template: Template = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    offload: Offload = "cpu",
    max_shard_size: ShardSize = "5GB",  # type: ignore[assignment]  # the parser gets the default too
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Quantize a model into a packed folder. An interrupted run goes on when the same command is repeated."""
    chosen = [*(["symmetric=true"] if symmetric else []), *(settings or [])]
    recipe = resolve(method, bits=bits, bpw=bpw, group_size=group_size, settings=chosen, file=recipe_file)
    from quantkit.pipeline import QuantizeRequest, default_output

    request = QuantizeRequest(
        model=model,
        output=output or default_output(model, recipe),
        recipe=recipe,
        calib=calib,
        n_samples=n_samples,
        seq_len=seq_len,
        calib_shuffle=calib_shuffle,
        template=template,
        seed=seed,
        device=device,
        dtype=dtype,
        offload=offload,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        max_shard_bytes=max_shard_size,
    )
    if dry_run:
        _plan(request, as_json)
    else:
        _run(request, as_json)


def _run(request: QuantizeRequest, as_json: bool) -> None:
    from quantkit.cli.progress import run_progress
    from quantkit.pipeline import run, take_part, team

    if team.rank():  # of several processes the first one speaks
        take_part(request)
        return
    recipe = request.recipe
    progress = run_progress(notes(), f"{recipe.method}, {recipe.budget_name}: {request.model} -> {request.output}")
    try:
        with quiet_libraries(), progress:
            busy(f"reading {request.model}")
            result = run(request, progress)
    except KeyboardInterrupt:
        note(_how_to_resume(progress))
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(result.to_json())
    else:
        _show_result(result, request)


def _how_to_resume(progress: RunProgress) -> str:
    done, n_blocks = progress.n_finished, progress.n_blocks
    if progress.n_steps:
        kept = f"the training of step {progress.n_kept} of {progress.n_steps} is kept"
        return f"interrupted: {kept}; run the same command again to resume"
    how = f"{done} of {n_blocks} blocks are finished" if done else "before the first block was finished"
    return f"interrupted: {how}; run the same command again to resume"


def _show_result(result: QuantizeResult, request: QuantizeRequest) -> None:
    from quantkit.calib.pictures import holds_pictures

    screen = results()
    ratio = result.original_bytes / result.size_bytes
    worst = sorted(result.modules, key=lambda module: -module.relative_error)[:_N_WORST]
    print_pairs(
        screen,
        [
            ("size", f"{size(result.original_bytes)} -> {size(result.size_bytes)} ({ratio:.2f} times smaller)"),
            ("bits per weight", f"{result.bpw:.3f} in the quantized layers, scales and zeros included"),
            ("whole model", f"{result.bits_per_parameter:.3f} bits per parameter: {places(result.bytes)}"),
            ("time", duration(result.seconds)),
            ("peak memory", size(result.peak_rss_bytes)),
        ],
    )
    made = table("worst layers", "bpw", "relative error", numbers=("bpw", "relative error"))
    for module in worst:
        made.add_row(module.name, f"{module.bpw:.3f}", f"{module.relative_error:.4f}")
    screen.print("", made, "")
    folder, source = shlex.quote(str(result.output)), shlex.quote(request.model)
    data = " --data builtin --limit 20" if request.calib == "builtin" or request.model == "demo" else ""
    if holds_pictures(request.calib):
        data = f" --vqa {shlex.quote(request.calib)}"
    for label, value in (
        ("written", folder),
        ("next", f"quantkit eval {folder}{data} --reference {source}"),
        ("", f'quantkit generate {folder} --prompt "def main():"'),
    ):
        screen.print(f"{label:8} {value}", soft_wrap=True)


def _plan(request: QuantizeRequest, as_json: bool) -> None:
    from quantkit.pipeline import dry_run

    with quiet_libraries():
        plan = dry_run(request)
    if as_json:
        print_json(plan.to_json())
    else:
        _show_plan(plan, request)


def _show_plan(plan: Plan, request: QuantizeRequest) -> None:
    screen = results()
    made = table("layers", "count", "shape", "bpw", "bytes", numbers=("count", "shape", "bpw", "bytes"))
    alike: dict[tuple[str, Any], int] = {}
    for name, spec in (*plan.modules, *plan.outside):
        kind = (re.sub(r"\.\d+(?=\.|$)", ".*", name), spec)
        alike[kind] = alike.get(kind, 0) + 1
    for (name, spec), count in alike.items():
        shape = f"{spec.out_features} x {spec.in_features}"
        made.add_row(name, str(count), shape, f"{spec.bpw:.3f}", size(count * spec.n_bytes))
    screen.print(made, "")
    for name, reason in plan.skipped:
        screen.print(f"not quantized: {name} ({reason})", soft_wrap=True)
    if plan.transform_bytes:
        extra = f"{size(plan.transform_bytes)} more: the output head can no longer share the embedding"
        screen.print(f"transform={request.recipe.transform}: {extra}", soft_wrap=True)
    print_pairs(
        screen,
        [
            ("blocks", str(plan.n_blocks)),
            ("size", f"{size(plan.original_bytes)} -> {size(plan.output_bytes)}"),
            ("bits per weight", f"{'at most ' if plan.at_most else ''}{plan.bpw:.3f} in the quantized layers"),
            ("whole model", f"{plan.account.bits_per_parameter:.3f} bits per parameter: {places(plan.account.bytes)}"),
            ("peak memory", f"about {size(plan.peak_memory_bytes)}"),
            ("time", f"about {duration(plan.seconds)}"),
            ("output", f"{request.output} (nothing was written)"),
        ],
    )
