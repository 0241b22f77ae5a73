"""``quantkit eval``: perplexity, the distance to a reference, task accuracies."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.options import ADVANCED, Debug, Device, Json, Kv, LoadDtype, Model, TrustRemoteCode
from quantkit.cli.screen import busy, duration, no_bars_in_logs, notes, print_json, quiet_libraries, results, table
from quantkit.errors import FileError
from quantkit.formats.files import read_json

if TYPE_CHECKING:
    from quantkit.evaluation import EvalReport

Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|PATH",
        help="Evaluation text: builtin, wikitext2, c4, or a .txt, .jsonl or .parquet file. Repeatable.",
        show_default="builtin for demo and what was calibrated on builtin, else wikitext2; none with --tasks",
    ),
]
SeqLen = Annotated[
    int | None,
    typer.Option(metavar="L", help="Tokens of a window.", show_default="2048, or the model's limit if less"),
]
Limit = Annotated[
    int | None,
    typer.Option(metavar="N", help="The first N windows of a text, questions of a folder, documents of a task."),
]
Vqa = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR", help="Questions about pictures: a folder with metadata.jsonl and the pictures. Repeatable."
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Prompt for a picture, with {image} and {question}.",
        show_default="the model's chat template, or its BOS token, {image}, a newline, {question}",
        rich_help_panel=ADVANCED,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Of an answer about a picture.", rich_help_panel=ADVANCED)]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Also measure KL divergence and top-1 agreement to this model, on the same text."
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(metavar="NAMES", help="lm-eval tasks, such as piqa,arc_easy. Repeatable.", rich_help_panel=ADVANCED),
]
TasksPath = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A folder with lm-eval task files of your own.", rich_help_panel=ADVANCED),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Windows, documents or questions per forward pass.",
        show_default="1; 8 questions about pictures",
        rich_help_panel=ADVANCED,
    ),
]

KvSteps = Annotated[int, typer.Option(metavar="N", help="Tokens of each window decoded with --kv, one by one.")]


def evaluate(
    model: Model,
    data: Data = None,
    seq_len: SeqLen = None,
    limit: Limit = None,
    reference: Reference = None,
    vqa: Vqa = None,
    kv: Kv = None,
    kv_steps: KvSteps = 128,
    device: Device = "auto",
    as_json: Json = False,
    tasks: Tasks = None,
    tasks_path: TasksPath = None,
    batch_size: BatchSize = None,
    template: Template = None,
    max_new_tokens: MaxNewTokens = 24,
    dtype: LoadDtype = None,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity on text, answers about pictures, the distance to a reference model, and task accuracies."""
    from quantkit.cli.progress import window_progress
    from quantkit.evaluation import evaluate as measure

    names = [name.strip() for item in tasks or () for name in item.split(",") if name.strip()]
    texts = data or ([] if names or vqa else [default_data(model, reference)])
    console = notes()
    with quiet_libraries(), no_bars_in_logs(), window_progress(console) as progress:
        busy(f"loading {model}" + (f" and {reference}" if reference else ""))
        report = measure(
            model,
            data=texts,
            seq_len=seq_len,
            limit=limit,
            reference=reference,
            vqa=vqa or (),
            template=template,
            max_new_tokens=max_new_tokens,
            kv=kv,
            kv_steps=kv_steps,
            tasks=names,
            tasks_path=tasks_path,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)


def default_data(*models: str | None) -> str:
    """``builtin`` when one of the models is the demo or was calibrated on builtin text, else ``wikitext2``."""
    return "builtin" if any(_knows_builtin(model) for model in models if model) else "wikitext2"


def _knows_builtin(model: str) -> bool:
    if model == "demo":
        return True
    config: dict[str, Any] = {}
    with suppress(FileError):  # what is wrong with the folder is for the loader to say
        config = read_json(Path(model) / "config.json")
    calibration = (config.get("quantization_config") or {}).get("calibration") or {}
    return calibration.get("source") == "builtin"


def _show(report: EvalReport) -> None:
    screen = results()
    screen.print(report.model, style="bold")
    compared = any(result.kl_mean is not None for result in report.perplexity.values())
    columns = ["perplexity", "windows", "seq_len", *(["KL to reference", "top-1 agreement"] if compared else [])]
    if report.perplexity:
        made = table("text", *columns, numbers=tuple(columns))
        for name, result in report.perplexity.items():
            row = [name, f"{result.ppl:.4f}", str(result.windows), str(result.seq_len)]
            if result.kl_mean is not None and result.top1_agreement is not None:
                row += [f"{result.kl_mean:.5f}", f"{100 * result.top1_agreement:.2f} %"]
            made.add_row(*row)
        screen.print("", made, "")
        for result in report.perplexity.values():
            screen.print(result.protocol, soft_wrap=True)
    if report.vqa:
        with_kl = any(result.kl_mean is not None for result in report.vqa.values())
        columns = ["exact match", "questions", *(["KL to reference"] if with_kl else [])]
        made = table("pictures", *columns, numbers=tuple(columns))
        for name, answered in report.vqa.items():
            row = [name, f"{answered.exact_match:.4f}", str(answered.n)]
            made.add_row(*row, *([] if answered.kl_mean is None else [f"{answered.kl_mean:.5f}"]))
        screen.print("", made, "")
        for answered in report.vqa.values():
            screen.print(answered.protocol, soft_wrap=True)
    if report.kv:
        _show_kv(report)
    if report.tasks:
        made = table("task", "metric", "value", numbers=("value",))
        for name, metrics in report.tasks.items():
            for metric, value in metrics.items():
                made.add_row(name, metric, f"{value:.4f}")
        screen.print("", made, "")
    screen.print(f"time: {duration(report.seconds)}")


def _show_kv(report: EvalReport) -> None:
    screen = results()
    columns = ("decode ppl", "in 16 bits", "KL to 16 bits", "bytes per token", "bf16")
    made = table(f"KV cache {report.kv_spec}", *columns, numbers=columns)
    for name, each in report.kv.items():
        sizes = (f"{each.bytes_per_token:.0f}", f"{each.bf16_bytes_per_token:.0f}")
        made.add_row(name, f"{each.ppl:.4f}", f"{each.reference_ppl:.4f}", f"{each.kl_mean:.5f}", *sizes)
    screen.print("", made, "")
    for reason in {each.reason for each in report.kv.values() if each.reason}:
        screen.print(f"{reason}: attention gets dequantized tensors", soft_wrap=True)
