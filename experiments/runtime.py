"""Run time of training with and without TrAct (section 4.6 of the paper).

python experiments/runtime.py                                    the CIFAR ResNet-18 and ViT, here
python experiments/runtime.py imagenet_resnet50 deit_small deit_base --out runtime.json
python experiments/runtime.py cifar_resnet model=resnet50 precision=bf16 channels_last=true
python experiments/runtime.py quickstart model=vit_small batch_size=32

Both networks are trained in one process by the training loop's own steps, in blocks that
take turns: vanilla, TrAct, vanilla, TrAct, ... after a warm-up. Images are synthetic and in
memory, augmented where the recipe does that in whole batches; reading files, evaluation and
checkpoints are not measured. Settings are recipes of experiments/conf/, whose values can be
given as key=value; those of DeiT have the batch of one of its eight GPUs.

Cost: 20 steps of warm-up and 20 blocks of 20 steps for each method; not measured on a GPU
yet. Published: 1,091 s per 100 epochs of the CIFAR ViT without TrAct and 1,197 s with it
(ratio 1.097); 133:52 h and 133:58 h for ViT-S (1.0008), 98:28 h and 98:43 h for ViT-B
(1.0025) on ImageNet.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from experiments.config import Config, build, compose_config, parse_single, to_tree
from experiments.data.augment import IN_BATCHES
from experiments.data.images import ImageData, Split
from experiments.ranks import Ranks, choose_device
from experiments.training.assembly import build_trainer
from experiments.training.log import RunLog
from experiments.training.loop import Trainer
from experiments.training.provenance import hardware, versions
from experiments.training.stop import StopRequest
from experiments.training.torch_settings import torch_settings
from runfolder.errors import EXIT_BAD_INPUT, UserError, nearest
from runfolder.files import write_json
from runfolder.folder import typed

METHODS = ("vanilla", "tract")


@dataclass(frozen=True)
class Setting:
    """What is trained: a recipe with changes, and the size of its images."""

    experiment: str
    changes: dict[str, object]
    classes: int
    channels: int
    image_size: int
    published: float | None = None  # seconds with TrAct over seconds without


_OF_8_GPUS = {"batch_size": 256}
SETTINGS = {
    "cifar_resnet": Setting("cifar_resnet", {}, 10, 3, 32),
    "cifar_vit": Setting("cifar_vit", {}, 10, 3, 32, published=1197 / 1091),
    "imagenet_resnet18": Setting("imagenet_resnet", {"model": "imagenet_resnet18"}, 1000, 3, 224),
    "imagenet_resnet50": Setting("imagenet_resnet", {"model": "imagenet_resnet50"}, 1000, 3, 224),
    "deit_small": Setting(
        "imagenet_deit", _OF_8_GPUS | {"model": "deit3_small", "recipe.pretrain_epochs": 800}, 1000, 3, 224, 1.0008
    ),
    "deit_base": Setting("imagenet_deit", _OF_8_GPUS | {"model": "deit3_base"}, 1000, 3, 192, 1.0025),
    "quickstart": Setting("quickstart", {}, 10, 1, 8),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    blocks: int  # of each method, at least 2
    steps: int  # per block
    warmup: int  # steps of each method before the first block
    batches: int  # different ones


_LEAST = Sizes(blocks=2, steps=1, warmup=0, batches=1)


@dataclass(frozen=True)
class Timing:
    """Seconds per step of every block; block i of one method was followed by block i of the other."""

    vanilla: list[float]
    tract: list[float]

    def ratio(self) -> float:
        """Median with TrAct over median without."""
        return statistics.median(self.tract) / statistics.median(self.vanilla)

    def ratio_quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the ratios of neighbouring blocks."""
        return _quartiles([slow / fast for slow, fast in zip(self.tract, self.vanilla, strict=True)])


def measure(setting: Setting, overrides: dict[str, object], sizes: Sizes) -> tuple[Timing, Config]:
    """Time both methods in blocks that take turns.

    Args:
        setting: what to train.
        overrides: values of the recipe, as on the command line.
        sizes: how much to measure.

    Returns:
        The timing, and the configuration of the run without TrAct.

    Raises:
        UserError: bad values, or values that are not the recipe's to choose.
    """
    for key in overrides:
        if key.split(".")[0] in ("method", "data", "debug", "stage"):
            raise UserError(f"{key} is fixed by what is measured; leave it out.")
    plain, _ = configs = [
        compose_config(setting.experiment, setting.changes | {"method": method} | overrides) for method in METHODS
    ]
    device = choose_device(plain.runtime.device)
    with torch_settings(plain):
        streams = [_steps(trainer_of(setting, config, sizes.batches, device)) for config in configs]
        for stream in streams:
            _seconds(stream, sizes.warmup, device)
        rounds = [[_seconds(s, sizes.steps, device) / sizes.steps for s in streams] for _ in range(sizes.blocks)]
    return Timing(*map(list, zip(*rounds, strict=True))), plain


