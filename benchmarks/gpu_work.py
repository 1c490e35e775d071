"""What `benchmarks/gpu.py` measures, each in a process of its own.

python benchmarks/gpu_work.py NAME OPTIONS

NAME is a key of ``WORK``, OPTIONS its arguments as JSON; the answer is the last line, as JSON. Images are synthetic.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import gc
import hashlib
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from experiments.config import compose_config
from experiments.runtime import METHODS, SETTINGS, Sizes, _synthetic, _wait, measure, trainer_of
from experiments.training.loop import Trainer
from experiments.training.provenance import hardware, versions
from experiments.training.torch_settings import torch_settings

_BATCHES = 8  # different ones
_MEMORY_STEPS = 6  # enough for compile=graph to have recorded a step, which holds memory of its own


def machine(device: str) -> dict:
    """What it is measured on."""
    found = hardware(torch.device(device)) | {"packages": versions()}
    if device != "cpu":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        found |= {"capability": capability, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def digests(
    device: str, families: dict[str, tuple[str, dict]], begin: int, end: int, states: str, leaves: bool
) -> dict[str, str]:
    """SHA-256 of what a checkpoint holds of each family's run after step ``end``.

    Args:
        device: where it trains.
        families: {name: (setting of ``experiments/runtime.py``, overrides)}.
        begin: the step to go on from, with the state that another process has left; 0 begins.
        end: the last step.
        states: the folder where states are left.
        leaves: whether to leave the state after step ``end``.
    """
    found = {}
    for name, (setting, overrides) in families.items():
        path = Path(states) / name.replace(" ", "-")
        trainer = _trainer_on(device, setting, {"method": "tract"} | overrides)
        if begin:
            trainer.load_state(torch.load(f"{path}-{begin}.pt", map_location=device, weights_only=False))
        _train(trainer, end)
        state = trainer.state()
        if leaves:
            torch.save(state, f"{path}-{end}.pt")
        found[name] = digest({key: state[key] for key in ("model", "optimizer", "scaler")})
    return found


def digest(tree: object) -> str:
    """SHA-256 of all tensors' bytes, and of everything else as text."""
    sha = hashlib.sha256()
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            sha.update(leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
            leaf = (leaf.dtype, tuple(leaf.shape))
        sha.update(repr(leaf).encode())
    return sha.hexdigest()


def overhead(device: str, setting: str, overrides: dict, sizes: dict[str, int]) -> dict[str, float]:
    """A step with TrAct against one without: the ratio of their times minus one, and what a GPU's memory holds more."""
    timing, _ = measure(SETTINGS[setting], {"runtime.device": device} | overrides, Sizes(**sizes))
    low, high = timing.ratio_quartiles()
    milliseconds = 1e3 * statistics.median(timing.vanilla)
    found = {"overhead": timing.ratio() - 1, "low": low - 1, "high": high - 1, "vanilla_milliseconds": milliseconds}
    if device == "cpu":
        return found
    plain, wrapped = (_peak_mib(device, setting, overrides | {"method": method}) for method in METHODS)
    return found | {"extra_mib": wrapped - plain}


def harness(device: str, setting: str, overrides: dict, images: int, workers: int, turns: int) -> dict[str, float]:
    """Images a second of whole epochs here and of a plain script with a DataLoader, which take turns; medians."""
    kinds = {"harness": False} | ({"harness, graph": "graph"} if device != "cpu" else {})
    sides: dict[str, Callable[[], int]] = {"plain script": _plain_script(device, setting, overrides, images, workers)}
    for kind, mode in kinds.items():
        sides[kind] = _epochs(_trainer_on(device, setting, overrides | {"compile": mode}, images))
    for epoch in sides.values():
        epoch()
    speeds = {name: [] for name in sides}
    for _ in range(turns):
        for name, epoch in sides.items():
            speeds[name].append(_images_per_second(epoch, device))
    return {name: statistics.median(values) for name, values in speeds.items()}


def side_by_side(device: str, setting: str, overrides: dict, images: int, together: int, ready: str) -> float:
    """Images a second of one of several processes, whose clocks begin when the last of them is ready."""
    epoch = _epochs(_trainer_on(device, setting, overrides, images))
    epoch()
    _wait(torch.device(device))
    Path(ready).touch()
    while len(list(Path(ready).parent.iterdir())) < together:
        time.sleep(0.01)
    return _images_per_second(epoch, device)


WORK = {work.__name__: work for work in (machine, digests, overhead, harness, side_by_side)}


# -- training -------------------------------------------------------------------------------------


def _trainer_on(device: str, setting: str, overrides: dict, images: int | None = None) -> Trainer:
    """As ``experiments/runtime.py`` makes it."""
    of = SETTINGS[setting]
    config = compose_config(of.experiment, of.changes | {"runtime.device": device} | overrides)
    batches = _BATCHES if images is None else images // config.batch_size
    with torch_settings(config):
        return trainer_of(of, config, batches, torch.device(device))


def _train(trainer: Trainer, end: int) -> None:
    """As the loop does, up to step ``end``, without records, evaluations and checkpoints."""
    with torch_settings(trainer.config):
        while trainer.progress.step < end:
            epoch, first = divmod(trainer.progress.step, trainer.batches.steps_per_epoch)
            trainer.model.train()
            last = min(trainer.batches.steps_per_epoch, first + end - trainer.progress.step)
            for index, batch in zip(range(first, last), trainer.batches.train(epoch, first), strict=False):
                trainer.step(batch, trainer.batches.global_count(index))
                trainer.progress.step += 1


def _epochs(trainer: Trainer) -> Callable[[], int]:
    def epoch() -> int:
        steps = trainer.batches.steps_per_epoch
        _train(trainer, trainer.progress.step + steps)
        return steps * trainer.config.batch_size

    return epoch


def _images_per_second(epoch: Callable[[], int], device: str) -> float:
    _wait(torch.device(device))
    began = time.perf_counter()
    images = epoch()
    _wait(torch.device(device))
    return images / (time.perf_counter() - began)


def _peak_mib(device: str, setting: str, overrides: dict) -> float:
    gc.collect()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _train(_trainer_on(device, setting, overrides), _MEMORY_STEPS)
    return (torch.cuda.max_memory_allocated() - held) / 2**20


# -- what others do -------------------------------------------------------------------------------


class _Images(Dataset):
    """As torchvision's CIFAR-10: one image after the other through Pillow."""

    def __init__(self, images: Tensor, labels: Tensor, mean: list[float], std: list[float]):
        self._images, self._labels = images.movedim(1, 3).numpy(), labels.tolist()
        size = images.shape[-1]
        whole = [transforms.ToPILImage(), transforms.RandomCrop(size, 4), transforms.RandomHorizontalFlip()]
        self._transform = transforms.Compose([*whole, transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._images[index]), self._labels[index]


def _plain_script(device: str, setting: str, overrides: dict, images: int, workers: int) -> Callable[[], int]:
    """Epochs of the same network on the same images as tutorials train it: DataLoader, SGD, cross-entropy."""
    trainer = _trainer_on(device, setting, overrides, images)
    config, model = trainer.config, trainer.model
    count = images // config.batch_size * config.batch_size
    data = _synthetic(SETTINGS[setting], config, count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pinned, kept = device != "cpu", workers > 0
    loader = DataLoader(
        _Images(data.train.images, data.train.labels, data.options.mean, data.options.std),
        config.batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=pinned,
        persistent_workers=kept,
    )

    def epoch() -> int:
        model.train()
        for batch, labels in loader:
            batch, labels = batch.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels).backward()
            optimizer.step()
        return count

    return epoch


def main(name: str, options: str) -> int:
    """Do it and print the answer; returns the exit code."""
    print(json.dumps(WORK[name](**json.loads(options))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
