"""Embedding and output head as `grouped_int`: what ``embedding_bits`` and ``head_bits`` ask for.

Below two bits per weight in the blocks, the two matrices around them are most of a small model's file. They are rounded
to nearest in groups of 128 columns: no calibration, and no effect on ``bpw``, which is that of the blocks' linears. A
table that is embedding and head at once is stored once and used by both. The blocks are calibrated on what the stored
embedding gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.algorithms.grids import GRIDS
from quantkit.algorithms.rtn import rtn
from quantkit.errors import NumericalError, RequestError
from quantkit.formats.checkpoint import TRIPWIRE
from quantkit.formats.grouped_int import GroupedInt, GroupedIntSpec, pack
from quantkit.formats.safetensors_io import TensorRef, read_header, read_tensor, row_pieces, write_tensors
from quantkit.kernels.lookup import lookup
from quantkit.models.embeddings import Matrix, find_ends
from quantkit.models.skeleton import Skeleton
from quantkit.pipeline.solve import relative_error
from quantkit.recipe import Recipe

FILE = "outside.safetensors"
_GROUP_SIZES = (128, 64, 32, 16)
_CHUNK_WEIGHTS = 1 << 24  # rounded at once: a table of a large vocabulary is not held in float32


@dataclass(frozen=True, slots=True)
class OutsideMatrix:
    """One matrix to store packed: runtime name, tensors' prefix, description, and the source tensors it replaces."""

    name: str
    prefix: str
    spec: GroupedIntSpec
    replaced: tuple[TensorRef, ...]  # the first is read
    is_embedding: bool


def outside_matrices(skeleton: Skeleton, recipe: Recipe) -> tuple[OutsideMatrix, ...]:
    """What a recipe quantizes around the blocks; nothing by default.

    Raises:
        RequestError: the model has no such matrices, or ties them while the recipe treats them differently.
    """
    if not recipe.embedding_bits and not recipe.head_bits:
        return ()
    ends = find_ends(skeleton.model)
    embedding, head = _source(skeleton, ends.embedding), _source(skeleton, ends.head)
    if ends.tied and not _unties(skeleton):
        if recipe.embedding_bits != recipe.head_bits:
            raise RequestError(
                f"{type(skeleton.model).__name__}: embedding and head are one tensor here; set embedding_bits and "
                f"head_bits to the same, not {recipe.embedding_bits} and {recipe.head_bits}"
            )
        refs = tuple({ref.name: ref for ref in (embedding, head)}.values())
        names = [ref.name for ref in refs if ref.name != f"{ends.head.name}.weight"]
        name = names[0] if names else f"{ends.embedding.name}.weight"  # files that hold the table as the head's
        spec = _spec(ends.embedding, recipe.embedding_bits)
        return (OutsideMatrix(ends.embedding.name, name.removesuffix(".weight"), spec, refs, True),)
    found = []
    for matrix, ref, bits in ((ends.embedding, embedding, recipe.embedding_bits), (ends.head, head, recipe.head_bits)):
        if bits:
            prefix = matrix.name if embedding.name == head.name else ref.name.removesuffix(".weight")
            found.append(OutsideMatrix(matrix.name, prefix, _spec(matrix, bits), (ref,), matrix is ends.embedding))
    return tuple(found)


def packed_parameters(skeleton: Skeleton, recipe: Recipe) -> frozenset[str]:
    """Runtime names of the parameters that `outside_matrices` will store, known before there is a transform."""
    if not recipe.embedding_bits and not recipe.head_bits:
        return frozenset()
    ends = find_ends(skeleton.model)
    chosen = ((ends.embedding, recipe.embedding_bits), (ends.head, recipe.head_bits))
    return frozenset(f"{matrix.name}.weight" for matrix, bits in chosen if bits)


def _unties(skeleton: Skeleton) -> bool:
    """A transform that changes embedding and head in different ways."""
    return skeleton.transform is not None and "tie_word_embeddings" in skeleton.transform.config_changes


