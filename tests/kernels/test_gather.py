"""Gathering numbers: the twin, by definition; the kernel is compared with it in the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch

from quantkit.kernels.gather import gather


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_definition(dtype):
    values, more = torch.arange(6.0).view(2, 3).to(dtype), torch.full((2, 3), 10.0).to(dtype)
    index = torch.tensor([[5, -1, 0, 0]], dtype=torch.int32)
    assert gather(values, index).tolist() == [[5, 0, 0, 0]]
    scales, bias = torch.tensor([[2.0, 3.0, 4.0, 0.0]]), torch.tensor([[0.0, 7.0, 0.5, 0.0]])
    found = gather(values, index, scales=scales, more=more, bias=bias)
    assert found.tolist() == [[30, 7, 40.5, 0]]
    assert found.dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype):
    generator = torch.Generator().manual_seed(0)
    values, more = (torch.randn(3, 700, generator=generator).to(dtype) for _ in range(2))
    index = torch.randint(-1, 2100, (2, 1111), generator=generator, dtype=torch.int32)
    scales, bias = (torch.randn(2, 1111, generator=generator) for _ in range(2))
    for options in (
        {},
        {"scales": scales},
        {"more": more, "bias": bias},
        {"scales": scales, "more": more, "bias": bias},
    ):
        there = {name: tensor.cuda() for name, tensor in options.items()}
        found = gather(values.cuda(), index.cuda(), **there).cpu()
        torch.testing.assert_close(found, gather(values, index, **options), rtol=1e-6, atol=1e-6)
