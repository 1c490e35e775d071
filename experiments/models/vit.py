"""The vision transformer of the paper's CIFAR experiments (after ViT-CIFAR).

Patches are cut by hand and given to a Linear layer, so the first layer is ``emb``. Pre-norm
blocks; attention scores are divided by the square root of the model width; the MLP has a
GELU after both of its layers; class token and positions start from N(0, 1).
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Attention(nn.Module):
    """Multi-head self-attention with scores q k^T / sqrt(width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, width**-0.5
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer whose patches are embedded by a Linear layer."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
    ):
        super().__init__()
        if image_size % patch or width % heads:
            raise ValueError(
                f"expected an image size divisible by the patch and a width divisible by the heads, "
                f"got {image_size}/{patch} and {width}/{heads}."
            )
        self.patch = patch
        tokens = (image_size // patch) ** 2
        self.emb = nn.Linear(in_channels * patch * patch, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_emb = nn.Parameter(torch.randn(1, tokens + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, mlp_width) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))

    def words(self, x: Tensor) -> Tensor:
        """Patches as rows: (batch, tokens, patch * patch * channels), the channel fastest."""
        x = x.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores from the class token."""
        x = self.emb(self.words(x))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_emb
        return self.head(self.blocks(x)[:, 0])


def vit_cifar(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """7 layers, 12 heads, width 384, 4x4 patches: 6,268,810 parameters with 10 classes."""
    return ViT(num_classes, in_channels, image_size, patch=4, width=384, depth=7, heads=12, mlp_width=384)


def vit_small(
    num_classes: int,
    in_channels: int = 1,
    image_size: int = 8,
    patch: int = 2,
    width: int = 64,
    depth: int = 3,
    heads: int = 4,
) -> nn.Module:
    """The same network in small, for 8x8 digits."""
    return ViT(num_classes, in_channels, image_size, patch, width, depth, heads, mlp_width=width)
