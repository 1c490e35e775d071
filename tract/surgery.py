"""Find and replace layers in a model; loud when nothing matches."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Sequence

import torch
import torch.nn as nn

from tract.gathered import Gathering
from tract.layers import WRAPPED, Statistics, TrAct, TrActLayer

_log = logging.getLogger("tract")


def apply_tract(
    model: nn.Module,
    lambda_: float | None = None,
    *,
    l: float | None = None,  # noqa: E741
    layer: str | Sequence[str] | None = None,
    example: torch.Tensor | None = None,
    statistics: Statistics = "global",
) -> str:
    """Put TrAct on the first layer of a model, in place, and say which layer that is.

    A model may have several first layers, side by side on the same image (RepVGG, FastViT).
    Without ``layer`` and ``example`` one of them is taken, and a warning names those that are
    left; with ``example`` all are taken that get the tensor that the first one gets.

    Args:
        model: any module that contains an nn.Linear or nn.Conv1d/2d/3d.
        lambda_: the damping; see :func:`tract.TrAct`.
        l: the same as ``lambda_``.
        layer: the name of the layer, as in ``model.named_modules()``, or several names. Without
            it the first supported layer in order of registration is taken, or, with
            ``example``, the first that a forward pass of this input reaches.
        example: an input batch for the model, used once without gradients.
        statistics: see :func:`tract.TrAct`.

    Returns:
        The layer's name, or the names with ", " between; it is logged to the logger "tract" as well.

    Raises:
        ValueError: no such layer, none at all, or TrAct is there already.
        TypeError: the layer cannot be wrapped; see :func:`tract.TrAct`.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> apply_tract(model, lambda_=0.1)
        '1'
    """
    for name, module in model.named_modules():
        if isinstance(module, TrActLayer):
            raise ValueError(
                f"expected a plain model, got TrAct on {name!r} already; tract.unwrap(model) takes it off."
            )
    if layer is None and example is not None:
        names = _first_reached(model, example)
    elif layer is None:
        names = [_first_layer(model)]
        beside = _beside(model, names[0])
        if beside:
            warnings.warn(
                f"TrAct is put on {names[0]}, not on {', '.join(beside)}, which seem to get the same input; "
                f"apply_tract(model, layer={[*names, *beside]}) takes all of them, example=BATCH those that do.",
                stacklevel=2,
            )
    else:
        names = [layer] if isinstance(layer, str) else list(dict.fromkeys(layer))
    found = [(name, named_layer(model, name)) for name in names]
    wrapped = [TrAct(plain, lambda_, l=l, statistics=statistics) for _, plain in found]
    for (name, plain), new in zip(found, wrapped, strict=True):
        new.label = name
        replace_module(model, plain, new)
        _log.info("TrAct (lambda %g) on %s: %s", new.lambda_, name, plain)
    return ", ".join(names)


def unwrap(model: nn.Module) -> nn.Module:
    """Plain layers again, with the same tensors, hooks and options.

    Args:
        model: a model, changed in place, or a TrAct layer itself.

    Returns:
        The model; for a TrAct layer the plain layer.

    Raises:
        ValueError: nothing in the model has TrAct.
    """
    layers = [module for module in model.modules() if isinstance(module, Gathering)]
    if not layers:
        raise ValueError("expected a model with a TrAct layer, got none; there is nothing to unwrap.")
    for layer in layers:
        if layer._gathered is not None:
            raise RuntimeError(
                f"{layer.method} layer {layer.label}: expected to be outside of tract.accumulate, got unwrap inside; "
                "leave it first."
            )
    if layers[0] is model:
        return model.plain()
    for layer in layers:
        replace_module(model, layer, layer.plain())
    return model


def find_layer(model: nn.Module, name: str | None) -> tuple[str, nn.Module]:
    """The layer of this name, or without one the first Linear or Conv layer in order of registration.

    Raises:
        ValueError: no such layer, or none at all.
    """
    name = _first_layer(model) if name is None else name
    return name, named_layer(model, name)


def require_state_dict(state_dict: dict[str, torch.Tensor], shapes: dict[str, torch.Size | None]) -> None:
    """A state dict has exactly these names, of these shapes (None: of any).

    Raises:
        ValueError: it does not; the message names what is wrong.
    """
    for kind, keys in (("without", shapes.keys() - state_dict.keys()), ("with", state_dict.keys() - shapes.keys())):
        if keys:
            raise ValueError(
                f"expected a state dict of the plain model, got one {kind} {', '.join(sorted(keys)[:5])}; "
                "it must be of the same architecture."
            )
    for name, shape in shapes.items():
        if shape is not None and shape != state_dict[name].shape:
            raise ValueError(
                f"expected {name} of shape {tuple(shape)}, got {tuple(state_dict[name].shape)}; "
                "the state dict must be of the same architecture."
            )


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever the model refers to ``old``.

    Raises:
        ValueError: ``old`` is not inside the model.
    """
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is old]
    if not places:
        raise ValueError(
            f"expected a layer inside the model, got {old}; assign TrAct(layer) to where the layer is used."
        )
    for parent, name in places:
        setattr(parent, name, new)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and Conv layers, with subclasses and lazy ones: those are not passed over but refused."""
    kinds = (*WRAPPED, nn.modules.lazy.LazyModuleMixin)
    return {name: module for name, module in model.named_modules() if name and isinstance(module, kinds)}


def _first_layer(model: nn.Module) -> str:
    names = list(_candidates(model))
    if not names:
        raise ValueError(
            f"expected a model that contains one of {', '.join(k.__name__ for k in WRAPPED)}, got "
            f"{type(model).__name__} with none; a lone layer is wrapped by TrAct(layer)."
        )
    return names[0]


def _beside(model: nn.Module, name: str) -> list[str]:
    """Layers with as many input channels (or features) as this one, where no layer has so many outputs.

    Only what feeds the named layer can feed them too.
    """
    found, kind = {}, type(named_layer(model, name))
    for other, module in _candidates(model).items():
        names = ("in_features", "out_features") if isinstance(module, nn.Linear) else ("in_channels", "out_channels")
        found[other] = tuple(getattr(module, size, None) for size in names)
    inputs, _ = found[name]
    if any(outputs == inputs for _, outputs in found.values()):
        return []
    alike = (other for other, (its, _) in found.items() if its == inputs and other != name)
    return [other for other in alike if type(named_layer(model, other)) is kind]


def _first_reached(model: nn.Module, example: torch.Tensor) -> list[str]:
    """The first layer that a forward pass reaches, and all others that get the very same tensor."""
    reached: list[tuple[str, torch.Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: reached.append((name, args[0])))
        for name, module in _candidates(model).items()
    ]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    if not reached:
        raise ValueError("expected the forward pass to reach a Linear or Conv layer, got none; give layer=NAME.")
    first = reached[0][1]
    return list(dict.fromkeys(name for name, x in reached if x is first))


def linear_and_conv_layers(model: nn.Module) -> list[str]:
    """Names of all Linear, convolution and transposed convolution layers, in order of registration.

    Not of subclasses: attention uses the weight of its output layer without calling the layer.
    """
    kinds = (*WRAPPED, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return [name for name, module in model.named_modules() if name and type(module) in kinds]


def named_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of this name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    modules = dict(model.named_modules())
    if name and name in modules:
        return modules[name]
    near = difflib.get_close_matches(name, _candidates(model), n=3, cutoff=0.0)
    raise ValueError(
        f"expected the name of a layer of {type(model).__name__}, got {name!r}; nearest: {', '.join(near)}."
    )
