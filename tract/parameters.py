"""Make an optimizer follow the parameters of a model that changes while it trains.

A method changes the model itself (assigns a parameter, deletes one, replaces a module) and
tells the optimizer here. Groups keep their options; state moves only where it is told how.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

Move = Callable[[str, Tensor], Tensor]


def replace_in(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, move: Move | None = None) -> None:
    """The new parameter takes the old one's place in its group.

    Args:
        optimizer: holds ``old``.
        old: the parameter that goes.
        new: the parameter that comes, of any shape.
        move: what becomes of a tensor of ``old``'s shape in its state, given the optimizer's name
            for it ("momentum_buffer", "exp_avg", "exp_avg_sq", ...) and itself; what has another
            shape (a count of steps) is kept. Without it, ``new`` starts with no state.

    Raises:
        ValueError: the optimizer does not hold ``old``.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> old, layer.weight = layer.weight, nn.Parameter(layer.weight[:, :3].detach().clone())
        >>> replace_in(optimizer, old, layer.weight, lambda name, moment: moment[:, :3].clone())
    """
    group, position = _place(optimizer, old)
    group["params"][position] = new
    state = optimizer.state.pop(old, {})
    if state and move is not None:
        optimizer.state[new] = {
            name: move(name, value) if isinstance(value, Tensor) and value.shape == old.shape else value
            for name, value in state.items()
        }


def add_to(optimizer: Optimizer, new: nn.Parameter, beside: nn.Parameter) -> None:
    """A parameter joins the group of another, with its learning rate, weight decay and marks.

    Raises:
        ValueError: the optimizer does not hold ``beside``.
    """
    _place(optimizer, beside)[0]["params"].append(new)


def remove_from(optimizer: Optimizer, old: nn.Parameter) -> None:
    """A parameter leaves the optimizer, and its state with it.

    Raises:
        ValueError: the optimizer does not hold ``old``.
    """
    group, position = _place(optimizer, old)
    del group["params"][position]
    optimizer.state.pop(old, None)


def is_held(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether the optimizer holds this parameter; it need not hold frozen ones."""
    return any(held is parameter for group in optimizer.param_groups for held in group["params"])


def _place(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[dict, int]:
    for group in optimizer.param_groups:
        for position, held in enumerate(group["params"]):
            if held is parameter:
                return group, position
    raise ValueError(f"expected a parameter that the optimizer holds, got another, of shape {tuple(parameter.shape)}.")


def require_held(optimizer: Optimizer, model: nn.Module) -> None:
    """The optimizer holds every trainable parameter of the model once, and nothing that is not the model's.

    Raises:
        ValueError: it does not; the message names the parameters.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = Counter(parameter for group in optimizer.param_groups for parameter in group["params"])
    faults = {
        "without": [name for parameter, name in names.items() if parameter.requires_grad and parameter not in held],
        "twice": [names.get(parameter, "a foreign one") for parameter, count in held.items() if count > 1],
        "not the model's, of shape": [str(tuple(parameter.shape)) for parameter in held if parameter not in names],
        "state of another, of shape": [str(tuple(p.shape)) for p in optimizer.state if p not in held],
    }
    got = "; ".join(f"{kind} {', '.join(found)}" for kind, found in faults.items() if found)
    if got:
        raise ValueError(
            f"expected the optimizer to hold each of the model's parameters once and no other, got: {got}; "
            "a method tells it of changes by replace_in, add_to and remove_from of tract.parameters."
        )
