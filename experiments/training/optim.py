"""Optimizers, with their state stored by parameter name.

A method may replace or reshape parameters while it trains; a name stays true where a
position does not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from hydra.utils import get_object

from experiments.config import options_of
from tract.methods.base import Method


def build_optimizer(node: dict[str, Any], method: Method, model: nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer over the method's parameter groups."""
    groups = method.param_groups(model)
    optimizer = get_object(node["_target_"])(groups, **options_of(node))
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's base learning rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict]:
    """The optimizer's state per parameter, {parameter name: its entries}."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def load_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, dict]) -> None:
    """Put a state from :func:`state_by_name` into an optimizer of the same parameters."""
    positions = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    named = dict(model.named_parameters())
    by_position = {positions[named[name]]: entries for name, entries in state.items()}
    optimizer.load_state_dict({"state": by_position, "param_groups": optimizer.state_dict()["param_groups"]})
