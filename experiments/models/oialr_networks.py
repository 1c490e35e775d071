"""The networks of "Harnessing Orthogonality to Train Low-Rank Neural Networks" (arXiv 2401.08505): timm's."""

from __future__ import annotations

import torch.nn as nn


def vision_transformer(
    num_classes: int,
    patch: int,
    width: int,
    depth: int,
    heads: int,
    qkv_bias: bool,
    drop_path: float,
    in_channels: int = 3,
    image_size: int = 224,
) -> nn.Module:
    """timm's vision transformer: class token, learned positions, pre-norm blocks with an MLP of four times the width.

    ViT-B/16 has 86,567,656 parameters at 224 pixels with 1,000 classes; the mini ViT, 42,684,682 at 32 with 10.
    ``drop_path`` is that of the last block; the others have shares of it that grow with depth.

    Raises:
        ValueError: the image is not made of whole patches, or the width not of whole heads.
    """
    from timm.models.vision_transformer import VisionTransformer  # takes seconds to import

    if image_size % patch:
        raise ValueError(f"expected images of a multiple of model.patch={patch} pixels, got {image_size}.")
    if width % heads:
        raise ValueError(f"expected a width divisible by model.heads={heads}, got {width}.")
    return VisionTransformer(
        img_size=image_size,
        patch_size=patch,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        qkv_bias=qkv_bias,
        drop_path_rate=drop_path,
    )


def timm_resnet50(num_classes: int, dropout: float, in_channels: int = 3, image_size: int = 224) -> nn.Module:
    """timm's ResNet-50: 25,557,032 parameters with 1,000 classes.

    torchvision's network, but the last norm of each block starts at zero. ``dropout`` is before the classifier.
    """
    from timm.models.resnet import resnet50

    return resnet50(num_classes=num_classes, in_chans=in_channels, drop_rate=dropout)


def resnet_rs101(num_classes: int, dropout: float, in_channels: int = 3, image_size: int = 160) -> nn.Module:
    """timm's ResNet-RS-101 (arXiv 2103.07579): 63,618,696 parameters with 1,000 classes.

    ``dropout`` is before the classifier.
    """
    from timm.models.resnet import resnetrs101

    return resnetrs101(num_classes=num_classes, in_chans=in_channels, drop_rate=dropout)
