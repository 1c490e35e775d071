"""From the host's memory to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, without a wait of the host."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from other memory, copying is a wait
    return tensor.to(device, non_blocking=True)
