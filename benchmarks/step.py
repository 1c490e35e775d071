"""What TrAct adds to a whole training step of the recipes' networks.

python benchmarks/step.py
python benchmarks/step.py --steps 40 --settings cifar_vit

Steps with and without TrAct take turns in one process, as `experiments/runtime.py` makes them: augmentation, forward,
backward, optimizer; in float32 on a CPU, else in the recipe's precision. A step takes seconds on a CPU and its time
varies by more than the bars, so the cost of the layer alone, which varies less, stands beside it: what TrAct adds to
the first layer's forward and backward pass, divided by the step without it.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import gc

import torch

from benchmarks.interleaved import Ratio, compared, machine, verdict, write
from benchmarks.layer import MAIN, OURS, PLAIN, measured
from experiments.runtime import SETTINGS, Sizes, measure

# setting: (batch on a CPU, its first layer, steps in relation to --steps, bars on a CPU and on a GPU)
STEPS = {
    "cifar_resnet": (128, "CIFAR stem", 1.0, 1.01, 1.01),
    "cifar_vit": (128, "ViT tokens", 1.0, 1.015, 1.02),
    "imagenet_resnet50": (16, "ImageNet stem", 0.5, 1.005, 1.007),
    "deit_small": (16, "DeiT-S embedding", 0.5, 1.005, 1.008),
    "deit_base": (32, "DeiT-B embedding", 0.5, None, 1.003),
}
BY_DEFAULT = [name for name, (*_, cpu, _) in STEPS.items() if cpu is not None]


def main(arguments: list[str] | None = None) -> int:
    """Print a table of costs; returns the exit code."""
    parser = argparse.ArgumentParser(description="What TrAct adds to training steps.")
    parser.add_argument("--settings", nargs="+", choices=list(STEPS), metavar="NAME", help=", ".join(STEPS))
    parser.add_argument(
        "--steps", type=int, default=16, help="of each method; half for ImageNet (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, help="instead of the setting's (on a GPU: its recipe's)")
    parser.add_argument("--json", metavar="FILE", help="write everything measured there too")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    line = machine(device)
    print(
        "| setting | images a step | without, ms | with TrAct / without | the layer's part |\n|---|---|---|---|---|",
        flush=True,
    )
    ratios, parts = [], {}
    for name in options.settings or (list(STEPS) if on_gpu else BY_DEFAULT):
        batch, layer, share, *bars = STEPS[name]
        size = options.batch_size or (SETTINGS[name].changes.get("batch_size") if on_gpu else batch)
        given = {"runtime.device": options.device} | ({"batch_size": size} if size else {})
        if not on_gpu:
            given["precision"] = "fp32"  # half precision takes many times as long on most CPUs
        steps = max(2, round(options.steps * share))
        timing, config = measure(SETTINGS[name], given, Sizes(blocks=steps, steps=1, warmup=1, batches=2))
        gc.collect()
        seconds = {PLAIN: timing.vanilla, OURS: timing.tract}
        ratio = compared(name, seconds, OURS, PLAIN, bars[on_gpu])
        parts[name] = _layers_part(layer, config.batch_size, device, ratio.milliseconds[PLAIN])
        ratios.append(ratio)
        print(_row(ratio, config.batch_size, parts[name]), flush=True)
    held = [ratio.holds for ratio in ratios if ratio.bar is not None]
    print(
        f"\nRatios of medians (quartiles of neighbouring steps); {sum(held)} of {len(held)} bars hold. "
        f"n = {', '.join(str(ratio.n) for ratio in ratios)} steps of each; {line}"
    )
    write(options.json, ratios, layers_part=parts, machine=line)
    return 0


def _layers_part(layer: str, batch: int, device: torch.device, milliseconds: float) -> float:
    """What TrAct adds to the layer alone, in parts of a step."""
    case = MAIN[layer]
    times = measured(layer, case, 8, device, batch / case.shape[0])[0][0].milliseconds
    return (times[OURS] - times[PLAIN]) / milliseconds


def _row(ratio: Ratio, batch: int, part: float) -> str:
    value = verdict(ratio.ratio, ratio.bar, digits=3)
    spread = f"[{ratio.low:.3f}, {ratio.high:.3f}]"
    return f"| {ratio.case} | {batch} | {ratio.milliseconds[PLAIN]:.0f} | {value} {spread} | {100 * part:.2f} % |"


if __name__ == "__main__":
    sys.exit(main())
