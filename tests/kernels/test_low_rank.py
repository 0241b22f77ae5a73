"""Products with `low_rank` weights: two operators of `grouped_int`, which torch.compile keeps as they are."""

from __future__ import annotations

import pytest
import torch
from packed_weights import activations, random_weight

from quantkit.errors import RequestError
from quantkit.formats import storage
from quantkit.formats.low_rank import LowRank
from quantkit.kernels.storage import kernel_of

WEIGHT = LowRank(down=random_weight(0, 32, 16, (4, 4, 2)), up=random_weight(1, 40, 16, (3, 3)))


@pytest.mark.parametrize("planar", [False, True])
def test_one_graph_of_two_operators(planar):
    spec, tensors = WEIGHT.spec(), storage.pack(WEIGHT)
    if planar:
        tensors = kernel_of(spec).to_planar(spec, tensors)
    matmul, bias = kernel_of(spec).matmul, torch.linspace(-1, 1, 40)
    seen = []

    def keep(graph, inputs):
        seen.append([str(node.target) for node in graph.graph.nodes if "quantkit" in str(node.target)])
        return graph

    compiled = torch.compile(lambda x: matmul(x * 2, spec, tensors, bias), fullgraph=True, backend=keep)
    x = activations(0, 3, 48)
    assert torch.equal(compiled(x), matmul(x * 2, spec, tensors, bias))
    (operators,) = seen
    assert len(operators) == 2
    compiled = torch.compile(lambda x: matmul(x * 2, spec, tensors, bias), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), matmul(x * 2, spec, tensors, bias))
    expected = x.double() * 2 @ WEIGHT.dequantize().double().t() + bias.double()
    torch.testing.assert_close(compiled(x).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_wrong_inputs_are_named():
    spec, tensors = WEIGHT.spec(), storage.pack(WEIGHT)
    with pytest.raises(RequestError, match="x has 47 columns, the weight has 48"):
        kernel_of(spec).matmul(torch.zeros(1, 47), spec, tensors)
