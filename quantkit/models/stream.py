"""What reads and what writes the residual stream: found by running a miniature, not by names, and tried on it.

A *reader* is a weight whose inputs are the outputs of a norm over the hidden size. A *writer* is any other linear
whose outputs have the hidden size; the embedding writes too. Whether that is all there is to the model is not assumed:
`find_stream` rotates the stream of the miniature and compares the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from quantkit.errors import RequestError
from quantkit.models.attention import Attention, Projection, find_attention
from quantkit.models.miniature import LowRank, Miniature
from quantkit.models.skeleton import Skeleton

Kind = tuple[int | None, str]  # see `Miniature.kind`
_TOLERANCE = 1e-3  # of logits in float32, relative; whatever is missed or wrong changes them by far more


@dataclass(frozen=True, slots=True)
class Stream:
    """Runtime names of the parameters that meet the residual stream.

    Attributes:
        readers: weight ``[out, hidden]`` to the weight of the norm whose outputs it reads.
        writers: weights ``[hidden, in]`` and biases ``[hidden]`` of what is added to the stream.
        embeddings: weights ``[rows, hidden]`` whose rows the stream begins with.
        norms: weight ``[hidden]`` of a norm that readers follow, to o, where its gain is o + weight (Gemma: 1, else 0).
        values: weights and biases some of whose rows compute values, to where those are; empty unless they are rotated.
        mixed: weights ``[hidden, heads * head_dim]`` that read what attention mixes of values, to head_dim; likewise.
    """

    readers: dict[str, str]
    writers: frozenset[str]
    embeddings: frozenset[str]
    norms: dict[str, float]
    values: dict[str, Projection] = field(default_factory=dict)
    mixed: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        named = (self.readers, self.writers, self.embeddings, self.norms, self.values, self.mixed)
        return frozenset(name for group in named for name in group)


def find_stream(
    skeleton: Skeleton, rotate: Callable[[Tensor], Tensor], rotate_heads: Callable[[Tensor, int], Tensor] | None = None
) -> Stream:
    """The stream of a model, none of whose weights is read.

    Args:
        rotate: an orthogonal map of the last axis, ``[..., hidden]``; applied to the miniature.
        rotate_heads: (x, head_dim), one that acts alike on each head of the last axis, ``[..., heads * head_dim]``;
            with it values are rotated too.

    Raises:
        RequestError: the model does not compute the same on a rotated stream; says why.
    """
    kind = type(skeleton.model).__name__
    config = skeleton.config.get_text_config(decoder=True)
    if config is not skeleton.config:
        raise RequestError(f"{kind}: only models of text alone are rotated so far; use transform=none")
    with _explained(kind):
        miniature = Miniature(skeleton)
        found = _Search(miniature, config.hidden_size)
        stream = found.stream()
    if rotate_heads is not None:
        stream = _with_values(miniature, stream)
    with _explained(kind):
        before = miniature.run()
        fold_miniature(miniature, stream, rotate)
        if rotate_heads is not None:
            fold_values(miniature, stream, rotate_heads)
        difference = float((miniature.run() - before).norm() / before.norm())
    if not difference < _TOLERANCE:
        reason = found.obstacle() or f"on random weights the outputs change by {difference:.2g} of their size"
        raise RequestError(f"{kind}: its residual stream cannot be rotated: {reason}; use transform=none")
    return _for_all_blocks(miniature, stream)


@contextmanager
def _explained(kind: str) -> Iterator[None]:
    """Errors become one line about the model class; a model's own code may raise anything."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{kind}: its residual stream cannot be rotated: {error}; use transform=none") from error
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(
            f"{kind}: cannot tell whether its residual stream can be rotated ({reason}); use transform=none"
        ) from error


def fold_miniature(miniature: Miniature, stream: Stream, rotate: Callable[[Tensor], Tensor]) -> None:
    """Rotate the residual stream of a miniature; ``stream`` with its names."""
    model = miniature.model
    for name, norm in stream.readers.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        gain = stream.norms[norm] + model.get_parameter(norm).data
        if isinstance(module, LowRank):
            module.right = rotate(module.right * gain)
        else:
            module.weight.data = rotate(module.weight.data * gain)
    for name in stream.writers:
        parent, _, key = name.rpartition(".")
        module = model.get_submodule(parent)
        if key == "weight":
            module.left = rotate(module.left.T).T
        else:
            module.bias.data = rotate(module.bias.data)
    for name in stream.embeddings:
        parameter = model.get_parameter(name)
        parameter.data = rotate(parameter.data)
    for name, offset in stream.norms.items():
        model.get_parameter(name).data.fill_(1 - offset)


def fold_values(miniature: Miniature, stream: Stream, rotate_heads: Callable[[Tensor, int], Tensor]) -> None:
    """Rotate the values of a miniature's attention head by head; ``stream`` with its names."""
    for name, values in stream.values.items():
        parent, _, key = name.rpartition(".")
        module = miniature.model.get_submodule(parent)
        target = module.left if key == "weight" else module.bias.data
        rows = target[values.rows()]
        turned = rotate_heads(rows.mT if rows.ndim == 2 else rows, values.head_dim)
        target[values.rows()] = turned.mT if rows.ndim == 2 else turned
    for name, head_dim in stream.mixed.items():
        module = miniature.model.get_submodule(name.removesuffix(".weight"))
        module.right = rotate_heads(module.right, head_dim)


