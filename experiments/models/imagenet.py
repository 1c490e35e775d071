"""Networks for ImageNet: torchvision's residual networks and DeiT-III's vision transformers."""

from __future__ import annotations

import torch.nn as nn
from torchvision.models import resnet as torchvision_resnet


def imagenet_resnet18(num_classes: int, in_channels: int = 3, image_size: int = 224) -> nn.Module:
    """torchvision's ResNet-18 as it is: 11,689,512 parameters with 1,000 classes."""
    return _resnet(torchvision_resnet.resnet18, num_classes, in_channels)


def imagenet_resnet34(num_classes: int, in_channels: int = 3, image_size: int = 224) -> nn.Module:
    """torchvision's ResNet-34 as it is: 21,797,672 parameters with 1,000 classes."""
    return _resnet(torchvision_resnet.resnet34, num_classes, in_channels)


def imagenet_resnet50(num_classes: int, in_channels: int = 3, image_size: int = 224) -> nn.Module:
    """torchvision's ResNet-50 (v1.5) as it is: 25,557,032 parameters with 1,000 classes."""
    return _resnet(torchvision_resnet.resnet50, num_classes, in_channels)


def _resnet(constructor, num_classes: int, in_channels: int) -> nn.Module:
    if in_channels != 3:
        raise ValueError(f"expected colour images for an ImageNet network, got {in_channels} channels.")
    return constructor(num_classes=num_classes)


def deit3(
    num_classes: int,
    drop_path: float,
    patch: int,
    width: int,
    depth: int,
    heads: int,
    in_channels: int = 3,
    image_size: int = 224,
) -> nn.Module:
    """DeiT-III's ViT-S and ViT-B (Touvron et al., arXiv 2204.07118).

    ViT-S has 22,059,496 parameters at 224 pixels, ViT-B 86,585,320, and 86,545,384 at 192. timm's network, with what
    its defaults have otherwise than the original: LayerScale begins at 1e-4, the class token with a deviation of 0.02,
    and ``drop_path`` is the same in every block. The patch embedding is a convolution with stride = kernel in PyTorch's
    own initialisation; the position embedding covers the patches only.
    """
    from timm.layers import DropPath  # takes seconds to import
    from timm.models.vision_transformer import VisionTransformer

    if image_size % patch:
        raise ValueError(f"expected images of a multiple of model.patch={patch} pixels, got {image_size}.")
    network = VisionTransformer(
        img_size=image_size,
        patch_size=patch,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        no_embed_class=True,
        init_values=1e-4,
    )
    nn.init.trunc_normal_(network.cls_token, std=0.02)
    for block in network.blocks:
        if drop_path > 0:
            block.drop_path1, block.drop_path2 = DropPath(drop_path), DropPath(drop_path)
    return network
