"""Optimizers, with their groups and state stored by parameter name.

A method may replace, add and remove parameters while it trains; a name stays true where a
position does not. Groups are stored too, since a parameter that was added belongs to the one
that the method chose.
"""

from __future__ import annotations

import inspect
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
    """The configured optimizer over the method's parameter groups, as few of them as there are different ones.

    Without ``fused`` torch's fused kernels are taken on a GPU, where the optimizer has them, and never on the CPU.

    Args:
        node: the optimizer's configuration.
        method: gives the groups.
        model: the network.
        decay_matrices_only: no weight decay for tensors with one dimension, position embeddings and class tokens.
        bias_lr: the learning rate of biases, as a multiple of their group's.
    """
    kind, options = get_object(node["_target_"]), options_of(node)
    known = inspect.signature(kind).parameters
    if "fused" in known:
        fused = options.get("fused")
        fused = all(parameter.is_cuda for parameter in model.parameters()) if fused is None else fused
        options["fused"] = fused or None  # False would take torch's kernels for many tensors away as well
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
    if "foreach" in known:
        groups = _joined(groups, model)
    optimizer = kind(groups, **options)
    if options.get("fused"):
        optimizer.register_step_pre_hook(_fill_momenta)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def _fill_momenta(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Momenta of zeros where there are none yet: torch's fused SGD takes all or none, and zeros are the same as none.

    A parameter has none in its first step, which for one that a method adds is not the others' first.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _split(group: dict[str, Any], apart: set[nn.Parameter], **changes: float) -> list[dict[str, Any]]:
    """The group without these parameters, and with the changes a group of them; neither is empty."""
    others = group | {"params": [p for p in group["params"] if p not in apart]}
    chosen = group | {"params": [p for p in group["params"] if p in apart]} | changes
    return [part for part in (others, chosen) if part["params"]]


def _joined(groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """One group of those that differ in nothing that torch's optimizers read, its parameters in the model's order.

    Each group costs them their launches anew. Other optimizers may read ``first_layer``, or sum over groups.
    """
    place = {parameter: number for number, parameter in enumerate(model.parameters())}
    joined: list[dict[str, Any]] = []
    for group in groups:
        group = {key: value for key, value in group.items() if key != "first_layer"}
        alike = next((other for other in joined if group | {"params": other["params"]} == other), None)
        if alike is None:
            joined.append(group)
        else:
            alike["params"] = sorted([*alike["params"], *group["params"]], key=place.__getitem__)
    return joined


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
    if isinstance(optimizer, torch.optim.Adam | torch.optim.SGD):
        optimizer._step_supports_amp_scaling = True  # as one has it that was made with fused=True


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
    """Put a state from :func:`state_by_name` into an optimizer of the same parameters, however it groups them.

    Which kernels make the step (``fused``) is the optimizer's own, not the state's.
    """
    named = dict(model.named_parameters())
    own = {key: value for key, value in optimizer.param_groups[0].items() if key == "fused"}
    groups = [group | own for group in state["groups"]]
    optimizer.param_groups[:] = [group | {"params": [named[name] for name in group["params"]]} for group in groups]
    positions = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
    optimizer.load_state_dict(
        {
            "state": {positions[name]: entries for name, entries in state["state"].items()},
            "param_groups": [group | {"params": [positions[name] for name in group["params"]]} for group in groups],
        }
    )
