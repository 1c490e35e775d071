"""Patches as rows: what a patch embedding multiplies, and layer normalisation of it.

A patch embedding is an nn.Linear, whose input rows (..., n) are patches already, or an
nn.Conv2d whose stride is its kernel size, so that every pixel belongs to one patch. Letters:
N images, c channels, k x l kernel, p = (H // k)(W // l) positions, n = c k l numbers per
patch, in the order of the weight's own rows ``weight.flatten(1)``.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn as nn
from torch import Tensor

from tract.owned import OwnedLayer
from tract.surgery import find_layer, replace_module

EPS = 1e-6  # in the square root; the networks of arXiv 2302.01327 use this value too


def to_patches(images: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Images (N, c, H, W) as rows (N, p, n); what a whole number of patches does not cover is left out."""
    (k, l), (height, width) = kernel, images.shape[2:]  # noqa: E741
    images = images[:, :, : height // k * k, : width // l * l]
    return images.unflatten(3, (-1, l)).unflatten(2, (-1, k)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_patches(patches: Tensor, kernel: tuple[int, int], columns: int) -> Tensor:
    """Rows (N, p, n) as images (N, c, H, W) again, with ``columns`` patches side by side."""
    blocks = patches.unflatten(2, (-1, *kernel)).unflatten(1, (-1, columns))  # (N, rows, columns, c, k, l)
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class PatchNormalisation(nn.Module):
    """Layer normalisation of each patch before a patch embedding: input and output of the embedding's input shape.

    x -> (x - mean(x)) / sqrt(var(x) + eps), over the n numbers of one patch, var being the
    mean squared deviation; with ``affine`` then elementwise * weight + bias, both of shape
    (n,). A patch of one colour in every channel becomes zeros. Of an image whose sides are no multiples of
    the kernel, the embedding ignores the rest of the pixels; they are left out here.

    Args:
        embedding: the layer that will get the output; only its options are read.
        affine: with parameters, which start as ones and zeros.

    Raises:
        TypeError: neither a plain nn.Linear or nn.Conv2d nor one that a method has.
        ValueError: a convolution that is no patch embedding, or patches of a single number.

    Example:
        >>> import torch
        >>> norm = PatchNormalisation(nn.Conv2d(3, 8, 4, stride=4), affine=False)
        >>> norm(torch.ones(2, 3, 8, 9)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, embedding: nn.Module, affine: bool):
        super().__init__()
        _require_patch_embedding(embedding)
        self.kernel = embedding.kernel_size if isinstance(embedding, nn.Conv2d) else None
        self.norm = _layer_norm(embedding.weight[0].numel(), embedding, affine)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) for a Linear embedding, (N, c, H, W) or (c, H, W) for a convolution."""
        if self.kernel is None:
            return self.norm(x)
        images = x if x.dim() == 4 else x[None]
        rows = self.norm(to_patches(images, self.kernel))
        images = from_patches(rows, self.kernel, images.shape[3] // self.kernel[1])
        return images if x.dim() == 4 else images[0]


class EmbeddingNormalisation(nn.Module):
    """Layer normalisation, with parameters, of what a patch embedding gives: over its m output channels.

    Equation as in :class:`PatchNormalisation`. Shapes: (..., m) after a Linear layer,
    (N, m, h, w) or (m, h, w) after a convolution.
    """

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.channel = -3 if isinstance(embedding, nn.Conv2d) else -1
        self.norm = _layer_norm(embedding.weight.shape[0], embedding, affine=True)

    def forward(self, z: Tensor) -> Tensor:
        """The shape stays."""
        return self.norm(z.movedim(self.channel, -1)).movedim(-1, self.channel)


def surround_embedding(model: nn.Module, layer: str | None, affine: bool, after: bool) -> str:
    """Put normalisation around a model's patch embedding, in place, and say which layer that is.

    The layer itself (with its tensors, hooks and what a method has made of it) becomes the part
    ``embedding`` of an nn.Sequential with the parts ``before`` and perhaps ``after``.

    Args:
        model: any module that contains the embedding.
        layer: the embedding's name, or None for the first layer in order of registration.
        affine: whether the normalisation before it has parameters.
        after: whether its output is normalised too (with parameters).

    Returns:
        The layer's name.

    Raises:
        TypeError, ValueError: no such layer, it is no patch embedding, or patches are normalised already.
    """
    for name, module in model.named_modules():
        if isinstance(module, PatchNormalisation):
            raise ValueError(f"expected a model without normalised patches, got {name!r} already; use one such method.")
    name, embedding = find_layer(model, layer)
    parts = OrderedDict(before=PatchNormalisation(embedding, affine), embedding=embedding)
    if after:
        parts["after"] = EmbeddingNormalisation(embedding)
    replace_module(model, embedding, nn.Sequential(parts))
    return name


def _layer_norm(size: int, like: nn.Module, affine: bool) -> nn.LayerNorm:
    return nn.LayerNorm(size, EPS, affine, device=like.weight.device, dtype=like.weight.dtype)


def _require_patch_embedding(layer: nn.Module) -> None:
    kinds = (nn.Linear, nn.Conv2d)  # or one that a method has made of such a layer, which cuts the same patches
    if type(layer) not in kinds and not (isinstance(layer, OwnedLayer) and isinstance(layer, kinds)):
        kind = type(layer).__name__
        raise TypeError(f"expected a patch embedding, an nn.Linear or nn.Conv2d, got {kind}; give layer=NAME.")
    if isinstance(layer, nn.Conv2d):
        wrong = [
            f"{option}={value}"
            for option, value, allowed in (
                ("stride", layer.stride, (layer.kernel_size,)),
                ("padding", layer.padding, ((0, 0), "valid")),
                ("dilation", layer.dilation, ((1, 1),)),
                ("groups", layer.groups, (1,)),
            )
            if value not in allowed
        ]
        if wrong:
            raise ValueError(
                f"expected a patch embedding, an nn.Conv2d with stride=kernel_size={layer.kernel_size} and neither "
                f"padding, dilation nor groups, got {', '.join(wrong)}; normalising patches needs a model that cuts "
                "the image into patches."
            )
    if layer.weight[0].numel() < 2:
        raise ValueError("expected patches of at least 2 numbers, got 1, which normalising would set to zero.")
