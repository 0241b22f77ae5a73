"""The matrices around the blocks that can be quantized: the input embedding and the output head, tied or not."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from quantkit.errors import RequestError


class Matrix(NamedTuple):
    """One of the two by its runtime name."""

    name: str
    module: nn.Embedding | nn.Linear


class Ends(NamedTuple):
    """What a model starts and ends with; ``tied``: both compute from one weight."""

    embedding: Matrix
    head: Matrix
    tied: bool


def find_ends(model: Any) -> Ends:
    """The input embedding and the output head of a language model.

    Raises:
        RequestError: the model has none, or one that does more than look up rows or multiply.
    """
    kind = type(model).__name__
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise RequestError(f"{kind}: no embedding and linear head to quantize; leave embedding_bits and head_bits at 0")
    embedding_scale(embedding)
    tied = head.weight is embedding.weight
    return Ends(Matrix(names[embedding], embedding), Matrix(names[head], head), tied)


def embedding_scale(embedding: nn.Embedding) -> float | None:
    """The factor that some families put on every looked-up row; None for a plain embedding.

    Raises:
        RequestError: an embedding of a class that may do something else.
    """
    if type(embedding) is nn.Embedding:
        return None
    scale = getattr(embedding, "scalar_embed_scale", None)
    if not isinstance(scale, float | int):
        raise RequestError(f"{type(embedding).__name__} is more than a table; leave embedding_bits at 0")
    return float(scale)
