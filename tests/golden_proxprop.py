"""ProxProp against numbers of its authors' code, see ``golden.py``.

Files f64 hold what the code computed in float64, with the slip in its conjugate gradients; fixedcg_f64 what it
computes without the slip. In float32 ours is checked against float64, since the original's is mostly rounding:
conjugate gradients amplify it, so that the bound is what float64 loses where each product is rounded by as much.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn

from experiments.models.proxprop_networks import ProxPropConvNet, ProxPropMLP
from tests.golden import arrays, distance
from tract.conjugate_gradients import conjugate_gradients
from tract.methods.proxprop import ProxPropMethod
from tract.proxprop import proxprop_layer

BOUNDS = {torch.float64: 1e-8, torch.float32: 3e-5}
_ROUNDING, _SAFETY, _DRAWS = 2.0**-24, 30, 3


def check(case: dict, folder: Path) -> list[str]:
    """What disagrees in one case of manifest.json."""
    files = case["files"]
    given = arrays(folder / files["inputs"]) if "inputs" in files else arrays(folder / files["f64"])
    compute = {"linear": _layer, "conv": _layer, "mlp": _model, "convnet": _model}.get(case["kind"])
    if compute is None and "module" in case:
        compute = _layer
    if compute is None:
        return [f"unknown kind {case['kind']!r}"]
    faults = [] if "f64" in files else ["no file f64"]
    for name, variant in (("f64", "original"), ("fixedcg_f64", "stabilised")):
        if name not in files:
            continue
        expected = arrays(folder / files[name])
        losses = _lost_to_rounding(compute, case, given, variant)
        for dtype, least in BOUNDS.items():
            found = compute(case, _cast(given, dtype), variant)
            for key, value in found.items():
                bound = max(least, _SAFETY * losses[key]) if dtype is torch.float32 else least
                if key in expected and not (error := distance(value, expected[key])) <= bound:
                    faults.append(f"{name} {key} in {dtype}: {error:.2g} > {bound:.2g}")
            missing = [key for key in case["outputs"] if key not in found or key not in expected]
            faults += [f"{name} {key}: not compared" for key in missing]
    return faults


def _lost_to_rounding(compute: Callable, case: dict, given: dict, variant: str) -> dict[str, float]:
    """Largest distances of results in float64 from those with products rounded to float32, by random numbers."""
    generator = torch.Generator().manual_seed(0)

    def rounded(value: torch.Tensor) -> torch.Tensor:
        noise = 2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1
        return value + _ROUNDING * value.abs().max() * noise

    def with_rounding(b, normal, *rest):
        def rounded_normal(direction):
            squared, transposed = normal(direction)
            return rounded(squared), lambda: rounded(transposed())

        return conjugate_gradients(b, rounded_normal, *rest)

    given = _cast(given, torch.float64)
    exact = compute(case, given, variant)
    with mock.patch("tract.proxprop.conjugate_gradients", with_rounding):
        draws = [compute(case, given, variant) for _ in range(_DRAWS)]
    return {key: max(distance(draw[key], exact[key]) for draw in draws) for key in exact}


def _cast(given: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if v.is_floating_point() and k != "tau_effective" else v for k, v in given.items()}


_RENAMED = {"kernel": "kernel_size", "kernel_size": "kernel_size"}
_OPTIONS = (
    "in_features", "out_features", "in_channels", "out_channels", "num_features", "normalized_shape", "stride",
    "padding", "output_padding", "dilation", "groups", "bias", "eps", "momentum", "affine", "track_running_stats",
)  # fmt: skip


def _tau(case: dict, given: dict) -> float:
    return float(given["tau_effective"] if "tau_effective" in given else case["tau_effective"])


def _layer(case: dict, given: dict, variant: str) -> dict:
    kind = getattr(nn, case["module"])
    options = {key: case[key] for key in _OPTIONS if key in case}
    options |= {name: tuple(case[key]) for key, name in _RENAMED.items() if key in case}
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        options.pop("bias", None)
    tau = _tau(case, given)
    layer = proxprop_layer(kind)(**options, tau_prox=tau, optimization_mode=case["mode"], variant=variant)
    layer = layer.to(given["x"].dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(given[name])
    x = given["x"].clone().requires_grad_()
    output = layer(x)
    output.backward(given["grad_output"])
    gradients = {f"grad_{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output, "grad_input": x.grad, **gradients}


def _model(case: dict, given: dict, variant: str) -> dict:
    channels, size = case["input_size"][0], case["input_size"][-1]
    if case["kind"] == "mlp":
        inputs = torch.Size(case["input_size"]).numel()
        model = ProxPropMLP(inputs, case["hidden_sizes"], case["num_classes"])
    else:
        model = ProxPropConvNet(channels, size, [16, 20, 20], case["num_classes"])
    method = ProxPropMethod(_tau(case, given), case["mode"], None, variant, "global")
    method.apply(model)
    model = model.to(given["x"].dtype)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[f"param.{name}"])
    loss_of = nn.CrossEntropyLoss()
    if not case.get("train"):
        logits = model(given["x"])
        loss = loss_of(logits, given["y"])
        loss.backward()
        return {"logits": logits, "loss": loss} | {f"grad.{name}": p.grad for name, p in own.items()}
    return _trained(case["train"], model, given, loss_of)


def _trained(how: dict, model: nn.Module, given: dict, loss_of: nn.Module) -> dict:
    rest = {
        key: value
        for key, value in how.items()
        if key in ("lr", "momentum", "nesterov", "weight_decay", "betas", "eps")
    }
    kind = torch.optim.Adam if "adam" in str(how.get("optimizer", "sgd")).lower() else torch.optim.SGD
    optimizer = kind(model.parameters(), **rest)
    losses = []
    for x, y in zip(given["x"], given["y"], strict=True):
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return {"losses": torch.stack(losses)} | {f"final.{name}": p for name, p in model.named_parameters()}
