"""PatchNorm: every patch standardised before the embedding."""

from __future__ import annotations

import torch.nn as nn

from tract.methods.base import Method
from tract.patches import surround_embedding


class PatchNormMethod(Method):
    """Each patch to mean 0 and standard deviation 1, then the embedding.

    x -> (x - mean(x)) / sqrt(var(x) + eps) over the n numbers of each patch x, without
    parameters: "PatchNorm" of the ablation in arXiv 2410.23970 (figure 7). For embeddings
    by an nn.Linear, or by an nn.Conv2d whose stride is its kernel size.

    Args:
        layer: name of the embedding, or None for the first layer in order of registration.
    """

    def __init__(self, layer: str | None):
        self.layer = layer

    def apply(self, model: nn.Module) -> str:
        """Put the normalisation before the embedding."""
        name = surround_embedding(model, self.layer, affine=False, after=False)
        return f"PatchNorm on {name}: {model.get_submodule(name)}"
