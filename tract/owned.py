"""What tells a method that a layer is another method's."""

from __future__ import annotations

import torch.nn as nn


class OwnedLayer(nn.Module):
    """A layer that a method has made of a plain one, and whose class computes something of its own.

    Attributes:
        method: the method's name in messages.
    """

    method: str


def taken(layer: OwnedLayer, name: str | None = None) -> str:
    """What is wrong with a layer that a second method is to change, for the end of a sentence."""
    where = type(layer).__name__ if name is None else f"{name}: {type(layer).__name__}"
    return f"got {where}, made by {layer.method}; give one of the methods another layer, or leave it out."
