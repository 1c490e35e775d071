"""What a TrAct layer costs, forward and backward, beside the plain layer and torch_tract 1.0.0; its memory; its errors.

python benchmarks/layer.py
python benchmarks/layer.py --cases "CIFAR stem" --turns 30

Each case is a layer on standardised random inputs. The contenders take turns in one process; a ratio is one of medians
(quartiles of the turns' own ratios). Memory is the peak of what torch allocates beyond the plain layer's, weight and
input not counted; what MKL and oneDNN allocate for themselves is not seen. Errors are relative to float64.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from benchmarks.interleaved import Ratio, compared, machine, peak_bytes, take_turns, verdict, write
from tract import TrAct
from tract.damped_solve import damped_solve
from tract.second_moment import second_moment, second_moment_for

LAMBDA = 0.1
PLAIN, OURS, THEIRS = "plain", "tract", "torch_tract"
MEMORY_BAR = 16.0  # MiB


@dataclass(frozen=True)
class Case:
    """A layer, its input, and the most that it should cost in multiples of the plain layer's and of torch_tract's."""

    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]
    bar: float = 2.0
    bar_theirs: float | None = None
    comparable: bool = True  # torch_tract knows this kind of layer
    prepare: Callable[[Tensor], Tensor] = lambda x: x
    autocast: torch.dtype | None = None


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


MAIN = {
    "CIFAR stem": Case(lambda: nn.Conv2d(3, 64, 3, padding=1), (128, 3, 32, 32), 1.10, 0.80),
    "ViT tokens": Case(lambda: nn.Linear(48, 384), (128, 64, 48), 1.12, 0.80),
    "ImageNet stem": Case(lambda: nn.Conv2d(3, 64, 7, stride=2, padding=3), (32, 3, 224, 224), 1.15, 0.42),
    "DeiT-S embedding": Case(lambda: nn.Conv2d(3, 384, 16, stride=16), (64, 3, 224, 224), 1.45, 0.65),
    "DeiT-B embedding": Case(lambda: nn.Conv2d(3, 768, 16, stride=16), (64, 3, 192, 192), 1.30, 0.75),
}
OTHERS = {
    "CIFAR stem, channels_last": Case(MAIN["CIFAR stem"].layer, (128, 3, 32, 32), prepare=_channels_last),
    "CIFAR stem, bfloat16 autocast": Case(
        MAIN["CIFAR stem"].layer, (128, 3, 32, 32), autocast=torch.bfloat16, comparable=False
    ),
    "ViT tokens, transposed in memory": Case(
        MAIN["ViT tokens"].layer, (128, 48, 64), prepare=lambda x: x.mT, comparable=False
    ),
    "MLP, 784 inputs": Case(lambda: nn.Linear(784, 512), (4096, 784)),
    "few rows: b = 128, n = 3072": Case(lambda: nn.Linear(3072, 512), (128, 3072)),
    "ImageNet stem, circular": Case(
        lambda: nn.Conv2d(3, 64, 7, stride=2, padding=3, padding_mode="circular"), (32, 3, 224, 224), comparable=False
    ),
    "ImageNet stem, channels_last": Case(MAIN["ImageNet stem"].layer, (32, 3, 224, 224), prepare=_channels_last),
    "CIFAR stem, reflect": Case(
        lambda: nn.Conv2d(3, 64, 3, padding=1, padding_mode="reflect"), (128, 3, 32, 32), comparable=False
    ),
    "5x5, dilation 2": Case(lambda: nn.Conv2d(3, 64, 5, padding=4, dilation=2), (128, 3, 32, 32), comparable=False),
    "5x5 on 16 channels, 4 groups": Case(
        lambda: nn.Conv2d(16, 64, 5, padding=2, groups=4), (128, 16, 32, 32), comparable=False
    ),
    "3x3 on 64 channels": Case(lambda: nn.Conv2d(64, 64, 3, padding=1), (32, 64, 32, 32)),
    "audio, Conv1d k10 s5": Case(lambda: nn.Conv1d(1, 512, 10, stride=5), (16, 1, 16000), comparable=False),
    "time series, Conv1d k7": Case(lambda: nn.Conv1d(12, 64, 7, padding=3), (64, 12, 1000), comparable=False),
    "video stem, Conv3d k3x7x7": Case(
        lambda: nn.Conv3d(3, 64, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3)), (4, 3, 8, 112, 112), comparable=False
    ),
    "video patches, Conv3d k2x16x16": Case(
        lambda: nn.Conv3d(3, 384, (2, 16, 16), stride=(2, 16, 16)), (4, 3, 16, 224, 224), comparable=False
    ),
}
CASES = {**MAIN, **OTHERS}


@dataclass(frozen=True)
class Errors:
    """Relative to float64: of X^T X, of the gradient, and of the plain layer's own gradient."""

    moment: float
    gradient: float
    plain: float


