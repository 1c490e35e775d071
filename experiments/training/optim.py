"""Optimizers, with their groups and state stored by parameter name.

A method may replace, add and remove parameters while it trains; a name stays true where a
position does not. Groups are stored too, since a parameter that was added belongs to the one
that the method chose.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from hydra.utils import get_object

from experiments.config import options_of
from tract.methods.base import Method

_WITHOUT_DECAY = ("pos_embed", "cls_token")


def build_optimizer(
    node: dict[str, Any], method: Method, model: nn.Module, decay_matrices_only: bool = False, bias_lr: float = 1.0
) -> torch.optim.Optimizer:
    """The configured optimizer over the method's parameter groups.

    Args:
        node: the optimizer's configuration.
        method: gives the groups.
        model: the network.
        decay_matrices_only: no weight decay for tensors with one dimension, position embeddings and class tokens.
        bias_lr: the learning rate of biases, as a multiple of their group's.
    """
    options = options_of(node)
    groups = [group | {"params": list(group["params"])} for group in method.param_groups(model)]
    own_name = {parameter: name.rpartition(".")[2] for name, parameter in model.named_parameters()}
    if decay_matrices_only:
        undecayed = {p for p, name in own_name.items() if p.ndim <= 1 or name in _WITHOUT_DECAY}
        groups = [part for group in groups for part in _split(group, undecayed, weight_decay=0.0)]
    if bias_lr != 1:
        biases = {p for p, name in own_name.items() if name == "bias"}
        groups = [
            part for group in groups for part in _split(group, biases, lr=bias_lr * group.get("lr", options["lr"]))
        ]
    optimizer = get_object(node["_target_"])(groups, **options)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def _split(group: dict[str, Any], apart: set[nn.Parameter], **changes: float) -> list[dict[str, Any]]:
    """The group without these parameters, and with the changes a group of them; neither is empty."""
    others = group | {"params": [p for p in group["params"] if p not in apart]}
    chosen = group | {"params": [p for p in group["params"] if p in apart]} | changes
    return [part for part in (others, chosen) if part["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's base learning rate times the schedule's factor."""
    for group in optimizer.param_groups:
        rate = group["base_lr"] * factor
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def make_replayable(optimizer: torch.optim.Optimizer) -> None:
    """Let a recorded step be replayed: the optimizer reads rates and counts from tensors beside its parameters.

    Raises:
        ValueError: it cannot.
    """
    for group in optimizer.param_groups:
        if "fused" not in group:
            raise ValueError(f"{type(optimizer).__name__} reads its learning rate on the CPU in every step")
        group |= {"fused": True} | ({"capturable": True} if "capturable" in group else {})
        group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """{"state": {parameter name: its entries}, "groups": the groups, with names in place of parameters}."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {name: dict(optimizer.state[p]) for p, name in names.items() if optimizer.state.get(p)}
    groups = [
        group | {"params": [names[p] for p in group["params"]], "lr": float(group["lr"])}
        for group in optimizer.param_groups
    ]
    return {"state": state, "groups": groups}


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All tensors that an optimizer keeps between steps."""
    return [value for entries in optimizer.state.values() for value in entries.values() if torch.is_tensor(value)]


def load_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Any]) -> None:
    """Put a state from :func:`state_by_name` into an optimizer of the same parameters, however it groups them."""
    named = dict(model.named_parameters())
    groups = state["groups"]
    optimizer.param_groups[:] = [group | {"params": [named[name] for name in group["params"]]} for group in groups]
    positions = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
    optimizer.load_state_dict(
        {
            "state": {positions[name]: entries for name, entries in state["state"].items()},
            "param_groups": [group | {"params": [positions[name] for name in group["params"]]} for group in groups],
        }
    )
