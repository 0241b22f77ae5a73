"""What attention does with the outputs of the query, key and value projections: second-order statistics per head.

A rounding error dW of a projection changes the attention module's output. To first order the squared change has, for
one head, these Hessians: l and m are positions of query and key, x the inputs, a_l the attention probabilities of query
l, R_l the rotation, q~ = R_l q and k~ = R_m k, J the Jacobian of a query or key norm, W_O the head's columns of the
output projection, B = W_O^T W_O:

    value   sum over l of (a_l X)(a_l X)^T                     (x)   B                                       exact
    query   sum over l of x_l x_l^T  (x)  J_l^T R_l^T Z_l B Z_l^T R_l J_l,       Z_l = covariance of k~ and v under a_l
    key     sum over l, m of x_m x_m^T  (x)  a_lm^2 |v_m - a_l V|_B^2 J_m^T R_m^T q~_l q~_l^T R_m J_m

Each is replaced by the Kronecker product of two averages: X^T X of the inputs (of the value X^T A^T A X) and a row
factor [head_dim, head_dim]. ``metric="outputs"`` averages the factors above, over evenly spaced query positions of
every call. ``metric="logits"`` is the paper's relaxation (arXiv:2406.13474): the errors of all logits, masked or not,
count alike,

    query   mean over l of J^T R_l^T C_K R_l J,   C_K = k~^T k~           key   the same with C_Q = q~^T q~ of its heads

with the mean over positions in closed form. A constant added to all keys changes no softmax: ``center_keys`` removes
the mean key of each sequence, and with it what a key bias adds to C_K. Key and value heads that serve several query
heads get the sum over these. Cross terms between heads, and between keys, are dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from quantkit.calib.heads import CalledSequence, jacobian_transposed, normed
from quantkit.calib.rotary import Rotary
from quantkit.models.attention import Attention

Metric = Literal["outputs", "logits"]
_SCRATCH_BYTES = 1 << 27  # bound of the [queries, seq_len, head_dim] tensors
_TOLERANCE = 0.03  # relative; bfloat16 attention differs from float32 by less than 0.01
_VALUE_QUERIES = 1024  # evenly spaced query positions of every call that count in the value's columns
_KEPT_TOKENS = 8  # of every call, for the Jacobians of query and key norms under metric="logits"


@dataclass(frozen=True, slots=True)
class AttentionStatistics:
    """Factors of the Hessians, float32, up to a positive multiple each."""

    query_rows: Tensor  # [heads, head_dim, head_dim]
    key_rows: Tensor  # [kv_heads, head_dim, head_dim]
    value_rows: Tensor | None  # [kv_heads, head_dim, head_dim], sum of W_O^T W_O; None if it was not asked for
    value_columns: Tensor | None  # [kv_heads, in, in], X^T A^T A X; None if it was not asked for


class HeadFactors(NamedTuple):
    """Rows of one linear that a solver takes together, and the factors of their Hessian."""

    rows: Tensor  # int64 [n], head after head
    columns: Tensor | None  # [heads, in, in]; None: the linear's own [in, in] from `StatisticsRecorder`
    row_factors: Tensor | None  # [heads, head_dim, head_dim]; None: independent rows


def head_factors(attention: Attention, statistics: AttentionStatistics) -> dict[str, list[HeadFactors]]:
    """By path of the linear: one entry, or three if queries, keys and values are fused."""
    found: dict[str, list[HeadFactors]] = {}
    for projection, columns, row_factors in (
        (attention.q, None, statistics.query_rows),
        (attention.k, None, statistics.key_rows),
        (attention.v, statistics.value_columns, statistics.value_rows),
    ):
        found.setdefault(projection.path, []).append(HeadFactors(projection.rows(), columns, row_factors))
    return found


class _Head(NamedTuple):
    """One query head of one sequence."""

    query_head: int
    key_head: int
    probabilities: Tensor  # a [seq_len, seq_len]
    weights: Tensor  # the same times the slope of a soft cap
    q: Tensor  # [seq_len, head_dim], as they are multiplied
    k: Tensor
    v: Tensor  # [seq_len, head_dim], in a basis where |.|_B is the plain norm


class AttentionRecorder:
    """Hooks on one block that gather `AttentionStatistics` while calibration samples run through it.

    Attributes:
        problem: why the statistics cannot be trusted: the block's attention is not what `Attention` describes.
    """

    def __init__(
        self,
        attention: Attention,
        block: nn.Module,
        *,
        metric: Metric = "outputs",
        value_columns: bool = True,
        value_rows: bool = True,
        center_keys: bool = True,
        queries_per_call: int = 32,
        observer: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.problem: str | None = None
        self._attention, self._block = attention, block
        self._metric, self._center_keys = metric, center_keys
        self._value_columns, self._value_rows = value_columns, value_rows
        self._queries_per_call = queries_per_call
        self._observer = observer  # shown the attention probabilities [group, seq_len, seq_len] of every key head
        self._call: dict[str, Any] = {}
        self._n_calls = 0
        self._neighbours = False
        self._rotary: Rotary | None = None
        self._norms = tuple(
            block.get_submodule(path) if path else None for path in (attention.q_norm, attention.k_norm)
        )
        self._sums: dict[str, Tensor] = {}
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._roots: Tensor | None = None  # S [heads, head_dim, head_dim] with S S^T = B

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record everything that runs through the block inside this context."""
        submodule = self._block.get_submodule
        handles = [submodule(self._attention.path).register_forward_pre_hook(self._on_arguments, with_kwargs=True)]
        handles += [submodule(path).register_forward_hook(self._on_linear(path)) for path in self._attention.linears]
        handles.append(submodule(self._attention.output).register_forward_pre_hook(self._on_output))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._call.clear()

    def statistics(self) -> AttentionStatistics | None:
        """None when nothing was recorded, or there is a `problem`."""
        if self.problem or not self._n_calls:
            return None
        query, key = self._sums["query"], self._sums["key"]
        if self._metric == "logits":
            assert self._rotary is not None
            query, key = self._rotary.mean(query), self._rotary.mean(key)
            query, key = (self._pull_back(side, factor) for side, factor in enumerate((query, key)))
        value_rows = _per_group(self._output_grams(), self._attention.kv_heads).sum(1) if self._value_rows else None
        return AttentionStatistics(query, key, value_rows, self._sums.get("value"))

    def _on_arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind_partial(module, *args).arguments
        self._call.update({**bound, **kwargs})

    def _on_linear(self, path: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._call[f"input {path}"], self._call[f"output {path}"] = args[0], output

        return record

    def _on_output(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.problem is None:
            for sequence in range(args[0].shape[0]):
                self._record_sequence(sequence, args[0][sequence].float())
                if self.problem is not None:
                    break
                self._n_calls += 1
        self._call.clear()

    def _record_sequence(self, sequence: int, output: Tensor) -> None:
        attention, part = self._attention, CalledSequence(self._call, sequence)
        inputs = part.inputs(attention.q.path)
        raw = [part.heads(projection) for projection in (attention.q, attention.k, attention.v)]
        q, k = normed(self._norms[0], raw[0]), normed(self._norms[1], raw[1])
        if not self._n_calls:
            self.problem = self._find_rotary(part, q, k, raw[2], output)
        if self.problem is not None:
            return
        self._rotary = part.rotary(attention.head_dim, self._neighbours)
        assert self._rotary is not None
        q, k = self._rotary.rotate(q), self._rotary.rotate(k)
        if self._observer is not None:
            for _, probabilities, _ in self._each_group(part, q, k):
                self._observer(probabilities)
        if self._metric == "logits":
            self._add_logits(q, k)
            self._keep_tokens(raw)
        if self._metric == "outputs" or self._value_columns:
            self._add_outputs(part, q, k, raw, inputs)

    def _find_rotary(self, part: CalledSequence, q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> str | None:
        """Which channels rotate together shows in the output; the problem, if neither order gives the block's own."""
        worst = torch.inf
        for neighbours in (False, True):
            positions = part.rotary(self._attention.head_dim, neighbours)
            if positions is None:
                return "its rotary position embeddings have an unknown form"
            groups = self._each_group(part, positions.rotate(q), positions.rotate(k))
            own = torch.cat([a @ v[g] for g, a, _ in groups])
            own = own.transpose(0, 1).flatten(1)
            if own.shape != output.shape:
                break
            worst = min(worst, float((own - output).norm() / output.norm().clamp_min(1e-30)))
            if worst < _TOLERANCE:
                self._neighbours = neighbours
                return None
        return f"its attention is not softmax(q k^T) v of its projections (they differ by {worst:.0%})"

    def _each_group(self, part: CalledSequence, q: Tensor, k: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Index of each key head; attention probabilities of its query heads [group, seq_len, seq_len], and these times
        the derivative of the logits by what a soft cap receives."""
        attention = self._attention
        mask = part.mask(q.shape[1], q.device)
        for g, heads in enumerate(_per_group(q, attention.kv_heads)):
            logits = heads @ k[g].t() * attention.scaling
            if not attention.softcap:
                probabilities = (logits + mask).softmax(-1)
                yield g, probabilities, probabilities
                continue
            capped = torch.tanh(logits / attention.softcap)
            probabilities = (attention.softcap * capped + mask).softmax(-1)
            yield g, probabilities, probabilities * (1 - capped.square())

    def _add_logits(self, q: Tensor, k: Tensor) -> None:
        keys = k - k.mean(1, keepdim=True) if self._center_keys else k
        group = self._attention.heads // self._attention.kv_heads
        self._add("query", (keys.mT @ keys).repeat_interleave(group, 0))
        self._add("key", _per_group(q.mT @ q, self._attention.kv_heads).sum(1))

    def _add_outputs(self, part: CalledSequence, q: Tensor, k: Tensor, raw: list[Tensor], inputs: Tensor) -> None:
        group = self._attention.heads // self._attention.kv_heads
        if self._roots is None:  # the output projection does not change while it is recorded
            self._roots = _square_roots(self._output_grams())
        for g, probabilities, weights in self._each_group(part, q, k):
            if self._value_columns:
                chosen = _spread(len(inputs), _VALUE_QUERIES, self._n_calls, inputs.device)
                columns = _value_columns(probabilities[:, chosen], inputs)
                self._add_at("value", g, self._attention.kv_heads, columns)
            if self._metric == "logits":
                continue
            for member in range(group):
                head = g * group + member
                v = raw[2][g] @ self._roots[head]
                self._add_head(_Head(head, g, probabilities[member], weights[member], q[head], k[g], v), raw)

    def _add_head(self, head: _Head, raw: list[Tensor]) -> None:
        """The factors of metric="outputs"; raw: queries and keys of all heads before norm and rotation."""
        assert self._rotary is not None
        seq_len, head_dim = head.q.shape
        positions = _spread(seq_len, self._queries_per_call, self._n_calls, head.q.device)
        step = max(1, _SCRATCH_BYTES // (4 * seq_len * head_dim))
        query_rows, key_rows = (torch.zeros(head_dim, head_dim, device=head.q.device) for _ in range(2))
        for start in range(0, len(positions), step):
            chosen = positions[start : start + step]
            weights = head.weights[chosen]  # [n, seq_len]
            v_mean, k_mean = head.probabilities[chosen] @ head.v, weights @ head.k
            Z = (weights.unsqueeze(1) * head.v.t()) @ head.k - v_mean.unsqueeze(2) * k_mean.unsqueeze(1)
            Z = self._rotary.rotate(Z.transpose(0, 1), chosen, back=True)  # [value dim, n, key dim]
            Z = jacobian_transposed(self._norms[0], raw[0][:, chosen], head.query_head, Z).flatten(0, 1)
            query_rows += Z.t() @ Z
            distances = head.v.square().sum(1) - 2 * v_mean @ head.v.t() + v_mean.square().sum(1, keepdim=True)
            key_rows += self._key_rows(head, chosen, weights.square() * distances.clamp_min(0), raw[1])
        self._add_at("query", head.query_head, self._attention.heads, query_rows)
        self._add_at("key", head.key_head, self._attention.kv_heads, key_rows)

    def _key_rows(self, head: _Head, chosen: Tensor, weights: Tensor, raw: Tensor) -> Tensor:
        """sum over queries l and keys m of weights[l, m] J_m^T R_m^T q~_l q~_l^T R_m J_m."""
        assert self._rotary is not None
        q = head.q[chosen]
        if self._norms[1] is None:
            return self._rotary.weighted_sum(q.unsqueeze(2) * q.unsqueeze(1), weights).sum(0)
        u = self._rotary.rotate(q.unsqueeze(1).expand(-1, len(head.k), -1), back=True)  # [n, seq_len, key dim]
        u = jacobian_transposed(self._norms[1], raw, head.key_head, u)
        u = (u * weights.sqrt().unsqueeze(2)).flatten(0, 1)
        return u.t() @ u

    def _keep_tokens(self, raw: list[Tensor]) -> None:
        if any(norm is not None for norm in self._norms):
            chosen = _spread(raw[0].shape[1], _KEPT_TOKENS, self._n_calls, raw[0].device)
            self._kept.append((raw[0][:, chosen], raw[1][:, chosen]))

    def _pull_back(self, side: int, factor: Tensor) -> Tensor:
        """Mean of J^T F J over the kept tokens; F itself without a norm."""
        norm = self._norms[side]
        if norm is None:
            return factor
        tokens = torch.cat([pair[side] for pair in self._kept], 1)  # [heads, n, head_dim]
        pulled = []
        for head, root in enumerate(_square_roots(factor)):
            columns = root.t().unsqueeze(1).expand(-1, tokens.shape[1], -1)  # [head_dim, n, head_dim]
            u = jacobian_transposed(norm, tokens, head, columns).flatten(0, 1)
            pulled.append(u.t() @ u / tokens.shape[1])
        return torch.stack(pulled)

    def _output_grams(self) -> Tensor:
        """B = W_O^T W_O of every query head, [heads, head_dim, head_dim]."""
        weight: Tensor = self._block.get_submodule(self._attention.output).weight  # type: ignore[assignment]
        per_head = weight.detach().float().reshape(len(weight), self._attention.heads, -1).transpose(0, 1)
        return torch.matmul(per_head.mT, per_head)

    def _add(self, name: str, value: Tensor) -> None:
        known = self._sums.get(name)
        self._sums[name] = value if known is None else known.add_(value)

    def _add_at(self, name: str, index: int, n: int, value: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = value.new_zeros(n, *value.shape)
        self._sums[name][index] += value


def _per_group(heads: Tensor, n_groups: int) -> Tensor:
    """[heads, ...] -> [n_groups, heads / n_groups, ...]."""
    return heads.reshape(n_groups, -1, *heads.shape[1:])


def _value_columns(probabilities: Tensor, inputs: Tensor) -> Tensor:
    """sum over the group of X^T A^T A X; [group, n, L], [L, in] -> [in, in], by the cheaper of two orders."""
    (group, n, _), (seq_len, in_features) = probabilities.shape, inputs.shape
    last = in_features * (seq_len + in_features)
    if group * n * last <= seq_len * (group * n * seq_len + last):
        mixed = (probabilities @ inputs).flatten(0, 1)
        return mixed.t() @ mixed
    stacked = probabilities.flatten(0, 1)
    return inputs.t() @ ((stacked.t() @ stacked) @ inputs)


def _spread(n: int, count: int, call: int, device: torch.device) -> Tensor:
    """Up to ``count`` evenly spaced positions below n; another offset in every call."""
    step = max(1, n // count)
    return torch.arange((5 * call) % step, n, step, device=device)[:count]


def _square_roots(matrices: Tensor) -> Tensor:
    """S [.., n, n] with S S^T = M for positive semidefinite M."""
    values, vectors = torch.linalg.eigh(matrices.double())
    roots: Tensor = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    return roots.to(matrices.dtype)
