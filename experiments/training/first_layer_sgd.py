"""Two update rules in one optimizer: SGD for the first layer, Adam for everything else."""

from __future__ import annotations

import torch
from torch.optim import SGD, Adam, Optimizer


class FirstLayerSGD(Optimizer):
    """torch.optim.SGD on the groups marked ``first_layer``, torch.optim.Adam on all others.

    The ablation of figure 9 of arXiv 2410.23970. Groups and state are kept here, once, and
    lent to the two rules for each step: a schedule, a gradient scaler (which skips both
    rules or none) and a checkpoint see one optimizer.

    Args:
        groups: parameter groups of a method; at least one marked ``first_layer`` and one not.
        lr: Adam's learning rate.
        betas: Adam's.
        eps: Adam's.
        weight_decay: L2 in the gradient, for both rules.
        first_lr: SGD's learning rate.
        momentum: SGD's.
        nesterov: SGD's.
        fused: whether both rules take torch's fused kernels.

    Raises:
        ValueError: no group is marked, or all are, or a value is out of torch's range.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        first_lr: float,
        momentum: float,
        nesterov: bool,
        fused: bool | None,
    ):
        first = [group for group in groups if _is_first(group)]
        others = [group for group in groups if not _is_first(group)]
        if not first or not others:
            raise ValueError(
                f"expected a method that marks the first layer's parameters, got {len(first)} marked and "
                f"{len(others)} other groups; use method=tract, or another optim."
            )
        both = {"weight_decay": weight_decay, "fused": fused}
        # Each rule writes its options into its groups, which are the same dictionaries as ours.
        self._rules = [
            (False, Adam(others, lr=lr, betas=betas, eps=eps, **both)),
            (True, SGD(first, lr=first_lr, momentum=momentum, nesterov=nesterov, **both)),
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both rules; ``closure`` is not supported and must be None.

        Raises:
            ValueError: a closure is given.
        """
        if closure is not None:
            raise ValueError("expected no closure, got one; the two rules would call it twice.")
        for is_first, rule in self._rules:
            rule.param_groups = [group for group in self.param_groups if _is_first(group) == is_first]
            rule.state = self.state
            rule.step()


def _is_first(group: dict) -> bool:
    return group.get("first_layer", False)