def _source(skeleton: Skeleton, matrix: Matrix) -> TensorRef:
    return skeleton.tensors[skeleton.source_name(f"{matrix.name}.weight")]


def _spec(matrix: Matrix, bits: int) -> GroupedIntSpec:
    out_features, in_features = matrix.module.weight.shape
    group_size = next((size for size in _GROUP_SIZES if in_features % size == 0), in_features)
    return GroupedIntSpec(
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        segments=((bits, in_features // group_size),),
        symmetric=False,
    )


def quantize_outside(matrices: Sequence[OutsideMatrix], skeleton: Skeleton, folder: Path) -> dict[str, dict[str, Any]]:
    """Round each matrix, write all to `FILE` in ``folder``, and return the entries of report and ``config.json``.

    A run that resumes does it again: it takes seconds and gives the same bytes.

    Raises:
        NumericalError: NaN or Inf in a matrix, or a scale that does not fit float16; by name.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for matrix in matrices:
        weight, error = _rounded(matrix, skeleton)
        tensors |= {f"{matrix.prefix}.{key}": tensor for key, tensor in pack(weight).items()}
        tensors[f"{matrix.prefix}.{TRIPWIRE}"] = torch.empty(0, dtype=torch.float16)
        entries[matrix.name] = {"prefix": matrix.prefix, "spec": matrix.spec.to_json(), "relative_error": error}
    if matrices:
        write_tensors(folder / FILE, tensors)
    return entries


def _rounded(matrix: OutsideMatrix, skeleton: Skeleton) -> tuple[GroupedInt, float]:
    """The quantized matrix and its ||W - Q|| / ||W||."""
    spec, (bits, n_groups) = matrix.spec, matrix.spec.segments[0]
    pieces, lost, total = [], 0.0, 0.0
    for rows in _rows(matrix, skeleton):
        try:
            piece = rtn(rows, (bits,) * n_groups, spec.symmetric, GRIDS["minmax"])
        except NumericalError as error:
            raise NumericalError(f"{matrix.name}: {error}") from error
        norm = float(rows.norm())
        lost, total = lost + (norm * relative_error(rows, piece.dequantize(), None)) ** 2, total + norm**2
        pieces.append(piece)
    weight = GroupedInt(
        codes=torch.cat([piece.codes for piece in pieces]),
        scales=torch.cat([piece.scales for piece in pieces]),
        zeros=torch.cat([piece.zeros for piece in pieces]),
        bits=pieces[0].bits,
        symmetric=spec.symmetric,
    )
    return weight, (lost / total) ** 0.5 if total else 0.0


def _rows(matrix: OutsideMatrix, skeleton: Skeleton) -> Iterator[Tensor]:
    """float32 on the CPU, some rows at a time, with the transform of the run."""
    name, transform = f"{matrix.name}.weight", skeleton.transform
    for ref, *others in zip(*(row_pieces(ref, _CHUNK_WEIGHTS) for ref in matrix.replaced), strict=True):
        rows = read_tensor(ref)
        for other in others:
            if not torch.equal(read_tensor(other), rows):
                raise RequestError(f"{other.name}: differs from {ref.name}, which the config ties to it")
        if transform is not None and name in transform.touched:
            rows = transform(name, rows)
        yield rows.float()


def set_embedding(weight: Tensor, matrices: Sequence[OutsideMatrix], folder: Path) -> None:
    """Overwrite the loaded embedding table with the stored one, so that calibration sees what the packed model does."""
    for matrix in matrices:
        if not matrix.is_embedding:
            continue
        refs = read_header(folder / FILE)
        tensors = {key: read_tensor(refs[f"{matrix.prefix}.{key}"]) for key in matrix.spec.tensor_layout()}
        step = max(1, _CHUNK_WEIGHTS // matrix.spec.in_features)
        for ids in torch.split(torch.arange(matrix.spec.out_features), step):
            weight[ids[0] : ids[-1] + 1] = lookup(ids, matrix.spec, tensors, torch.float32).to(weight)
