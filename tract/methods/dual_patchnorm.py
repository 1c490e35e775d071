"""DualPatchNorm: layer normalisation before and after the patch embedding."""

from __future__ import annotations

import torch.nn as nn

from tract.methods.base import Method
from tract.patches import surround_embedding


class DualPatchNormMethod(Method):
    """x -> LN(W LN(x) + b) for each patch x: Kumar et al., "Dual PatchNorm", arXiv 2302.01327.

    Both layer normalisations have elementwise scales and offsets, the first one n (numbers
    of a patch), the second one m (width of the embedding) of each. Position embeddings are
    added afterwards, by the model. For embeddings by an nn.Linear, or by an nn.Conv2d whose
    stride is its kernel size.

    Args:
        layer: name of the embedding, or None for the first layer in order of registration.
    """

    def __init__(self, layer: str | None):
        self.layer = layer

    def apply(self, model: nn.Module) -> str:
        """Put the normalisations around the embedding."""
        name = surround_embedding(model, self.layer, affine=True, after=True)
        return f"DualPatchNorm on {name}: {model.get_submodule(name)}"
