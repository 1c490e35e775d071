"""Optimizers, with their state stored by parameter name.

A method may replace or reshape parameters while it trains; a name stays true where a
position does not. What an optimizer keeps per parameter group (timm's LAMB: the step) is
stored with each parameter of the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from hydra.utils import get_object

from experiments.config import options_of
from tract.methods.base import Method

_WITHOUT_DECAY = ("pos_embed", "cls_token")
_OF_GROUP = "group/"  # marks entries that belong to a parameter's group


def build_optimizer(
    node: dict[str, Any], method: Method, model: nn.Module, decay_matrices_only: bool = False
) -> torch.optim.Optimizer:
    """The configured optimizer over the method's parameter groups.

    Args:
        node: the optimizer's configuration.
        method: gives the groups.
        model: the network.
        decay_matrices_only: no weight decay for tensors with one dimension, position embeddings and class tokens.
    """
    groups = method.param_groups(model)
    if decay_matrices_only:
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = [part for group in groups for part in _split_by_decay(group, names)]
    optimizer = get_object(node["_target_"])(groups, **options_of(node))
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    optimizer.options = frozenset(key for group in optimizer.param_groups for key in group)
    return optimizer


def _split_by_decay(group: dict[str, Any], names: dict[nn.Parameter, str]) -> list[dict[str, Any]]:
    def is_decayed(parameter: nn.Parameter) -> bool:
        return parameter.ndim > 1 and names[parameter].rpartition(".")[2] not in _WITHOUT_DECAY

    decayed = [p for p in group["params"] if is_decayed(p)]
    others = [p for p in group["params"] if not is_decayed(p)]
    parts = [group | {"params": decayed}, group | {"params": others, "weight_decay": 0.0}]
    return [part for part in parts if part["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's base learning rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict]:
    """The optimizer's state per parameter, {parameter name: its entries and its group's}."""
    names, state = {parameter: name for name, parameter in model.named_parameters()}, {}
    for group in optimizer.param_groups:
        shared = {f"{_OF_GROUP}{key}": value for key, value in group.items() if key not in optimizer.options}
        for parameter in group["params"]:
            entries = dict(optimizer.state[parameter]) if parameter in optimizer.state else {}
            if entries | shared:
                state[names[parameter]] = entries | shared
    return {name: state[name] for name in names.values() if name in state}


def load_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, dict]) -> None:
    """Put a state from :func:`state_by_name` into an optimizer of the same parameters."""
    named = dict(model.named_parameters())
    positions = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    by_position = {positions[named[name]]: _without_mark(entries, False) for name, entries in state.items()}
    groups = optimizer.state_dict()["param_groups"]
    shared = {positions[named[name]]: _without_mark(entries, True) for name, entries in state.items()}
    groups = [group | (shared.get(group["params"][0]) or {}) for group in groups]
    optimizer.load_state_dict({"state": {k: v for k, v in by_position.items() if v}, "param_groups": groups})


def _without_mark(entries: dict[str, Any], marked: bool) -> dict[str, Any]:
    """The entries of the group (marked) or of the parameter itself."""
    chosen = {key: value for key, value in entries.items() if key.startswith(_OF_GROUP) == marked}
    return {key.removeprefix(_OF_GROUP): value for key, value in chosen.items()}
