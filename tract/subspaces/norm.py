"""Batch-norm statistics of a point: running statistics of training mix many points, so they are estimated anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


def reestimated(
    model: nn.Module, batches: Iterable[Tensor], share: Callable[[Tensor], Tensor] | None = None
) -> nn.Module:
    """The same model with new batch-norm statistics, changed in place; give it a copy, such as ``plain_at`` makes.

    The new statistics are the mean over the batches of their means and of their unbiased variances; a smaller
    batch counts as a whole one. They are added up in float64. The batch counter becomes the number of batches.
    Batch norms compute from their batch, as in training; everything else is in evaluation (no dropout). There
    is no autograd, and momentum and modes are put back. A batch norm that no batch reaches keeps its statistics.

    Args:
        model: any module; without a batch norm that has running statistics it comes back at once.
        batches: inputs of the model.
        share: adds a float64 tensor over all ranks, each of which gives whole batches of its own.

    Returns:
        The model.

    Raises:
        ValueError: no batch, on any rank.
    """
    plain = getattr(model, "_orig_mod", model)  # a compiled model would not see the hooks
    norms = [m for m in plain.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return model
    before = [(norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()) for norm in norms]
    modes = [(module, module.training) for module in plain.modules()]
    momenta = [norm.momentum for norm in norms]
    size = max(norm.num_features for norm in norms)
    sums = norms[0].running_mean.new_zeros((len(norms) + 1, 2 * size + 1), dtype=torch.float64)  # last row: batches

    def take(index: int) -> Callable[..., None]:
        def hook(norm: nn.Module, *_: object) -> None:
            # Momentum 1 has made the running statistics those of this batch.
            count = norm.num_features
            sums[index, :count] += norm.running_mean
            sums[index, size : size + count] += norm.running_var
            sums[index, -1] += 1

        return hook

    hooks = [norm.register_forward_hook(take(index)) for index, norm in enumerate(norms)]
    try:
        for module, _ in modes:
            module.training = False
        for norm in norms:
            norm.training, norm.momentum = True, 1.0
            norm.reset_running_stats()
        with torch.no_grad():
            for batch in batches:
                plain(batch)
                sums[-1, -1] += 1
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
        for norm, momentum, state in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            _set(norm, *state)
    total = sums if share is None else share(sums)
    if not total[-1, -1]:
        raise ValueError("expected a batch or more to estimate batch-norm statistics from, got none.")
    for norm, row, count in zip(norms, total[:-1], total[:-1, -1].tolist(), strict=True):
        if count:
            mean = row / count
            _set(norm, mean[: norm.num_features], mean[size : size + norm.num_features], torch.tensor(int(count)))
    return model


@torch.no_grad()
def _set(norm: nn.Module, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.num_batches_tracked.copy_(count)