def _steps(trainer: Trainer) -> Iterator[None]:
    """Each ``next`` is one step of the training loop, on the next batch."""
    for epoch in itertools.count():
        trainer.model.train()
        for index, batch in enumerate(trainer.batches.train(epoch)):
            trainer.step(batch, trainer.batches.global_count(index))
            trainer.progress.step += 1
            yield


def _seconds(stream: Iterator[None], steps: int, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        next(stream)
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def trainer_of(setting: Setting, config: Config, batches: int, device: torch.device) -> Trainer:
    """As a run makes it, but with synthetic images and no record."""
    data = _synthetic(setting, config, batches * config.batch_size)
    return build_trainer(config, data, Ranks(), device, StopRequest(None), RunLog(), lambda step, state: None)


def _synthetic(setting: Setting, config: Config, count: int) -> ImageData:
    draw, channels, size = torch.Generator().manual_seed(0), setting.channels, setting.image_size
    images = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=draw)
    labels = torch.randint(setting.classes, (count,), generator=draw)
    options = build(config.data)
    options = dataclasses.replace(
        options,
        image_size=size,
        mean=options.mean or [0.5] * channels,
        std=options.std or [0.25] * channels,
        augment=options.augment if options.augment in IN_BATCHES else "none",
        in_memory=True,
    )
    classes = [str(number) for number in range(setting.classes)]
    return ImageData(Split(labels, images), Split(labels[:1], images[:1]), classes, options)


# -- the table ------------------------------------------------------------------------------------

HEAD = (
    "| setting | images per step | vanilla, ms per step | TrAct, ms per step | ratio | published ratio |\n"
    "|---|---|---|---|---|---|"
)


def row(name: str, timing: Timing, config: Config) -> str:
    """One line of the table: milliseconds per step and the ratio, each a median with its quartiles."""
    published = SETTINGS[name].published
    low, high = timing.ratio_quartiles()
    cells = [
        name,
        str(config.batch_size),
        _milliseconds(timing.vanilla),
        _milliseconds(timing.tract),
        f"{timing.ratio():.3f} [{low:.3f}, {high:.3f}]",
        "–" if published is None else f"{published:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def _milliseconds(seconds: list[float]) -> str:
    low, high = _quartiles(seconds)
    return f"{1e3 * statistics.median(seconds):.2f} [{1e3 * low:.2f}, {1e3 * high:.2f}]"


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write the JSON file; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("words", nargs="*", metavar="SETTING|KEY=VALUE", help=f"settings: {', '.join(SETTINGS)}")
    for flag, default, meaning in (
        ("blocks", 20, "blocks of each method"),
        ("steps", 20, "steps per block"),
        ("warmup", 20, "steps of each method before the first block"),
        ("batches", 4, "different batches"),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--out", type=typed, help="write the seconds of every block to this JSON file")
    options = parser.parse_intermixed_args(arguments)
    try:
        sizes = Sizes(options.blocks, options.steps, options.warmup, options.batches)
        return _report(options.words, sizes, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _report(words: list[str], sizes: Sizes, out: Path | None) -> int:
    names = [word for word in words if "=" not in word] or ["cifar_resnet", "cifar_vit"]
    overrides = parse_single([word for word in words if "=" in word])
    for name in names:
        if name not in SETTINGS:
            raise UserError(f"unknown setting {name!r}; {nearest(name, SETTINGS)}.")
    for flag, least in asdict(_LEAST).items():
        if getattr(sizes, flag) < least:
            raise UserError(f"expected --{flag} to be at least {least}, got {getattr(sizes, flag)}.")
    measured, packages = {}, versions()
    for name in names:
        timing, config = measure(SETTINGS[name], overrides, sizes)
        print(row(name, timing, config) if measured else f"{HEAD}\n{row(name, timing, config)}", flush=True)
        with torch_settings(config):
            machine = hardware(choose_device(config.runtime.device))
        measured[name] = {
            **asdict(timing),
            "ratio": timing.ratio(),
            "ratio_quartiles": timing.ratio_quartiles(),
            "published_ratio": SETTINGS[name].published,
            "config": to_tree(config),
        }
    print(
        f"\nMedian [quartiles] of {sizes.blocks} blocks of {sizes.steps} steps per method, taking turns in one process "
        f"after {sizes.warmup} steps each; the ratio is that of the medians, its quartiles those of neighbouring "
        f"blocks. {machine['device']}, {machine['threads']} CPU threads, torch {packages['torch']}, "
        f"Python {packages['python']}, {config.precision.value}, deterministic kernels "
        f"{'on' if config.runtime.deterministic else 'off'}. Published: section 4.6 of arXiv 2410.23970."
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"settings": measured, "sizes": asdict(sizes), "hardware": machine, "packages": packages})
    return 0


if __name__ == "__main__":
    sys.exit(main())
