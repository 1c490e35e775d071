"""Synthetic run folders with known numbers, written by TensorBoard's own writers."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from runfolder import naming
from runfolder.folder import RunFolder

ATTEMPT = {
    "started": "2025-01-01T00:00:00+00:00",
    "commit": "0123456789abcdef",
    "dirty": False,
    "command": "python experiments/demo.py",
    "packages": {"torch": "2.15.0"},
    "hardware": {"device": "cpu"},
    "resumed_from_step": 0,
}


def configuration(seed=0, method="vanilla", epochs=5, model="small", lr=0.1, **top):
    options = method if isinstance(method, dict) else {"name": method}
    return {
        "experiment": "demo",
        "seed": seed,
        "epochs": epochs,
        "batch_size": 128,
        "model": {"name": model, "_target_": f"models.{model}", "depth": len(model)},
        "data": {"name": "digits", "root": "data"},
        "method": {"_target_": f"methods.{options['name']}", **options},
        "optim": {"name": "sgd", "lr": lr, "betas": [0.9, 0.99]},
        "schedule": {"name": "cosine"},
        "runtime": {"device": "cpu", "workers": seed, "data_dir": "data"},
        **top,
    }


def curve(seed, method, epochs=5, level=70.0):
    """A deterministic curve of accuracies, different for every seed and method."""
    digest = hashlib.sha256(f"{seed} {method} {level}".encode()).digest()
    noise = np.random.default_rng(list(digest)).normal(size=epochs)
    return [float(v) for v in level + np.arange(epochs) + noise]


def folder_name(config):
    """Ends, as training names it, in the hash of the configuration."""
    return f"{config['model']['name']}-{config['method']['name']}-s{config['seed']}-{naming.config_hash(config)}"


def write_hparams(folder, config):
    """An event file that holds the configuration, as training begins its first one."""
    with SummaryWriter(str(folder)) as writer:
        for summary in hparams(naming.hyper_parameters(config), {"test/top1": 0.0}):
            writer.file_writer.add_summary(summary)


def write_run(runs, config, top1, finished=True, attempts=(ATTEMPT,), experiment="demo", result=None, failure=None):
    """A run folder; ``top1`` are the accuracies of epochs 1, 2, ...; returns its path."""
    folder = _begin(runs, config, attempts, experiment)
    with SummaryWriter(str(folder)) as writer:
        for epoch, value in enumerate(top1, start=1):
            for step in range(10 * epoch - 10, 10 * epoch):
                writer.add_scalar("train/loss", 1 / (step + 1), step)
            writer.add_scalar("test/top1", value, epoch)
            writer.add_scalar("test/loss", 1 - value / 100, epoch)
    if finished:
        _finish(folder, config, {"test/top1": top1[-1]} if len(top1) else {}, result)
    if failure is not None:
        RunFolder(folder).failure.write_text(json.dumps(failure))
    return folder


def write_final(runs, config, metrics, attempts=(ATTEMPT,)):
    """A finished run that has only been evaluated at its end; ``metrics`` are {tag: value}; returns its path.

    Its configuration should have ``eval_every`` of at least its epochs.
    """
    folder = _begin(runs, config, attempts, config["experiment"])
    with SummaryWriter(str(folder)) as writer:
        for tag, value in metrics.items():
            writer.add_scalar(tag, value, config["epochs"])
    _finish(folder, config, metrics)
    return folder


def _begin(runs, config, attempts, experiment):
    config = config | {"experiment": experiment}
    folder = Path(runs) / experiment / folder_name(config)
    folder.mkdir(parents=True)
    RunFolder(folder).config.write_text(yaml.safe_dump(config))
    RunFolder(folder).provenance.write_text(json.dumps({"attempts": list(attempts)}))
    return folder


def _finish(folder, config, metrics, changes=None):
    content = {
        "config_hash": naming.hash_in(folder.name),
        "epochs": config["epochs"],
        "metrics": metrics,
        "attempts": 1,
    }
    RunFolder(folder).result.write_text(json.dumps(content | (changes or {})))


def event_file(folder):
    (path,) = RunFolder(folder).events
    return path


def write_events(path, events):
    """An event file of exactly these events, framed by TensorBoard's own record writer."""
    with open(path, "wb") as file:
        writer = RecordWriter(file)
        for event in [Event(wall_time=1.0, file_version="brain.Event:2"), *events]:
            writer.write(event.SerializeToString())


def record_offsets(path):
    """The first byte of every record, and the size of the file."""
    content = path.read_bytes()
    offsets = [0]
    while offsets[-1] < len(content):
        (length,) = struct.unpack_from("<Q", content, offsets[-1])
        offsets.append(offsets[-1] + 8 + 4 + length + 4)
    return offsets
