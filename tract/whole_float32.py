"""Float32 products in float32, whatever precision is set for the network's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def whole_float32() -> Iterator[None]:
    """Inside, torch multiplies float32 matrices in float32: not as tf32 or bfloat16, which X^T X cannot bear.

    The user's setting (``torch.set_float32_matmul_precision``, ``torch.backends...fp32_precision``, ``allow_tf32``) is
    there again afterwards. It is one for all threads: what another thread multiplies meanwhile is exact too. Nothing
    waits for a device, and a graph that is captured inside keeps what it has captured.
    """
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = "none"  # that is, as set for all operations, which may be what there was
            if setting.fp32_precision != precision:
                setting.fp32_precision = precision
