"""Frozen whitening of the first layer, as speed-runs on CIFAR-10 have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tract.gathered import Gathering
from tract.methods.base import Method, Setting
from tract.owned import OwnedLayer, taken
from tract.surgery import find_layer

_KINDS = (nn.Linear, nn.Conv2d)


class WhiteningMethod(Method):
    """The first layer's filters become eigenvectors of the training images' patches, and stay so.

    With patches x (n numbers, as the layer multiplies them) and C = mean(x x^T) = V diag(s) V^T, s
    descending, the filters are the first m of the list

        +v_1 / sqrt(s_1 + eps), ..., +v_n / sqrt(s_n + eps), -v_1 / sqrt(s_1 + eps), ..., -v_n / sqrt(s_n + eps),

    then those that the layer drew. The whole weight is frozen, drawn filters included; a bias is trained,
    and none is added. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498, after
    Page's DAWNBench entry: C is about zero, not about the mean, since images are normalised. The largest
    entry of each v is positive.

    Args:
        layer: name of an nn.Linear or nn.Conv2d, or None for the first layer in order of registration.
        images: so many training images are looked at, spread evenly, without augmentation.
        eps: added to each eigenvalue, > 0.

    Raises:
        ValueError: images or eps out of range; (of ``apply``) no such layer, or no images.
        TypeError: (of ``apply``) a layer of another kind.
    """

    order = 1

    def __init__(self, layer: str | None, images: int, eps: float):
        if images < 1 or not 0 < eps < float("inf"):
            raise ValueError(f"expected images of 1 or more and a finite eps above 0, got images={images}, eps={eps}.")
        self.layer, self.images, self.eps = layer, images, eps
        self._seen: Callable[[int], Iterable[Tensor]] = lambda count: ()

    def prepare(self, setting: Setting) -> None:
        """Take the way to the training images."""
        self._seen = setting.images

    @torch.no_grad()
    def apply(self, model: nn.Module) -> str:
        """Set the filters and freeze them."""
        name, layer = find_layer(model, self.layer)
        if isinstance(layer, OwnedLayer) and not isinstance(layer, Gathering):
            raise TypeError(f"whitening: expected a plain layer, {taken(layer, name)}")
        # A layer that gathers has the plain layer's weight; whether two methods may have it is for claims to say.
        is_plain = type(layer) in _KINDS or (isinstance(layer, Gathering) and isinstance(layer, _KINDS))
        if not is_plain or getattr(layer, "groups", 1) != 1:
            raise TypeError(
                f"expected an nn.Linear or an nn.Conv2d without groups to whiten, got {layer}; give layer=NAME."
            )
        filters = whitening_filters(second_moment(_inputs(model, layer, self._seen(self.images)), layer), self.eps)
        count = min(len(filters), len(layer.weight))
        layer.weight[:count] = filters[:count].view(count, *layer.weight.shape[1:]).to(layer.weight)
        layer.weight.requires_grad_(False)
        return f"whitening on {name}: {layer}, {count} of {len(layer.weight)} filters are eigenvectors, all are frozen"

    def claims(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """The layer's weight."""
        yield find_layer(model, self.layer)[1].weight


def whitening_filters(moment: Tensor, eps: float) -> Tensor:
    """Rows +v_i / sqrt(s_i + eps), then the same with -, of a symmetric (n, n) matrix; eigenvalues descending.

    Example:
        >>> whitening_filters(torch.diag(torch.tensor([1.0, 4.0])), 0.0)
        tensor([[ 0.0000,  0.5000],
                [ 1.0000,  0.0000],
                [-0.0000, -0.5000],
                [-1.0000, -0.0000]])
    """
    values, vectors = torch.linalg.eigh(moment)
    rows = vectors.T.flip(0)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    rows = rows * largest.sign() / (values.flip(0).clamp(min=0) + eps).sqrt()[:, None]
    return torch.cat([rows, -rows])


def second_moment(inputs: Iterable[Tensor], layer: nn.Linear | nn.Conv2d) -> Tensor:
    """mean(x x^T) in float64 over the rows x that the layer multiplies; of a convolution those within the image.

    Raises:
        ValueError: no row.
    """
    total, count = 0.0, 0
    for x in inputs:
        if isinstance(layer, nn.Conv2d):
            x = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride).transpose(1, 2)
        rows = x.flatten(0, -2).double().cpu()
        total, count = total + rows.T @ rows, count + len(rows)
    if not count:
        raise ValueError("expected training images to whiten, got none; whiten in a run that has some.")
    return total / count


def _inputs(model: nn.Module, layer: nn.Module, images: Iterable[Tensor]) -> Iterator[Tensor]:
    """What the layer gets in a forward pass of each batch, which ends there."""

    class Reached(Exception):  # noqa: N818
        def __init__(self, x: Tensor):
            self.x = x

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise Reached(args[0])

    training, hook = model.training, layer.register_forward_pre_hook(stop)
    model.eval()
    try:
        for batch in images:
            if not isinstance(batch, Tensor):
                raise TypeError(f"expected images of one size to whiten, got {type(batch).__name__}.")
            try:
                model(batch.to(layer.weight.device))
            except Reached as reached:
                yield reached.x
    finally:
        hook.remove()
        model.train(training)
