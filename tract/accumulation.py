"""The exact TrAct gradient of a batch that does not fit in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn as nn

from tract.gathered import Gathering


@contextmanager
def accumulate(model: nn.Module, kind: type[Gathering] = Gathering) -> Iterator[None]:
    """All forward and backward passes inside count as one batch.

    With micro-batches k = 1..K the exact gradient is

        (sum_k G_k) (sum_k X_k^T X_k / sum_k b_k + lambda I)^-1,

    which is not the sum of the gradients of the parts. Inside the context the wrapped layers
    gather plain gradients, apart from their weights' .grad, and second moments; leaving it adds
    the product (over all ranks, unless ``statistics="local"``). Leave it before the optimizer
    step and, with fp16, before ``scaler.unscale_``. Gradients that are there already, of
    the step before or of other uses of a tied weight, stay what they are. A ``zero_grad()`` that
    sets gradients to None (the default) forgets the backward passes before it here too. After an
    error what was gathered is dropped.

    On several ranks the product is averaged over them, as DistributedDataParallel averages the
    other gradients; use ``no_sync()`` for all micro-batches but the last, as without TrAct.
    With ``fully_shard`` nothing is to be done. A penalty on the wrapped weight itself belongs
    after the context.

    Args:
        model: has TrAct or ProxProp layers; the latter get the increment of all parts, see :mod:`tract.proxprop`.
        kind: only layers of this class.

    Raises:
        ValueError: the model has no such layer.
        RuntimeError: contexts are nested, or a weight is computed from others.

    Example:
        >>> import torch, tract
        >>> model = nn.Sequential(tract.TrActLinear(4, 2))
        >>> with accumulate(model):
        ...     for micro_batch in torch.randn(8, 4).split(2):
        ...         model(micro_batch).sum().backward()
    """
    layers = [module for module in model.modules() if isinstance(module, kind)]
    if not layers:
        raise ValueError("expected a model with a TrAct layer, got none; call tract.apply_tract(model) first.")
    begun: list[Gathering] = []
    try:
        for layer in layers:
            layer.begin_accumulation()
            begun.append(layer)
        yield
        for layer in layers:
            layer.end_accumulation()
    finally:
        for layer in begun:
            layer.drop_accumulation()
