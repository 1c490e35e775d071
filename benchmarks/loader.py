"""Images a second from files to normalised batches: this repository's loader against torchvision's pipeline.

python benchmarks/loader.py --data DIR --workers 8 --batch-size 256 --images 20000

DIR has train/CLASS/*.JPEG and val/CLASS/*.JPEG. torchvision's pipeline is that of its ImageNet recipe: ImageFolder,
RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize in a DataLoader. All see the same images, batch size and
number of loader processes, which stay alive; each pass loads every image once, and the passes take turns in one
process. What has been read once is in this machine's memory: this measures processors, not disks. Where something
else runs as well, the processor time of the trainer and its loader processes tells more than the clock (Linux only).
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from experiments.data.batches import Batches
from experiments.data.imagenet import ImageNet
from experiments.data.images import ImageData, Split
from experiments.data.shards import Shards
from experiments.ranks import Ranks
from experiments.tools.shard_images import shard
from runfolder.place import cpu_name

_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
REFERENCE = "torchvision, folder"
Pass = Callable[[int], Iterator]


def main(arguments: list[str] | None = None) -> int:
    """Print images a second and ratios; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Images a second of our loader and of torchvision's ImageNet pipeline."
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with train/CLASS/ and val/CLASS/")
    parser.add_argument("--images", type=int, default=2000, help="training images in a pass (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=224, help="default: %(default)s")
    parser.add_argument("--shard-size", type=int, default=256, help="shorter side in the shards (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument(
        "--repeat", type=int, default=7, help="passes of each, after one uncounted (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="where the batches go (default: %(default)s)")
    options = parser.parse_args(arguments)
    device, load = torch.device(options.device), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        passes = dict(_contenders(options, Path(folder), device))
        passed: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
        for turn in range(options.repeat + 1):
            for name, one_pass in passes.items():
                seconds = _seconds(one_pass(turn), device)
                if turn:
                    passed[name].append(seconds)
    _report(passed, options, load)
    return 0


def _seconds(batches: Iterator, device: torch.device) -> tuple[float, float]:
    """By the clock and of processors, for one pass."""
    began, used = time.perf_counter(), _processor_seconds()
    for _ in batches:
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, _processor_seconds() - used


def _processor_seconds() -> float:
    processes = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in processes]
    return sum(int(user) + int(system) for *_, user, system in (f[:13] for f in fields)) / os.sysconf("SC_CLK_TCK")


def _contenders(options: argparse.Namespace, folder: Path, device: torch.device) -> Iterator[tuple[str, Pass]]:
    """Each contender's name and what makes one pass over the same images."""
    read = lambda root: _read(str(root), options.image_size)  # noqa: E731
    data = read(options.data)
    chosen = np.unique(np.linspace(0, len(data.train) - 1, options.images).astype(int))
    yield REFERENCE, _reference(options, chosen, device)
    folders = _only(data, chosen)
    yield "ours, folder", _ours(options, folders, device)
    yield "ours, folder, reduced_decode", _ours(options, _reduced(folders), device)
    for size in (0, options.shard_size):
        print(shard(Path(options.data), folder / str(size), size, 90, 10_000, options.workers), file=sys.stderr)
        shards = _only(read(folder / str(size)), chosen)
        name = f"ours, shards {f'of {size} pixels' if size else 'of the same bytes'}"
        yield name, _ours(options, shards, device)
        yield f"{name}, reduced_decode", _ours(options, _reduced(shards), device)


def _read(root: str, size: int) -> ImageData:
    unchecked = {"classes": None, "train_images": None, "test_images": None}
    given = {"image_size": size, "augment": "resized_crop", "mean": _MEAN, "std": _STD, "crop_ratio": 0.875}
    return ImageNet(root=root, **unchecked, **given, reduced_decode=False).load()


def _only(data: ImageData, chosen: np.ndarray) -> ImageData:
    train = data.train
    labels = train.labels[torch.from_numpy(chosen)]
    if train.shards is None:
        few = Split(labels, files=[train.files[index] for index in chosen])
    else:
        fields = {name: values[chosen] for name, values in train.shards.fields.items()}
        few = Split(labels, shards=Shards(train.shards.archives, fields))
    return dataclasses.replace(data, train=few)


def _reduced(data: ImageData) -> ImageData:
    return dataclasses.replace(data, train=dataclasses.replace(data.train, reduced_decode=True))


def _ours(options: argparse.Namespace, data: ImageData, device: torch.device) -> Pass:
    given = {"seed": 0, "drop_last": False, "overfit": None, "eval_batch_size": 1, "workers": options.workers}
    return Batches(data, batch_size=options.batch_size, ranks=Ranks(), device=device, **given).train


def _reference(options: argparse.Namespace, chosen: np.ndarray, device: torch.device) -> Pass:
    steps = [
        transforms.RandomResizedCrop(options.image_size),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(_MEAN, _STD),
    ]
    loader = DataLoader(
        Subset(ImageFolder(str(Path(options.data) / "train"), transforms.Compose(steps)), chosen.tolist()),
        batch_size=options.batch_size,
        shuffle=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=device.type == "cuda",
    )
    return lambda _: ((x.to(device, non_blocking=True), y.to(device, non_blocking=True)) for x, y in loader)


def _report(passed: dict[str, list[tuple[float, float]]], options: argparse.Namespace, load: float) -> None:
    speeds, costs = ({n: [one[i] for one in seconds] for n, seconds in passed.items()} for i in (0, 1))
    print("| loader | images/s | ratio | processor ms/image | ratio |\n|---|---|---|---|---|")
    for name in passed:
        speed = [options.images / seconds for seconds in speeds[name]]
        faster = [its / mine for mine, its in zip(speeds[name], speeds[REFERENCE], strict=True)]
        cost = [1000 * seconds / options.images for seconds in costs[name]]
        dearer = [mine / its for mine, its in zip(costs[name], costs[REFERENCE], strict=True)]
        of_medians = statistics.median(costs[name]) / statistics.median(costs[REFERENCE])
        sooner = statistics.median(speeds[REFERENCE]) / statistics.median(speeds[name])
        print(
            f"| {name} | {statistics.median(speed):.0f} ({min(speed):.0f} to {max(speed):.0f}) | "
            f"{sooner:.2f} ({min(faster):.2f} to {max(faster):.2f}) | "
            f"{statistics.median(cost):.2f} ({min(cost):.2f} to {max(cost):.2f}) | "
            f"{of_medians:.2f} ({min(dearer):.2f} to {max(dearer):.2f}) |"
        )
    print("Medians (range); ratios are of medians (range of the passes' own).")
    paths = sorted((Path(options.data) / "train").rglob("*.JPEG"))[:: max(1, options.images // 100)][:100]
    sizes = [Image.open(path).size for path in paths]
    sides = (
        f"median {statistics.median(w for w, _ in sizes):.0f}x{statistics.median(h for _, h in sizes):.0f}"
        if sizes
        else ""
    )
    bytes_ = f", {statistics.mean(path.stat().st_size for path in paths) / 1e3:.0f} kB on average" if paths else ""
    print(
        f"n = {options.repeat} passes of {options.images} images ({sides}{bytes_}), batches of {options.batch_size}, "
        f"{options.workers} loader processes, {options.image_size} px, device {options.device}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow "
        f"{PIL.__version__}; {cpu_name()}, {len(os.sched_getaffinity(0))} cores, load {load:.1f} before"
    )


if __name__ == "__main__":
    sys.exit(main())