def main(arguments: list[str] | None = None) -> int:
    """Print a table of costs; returns the exit code."""
    parser = argparse.ArgumentParser(description="Cost, memory and errors of TrAct layers beside plain ones.")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), metavar="NAME", help="default: all")
    parser.add_argument("--main", action="store_true", help="the five layers of the paper's networks only")
    parser.add_argument("--turns", type=int, default=12, help="of each contender (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="of the batches (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write everything measured there too")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    names = options.cases or list(MAIN if options.main else CASES)
    line = machine(device)
    print("| layer | plain, ms | against plain | against torch_tract | memory, MiB | error of XᵀX | of the gradient |")
    print("|---|---|---|---|---|---|---|", flush=True)
    ratios, memory, errors = [], {}, {}
    for name in names:
        found, memory[name], errors[name] = measured(name, CASES[name], options.turns, device, options.scale)
        ratios += found
        print(_row(name, found, memory[name], errors[name]), flush=True)
    held = [ratio.holds for ratio in ratios if ratio.bar is not None] + [mib <= MEMORY_BAR for mib in memory.values()]
    print(
        f"\nRatios of medians (quartiles); {sum(held)} of {len(held)} bars hold. Forward and backward, "
        f"lambda {LAMBDA}, n = {options.turns} turns; {line}"
    )
    write(options.json, ratios, memory=memory, errors={name: vars(each) for name, each in errors.items()}, machine=line)
    return 0


def measured(
    name: str, case: Case, turns: int, device: torch.device, scale: float = 1.0
) -> tuple[list[Ratio], float, Errors]:
    """The ratios of one case, the memory beyond the plain layer's in MiB, and the errors."""
    torch.manual_seed(0)
    batch = max(1, round(case.shape[0] * scale))
    x = case.prepare(torch.randn(batch, *case.shape[1:], device=device))
    plain = case.layer().to(device)
    with torch.no_grad():
        direction = torch.randn_like(plain(x)) / batch
    layers = {PLAIN: plain, OURS: TrAct(copy.deepcopy(plain), lambda_=LAMBDA)}
    theirs = _torch_tract(copy.deepcopy(plain)) if case.comparable else None
    if theirs is not None:
        layers[THEIRS] = theirs
    runs = {each: _pass(layer, x, direction, case.autocast) for each, layer in layers.items()}
    seconds = take_turns(runs, turns, device)
    ratios = [compared(name, seconds, OURS, PLAIN, case.bar)]
    if theirs is not None:
        ratios.append(compared(name, seconds, OURS, THEIRS, case.bar_theirs))
    memory = (peak_bytes(runs[OURS], device) - peak_bytes(runs[PLAIN], device)) / 2**20
    return ratios, memory, _errors(layers, x, direction)


def _pass(layer: nn.Module, x: Tensor, direction: Tensor, autocast: torch.dtype | None) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad()
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            output = layer(x)
        output.backward(direction.to(output.dtype))

    return run


def _torch_tract(layer: nn.Module) -> nn.Module | None:
    try:
        import torch_tract
    except ImportError:
        return None
    return torch_tract.TrAct(layer, l=LAMBDA).to(layer.weight.device)


def _errors(layers: dict[str, nn.Module], x: Tensor, direction: Tensor) -> Errors:
    geometry = layers[OURS]._geometry()
    exact = layers[PLAIN].double()
    exact.zero_grad()
    exact(x.double()).backward(direction.double())
    rows, gradient = geometry.count_rows(x), exact.weight.grad
    moment = second_moment(x.double(), geometry)
    expected, _ = damped_solve(gradient.reshape(geometry.groups, -1, geometry.row_length), moment / rows, LAMBDA)
    plain = exact.float()
    float32 = {}
    for name, layer in {PLAIN: plain, OURS: layers[OURS]}.items():
        layer.zero_grad()
        layer(x).backward(direction)
        float32[name] = layer.weight.grad
    return Errors(
        _relative(second_moment_for(x, geometry, LAMBDA), moment),
        _relative(float32[OURS], expected.reshape(gradient.shape)),
        _relative(float32[PLAIN], gradient),
    )


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def _row(name: str, ratios: list[Ratio], memory: float, errors: Errors) -> str:
    cells = [f"{verdict(ratio.ratio, ratio.bar)} [{ratio.low:.2f}, {ratio.high:.2f}]" for ratio in ratios]
    cells += ["–"] * (2 - len(cells))
    return (
        f"| {name} | {ratios[0].milliseconds[PLAIN]:.1f} | {' | '.join(cells)} | "
        f"{verdict(memory, MEMORY_BAR)} | {errors.moment:.0e} | {errors.gradient:.0e} (plain {errors.plain:.0e}) |"
    )


if __name__ == "__main__":
    sys.exit(main())