def _with_values(miniature: Miniature, stream: Stream) -> Stream:
    """Raises `RequestError` where a block's attention has no values that can be told apart."""
    values: dict[str, Projection] = {}
    mixed: dict[str, int] = {}
    for index, block in enumerate(miniature.model.get_submodule(miniature.block_list)):
        name = f"{miniature.block_list}.{index}"
        attention = find_attention(block)
        if not isinstance(attention, Attention):
            where = f"{miniature.block_list}.{miniature.kinds[index][0]}"
            kind = type(miniature.model).__name__
            raise RequestError(f"{kind}: {where} has no values to rotate ({attention.reason}); use rotate_values=false")
        own = block.get_submodule(attention.v.path).named_parameters(recurse=False)
        values |= {f"{name}.{attention.v.path}.{key}": attention.v for key, _ in own}
        mixed[f"{name}.{attention.output}.weight"] = attention.v.head_dim
    return replace(stream, values=values, mixed=mixed)


class _Search:
    """One run of the miniature, and what can be read off it."""

    def __init__(self, miniature: Miniature, hidden: int) -> None:
        self.miniature, self.hidden = miniature, hidden
        self.modules = dict(miniature.model.named_modules())
        with miniature.watching(lambda module: self._is_norm(module) or _is_matrix(module)) as seen:
            miniature.run()
        self.seen = seen
        self.norms = [name for name in seen if self._is_norm(self.modules[name])]
        self.offsets = {name: self._offset(self.modules[name]) for name in self.norms}
        self.read: dict[Kind, str] = {}  # kind of a module that reads a norm's outputs, to the norm
        self.written: set[Kind] = set()  # kinds of the modules that write
        for name in seen:
            norm = next((norm for norm in self.norms if name != norm and self._follows(name, norm)), None)
            if norm is not None and _is_matrix(self.modules[name]) and self.offsets[norm] is not None:
                self.read[miniature.kind(name)] = norm
            elif isinstance(self.modules[name], LowRank) and seen[name][1].shape[-1] == hidden:
                self.written.add(miniature.kind(name))

    def stream(self) -> Stream:
        """With the miniature's names.

        Raises:
            RequestError: a matrix of the hidden size that no token reached.
        """
        readers, writers, embeddings = {}, set(), set()
        reached = {self.miniature.kind(name) for name in self.seen}
        for name, module in self.modules.items():
            kind = self.miniature.kind(name)
            if isinstance(module, nn.Embedding) and module.embedding_dim == self.hidden:
                embeddings.add(f"{name}.weight")
            elif kind in self.read:
                readers[f"{name}.weight"] = f"{self.read[kind]}.weight"
            elif kind in self.written:
                writers |= {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
            elif _is_matrix(module) and kind not in reached and self.hidden in _shape(module):
                raise RequestError(f"its {self.miniature.names(name)[0]} takes no part when only text is read")
        norms = {f"{norm}.weight": offset for norm in self.read.values() if (offset := self.offsets[norm]) is not None}
        return Stream(readers, frozenset(writers), frozenset(embeddings), norms)

    def obstacle(self) -> str | None:
        """Why a rotation changes what the model computes, where that can be seen."""
        for norm in self.norms:
            where = self.miniature.names(norm)[0]
            if self.offsets[norm] is None:
                kind = type(self.modules[norm]).__name__
                return f"its {where} ({kind}) does more than divide by the root mean square"
            if norm not in self.read.values() and any(
                self._follows(norm, name) for name in self.seen if self.miniature.kind(name) in self.written
            ):
                return f"its {where} scales single features of what is added to the stream"
        return None

    def _follows(self, name: str, before: str) -> bool:
        """Whether every row that enters ``name`` left ``before``: views, reshapes and copies of single rows count."""
        entering, leaving = self.seen[name][0], self.seen[before][1]
        if entering.shape[-1] != leaving.shape[-1]:
            return False
        return bool((entering.unsqueeze(1) == leaving).all(-1).any(1).all())

    def _is_norm(self, module: nn.Module) -> bool:
        own = dict(module.named_parameters(recurse=False))
        sized = all(tuple(parameter.shape) == (self.hidden,) for parameter in own.values())
        return "weight" in own and sized and set(own) <= {"weight", "bias"}

    def _offset(self, norm: nn.Module) -> float | None:
        """o, if the norm computes x / rms(x) * (o + weight); None if it computes something else."""
        x = 1 + torch.randn(4, self.hidden, generator=torch.Generator().manual_seed(1))
        plain = x * x.square().mean(-1, keepdim=True).rsqrt()
        out = norm(x)
        for offset in (0.0, 1.0):
            if torch.allclose(out, plain * (offset + norm.get_parameter("weight")), rtol=1e-3, atol=1e-4):
                return offset
        return None


def _is_matrix(module: nn.Module) -> bool:
    """A linear, or a module that multiplies by its one matrix itself, as routers do."""
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and own["weight"].ndim == 2 and not isinstance(module, nn.Embedding)


def _shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.get_parameter("weight").shape)


def _for_all_blocks(miniature: Miniature, stream: Stream) -> Stream:
    """The stream with the skeleton's names: each block has that of the block that stands for it."""
    pairs = [zip(*map(miniature.names, pair), strict=True) for pair in stream.readers.items()]
    return Stream(
        readers={reader: norm for pair in pairs for reader, norm in pair},
        writers=frozenset(name for each in stream.writers for name in miniature.names(each)),
        embeddings=frozenset(name for each in stream.embeddings for name in miniature.names(each)),
        norms={name: offset for each, offset in stream.norms.items() for name in miniature.names(each)},
        values={name: values for each, values in stream.values.items() for name in miniature.names(each)},
        mixed={name: head_dim for each, head_dim in stream.mixed.items() for name in miniature.names(each)},
    )
