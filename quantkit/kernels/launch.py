"""Launch options that depend on the device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def early_launch(device: torch.device) -> dict[str, bool]:
    """Programmatic dependent launch, where the device has it (sm_90 and later).

    A kernel is then scheduled while the one before it still runs, and waits inside before it reads what others wrote;
    it lets the next one be scheduled at once. Every such kernel waits, so what a kernel sees is finished, however far
    back it was written; a kernel that is launched in the ordinary way waits anyway.
    """
    able = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": able, "launch_pdl": able}


@cache
def counts_bits(device: torch.device) -> bool:
    """Whether the tensor cores count common bits: from sm_80 to sm_90; later ones do it in software."""
    return device.type == "cuda" and (8, 0) <= torch.cuda.get_device_capability(device) < (10, 0)


@cache
def multiplies_bytes(device: torch.device) -> bool:
    """Whether the tensor cores multiply 16 by 32 bytes with 32 by 8: from sm_80 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def multiplies_asynchronously(device: torch.device) -> bool:
    """Whether four warps can hand products to the tensor cores and go on: sm_90; later ones have other instructions."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def aligned(x: Tensor) -> Tensor:
    """x itself, or a copy where it is not contiguous or begins between multiples of 16 bytes, which kernels load."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
