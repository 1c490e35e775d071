"""The exact TrAct gradient of a batch that does not fit in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn as nn
from torch import Tensor

from tract.layers import TrActLayer, tract_layers


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """All forward and backward passes inside count as one batch.

    With micro-batches k = 1..K the exact gradient is

        (sum_k G_k) (sum_k X_k^T X_k / sum_k b_k + lambda I)^-1,

    which is not the sum of the gradients of the parts. Inside the context the wrapped
    layers gather plain gradients and second moments; leaving it applies the inverse once
    (over all ranks, unless ``statistics="local"``). Leave it before the optimizer step and,
    with fp16, before ``scaler.unscale_``. Gradients that were there before are added
    unchanged. After an error the layers are as they were before, and so are the gradients of
    their weights.

    With DistributedDataParallel use ``no_sync()`` for all micro-batches but the last, as
    without TrAct. A penalty on the wrapped weight itself belongs after the context.

    Raises:
        ValueError: the model has no TrAct layer.
        RuntimeError: contexts are nested.

    Example:
        >>> import torch, tract
        >>> model = nn.Sequential(tract.TrActLinear(4, 2))
        >>> with accumulate(model):
        ...     for micro_batch in torch.randn(8, 4).split(2):
        ...         model(micro_batch).sum().backward()
    """
    layers = list(tract_layers(model))
    if not layers:
        raise ValueError("expected a model with a TrAct layer, got none; call tract.apply_tract(model) first.")
    begun: list[tuple[TrActLayer, Tensor | None]] = []
    try:
        for layer in layers:
            begun.append((layer, layer.begin_accumulation()))
        yield
        for layer, earlier in begun:
            layer.end_accumulation(earlier)
    except BaseException:
        for layer, earlier in begun:
            layer.drop_accumulation()
            layer.weight.grad = earlier
        raise
