"""What is called from outside: `quantize`, and `run` and `dry_run` of a request."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from quantkit.calib.datasets import Calibration
from quantkit.calib.pictures import PictureCalibration, holds_pictures
from quantkit.calib.sources import source_name
from quantkit.errors import RequestError
from quantkit.formats.storage import spec_from_json
from quantkit.models.modality import sees_images
from quantkit.models.skeleton import Skeleton
from quantkit.pipeline.journal import Journal, refuse_existing
from quantkit.pipeline.output import assemble
from quantkit.pipeline.outside import outside_matrices, quantize_outside
from quantkit.pipeline.plan import Plan, check_room, make_plan, measure_room
from quantkit.pipeline.prepare import (
    compute_dtype,
    deciding_settings,
    open_model,
    read_calibration,
    sequence_length,
)
from quantkit.pipeline.request import Listener, QuantizeRequest, QuantizeResult
from quantkit.pipeline.restore import restore
from quantkit.pipeline.team import size as team_size
from quantkit.pipeline.train import follow, train, training_set
from quantkit.pipeline.walk import Walk, module_report
from quantkit.recipe import Recipe, resolve


def quantize(
    model: str | Path,
    output: str | Path | None = None,
    *,
    method: str | None = None,
    bits: float | None = None,
    bpw: float | None = None,
    group_size: int | None = None,
    settings: Sequence[str] = (),
    recipe_file: str | Path | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> QuantizeResult:
    """Quantize a model folder, a hub id or ``"demo"`` into a packed folder.

    Args:
        output: the new folder; None: ``MODEL-METHOD-Bb`` in the current folder.
        method, bits, bpw, group_size, settings, recipe_file: see `quantkit.recipe.resolve`.
        options: further fields of `QuantizeRequest`: calib, n_samples, seq_len, seed, device, offload, ...

    Raises:
        RequestError, FileError, NumericalError: see their messages. Finished blocks survive; the same call resumes.

    >>> quantize("demo", method="gtpq")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    quantkit.errors.RequestError: unknown method 'gtpq'; did you mean 'gptq'? known: ...
    """
    file = Path(recipe_file) if recipe_file is not None else None
    recipe = resolve(method, bits=bits, bpw=bpw, group_size=group_size, settings=settings, file=file)
    target = Path(output) if output is not None else default_output(str(model), recipe)
    return run(QuantizeRequest(model=str(model), output=target, recipe=recipe, **options), listener)


def default_output(model: str, recipe: Recipe) -> Path:
    """``NAME-METHOD-Bb`` (or ``-Xbpw``) in the current folder."""
    budget = f"{recipe.bits}b" if recipe.bpw is None else f"{recipe.bpw:g}bpw"
    return Path(f"{Path(os.path.abspath(model)).name}-{recipe.method}-{budget}")


def dry_run(request: QuantizeRequest) -> Plan:
    """Check the whole request and say what it would do, without reading a weight or writing a file."""
    if request.recipe.needs_calibration and not holds_pictures(request.calib):
        source_name(request.calib)
    skeleton, device = open_model(request)
    plan, _ = _planned(request, skeleton, device)
    return plan


def take_part(request: QuantizeRequest) -> None:
    """What every process of a launch but the first one does, while that one carries out the request with `run`."""
    skeleton, device = open_model(request)
    follow(request, skeleton, device)


def run(request: QuantizeRequest, listener: Listener | None = None) -> QuantizeResult:
    """Carry out a request; see `quantize`."""
    began = time.perf_counter()
    if team_size() > 1 and not request.recipe.trains:
        raise RequestError("several processes share the work of --set refine=qat only; start this command without them")
    refuse_existing(request.output, request.overwrite)
    skeleton, device = open_model(request)
    plan, pictures = _planned(request, skeleton, device)
    check_room(plan, request.output, measure_room(request.output, device))
    calibration = pictures or read_calibration(request, skeleton, sequence_length(skeleton, request))
    listener = listener or Listener()
    if isinstance(calibration, Calibration) and sees_images(skeleton.config):
        listener.note(
            "calibrating on text alone costs many answers; give --calib a folder of pictures (docs/vision.md)"
        )
    dtype = compute_dtype(request, skeleton, device)
    text = training_set(request, skeleton) if request.recipe.trains else None
    settings = deciding_settings(request, skeleton, calibration, text, device, dtype)
    with Journal(request.output, settings, overwrite=request.overwrite) as journal, _terminable(), torch.no_grad():
        resumed = len(journal.finished)
        outside = outside_matrices(skeleton, request.recipe)
        entries = quantize_outside(outside, skeleton, journal.folder)
        if request.recipe.transform == "restore":
            plain = replace(request, recipe=request.recipe.without_transform())

            def first_pass(first: Journal) -> None:
                Walk(plain, skeleton, calibration, first, listener, device, dtype, outside).run()

            if not isinstance(calibration, Calibration):
                raise RequestError("transform=restore tunes on text; give --calib text, or leave it out with pictures")
            skeleton.transform = restore(
                skeleton,
                calibration.input_ids,
                request.recipe,
                request.seed,
                journal.folder,
                device,
                first_pass,
                listener.note,
            )
        walk = Walk(request, skeleton, calibration, journal, listener, device, dtype, outside)
        walk.run()
        if text is not None:
            train(request, skeleton, text, journal, listener, device)
        written = assemble(skeleton, journal, request, calibration, outside, entries)
    modules = [item for block in journal.finished for item in block.modules.items()]
    specs = [spec_from_json(entry["spec"]) for _, entry in modules]
    return QuantizeResult(
        output=request.output,
        method=request.recipe.method,
        bpw=8 * sum(spec.n_bytes for spec in specs) / sum(spec.n_weights for spec in specs),
        size_bytes=written.n_bytes,
        bytes=written.bytes,
        bits_per_parameter=written.bits_per_parameter,
        original_bytes=plan.original_bytes,
        seconds=time.perf_counter() - began,
        peak_rss_bytes=_peak_rss(),
        resumed_blocks=resumed,
        modules=tuple(module_report(name, entry) for name, entry in modules),
    )


def _planned(
    request: QuantizeRequest, skeleton: Skeleton, device: torch.device
) -> tuple[Plan, PictureCalibration | None]:
    """The plan. Pictures are read for it, since their processor decides how many tokens they take; text is not."""
    seq_len = sequence_length(skeleton, request)
    calibration = read_calibration(request, skeleton, seq_len) if holds_pictures(request.calib) else None
    assert not isinstance(calibration, Calibration)
    return make_plan(skeleton, request, calibration.longest if calibration else seq_len, device), calibration


def _peak_rss() -> int:
    """Of this process since its start, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a run like Ctrl-C: through ``finally``, with the finished blocks kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
