"""Compares our learning-rate schedule with recorded rates of OIALR's trainer (arXiv 2401.08505), case by case."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.training.schedule import TimmCosine

KIND = "lr_schedule"


def check(case: dict, folder: Path) -> list[str]:
    """What of a case our code computes otherwise; nothing where all agrees."""
    if case["kind"] != KIND:
        return [f"unknown kind {case['kind']!r}"]
    config = case["config"]
    if config["schedule"]["sched"] != "cosine":
        return [f"expected sched cosine, got {config['schedule']['sched']!r}"]
    schedule, run = schedule_of(config), config["epochs"]
    disagreements = []
    if "effective_epochs" in config and schedule.cycle_epochs(run) != config["effective_epochs"]:
        expected, got = config["effective_epochs"], schedule.cycle_epochs(run)
        disagreements.append(f"effective_epochs: expected {expected}, got {got:g}")
    with np.load(Path(folder) / case["file"]) as file:
        recorded = np.array(file["lrs"], dtype=np.float64)
    per_epoch = config["updates_per_epoch"]
    steps = range(len(recorded))  # one more than the run's updates, or longer: entry n follows n updates
    ours = np.array([config["lr"] * schedule.factor(step, per_epoch, run * per_epoch) for step in steps])
    apart = np.abs(ours - recorded)
    if not config["schedule"].get("sched_on_updates", False):
        # Between an epoch's last update and its end the trainer still has the epoch's rate.
        late = np.maximum(np.arange(len(recorded)) - 1, 0)
        apart = min(apart, np.abs(ours[late] - recorded), key=np.max)
    if not apart.max() <= case.get("tolerance_abs", 1e-9):
        worst = int(apart.argmax())
        disagreements.append(f"lrs: largest difference {apart[worst]:.3g}, after {worst} updates")
    return disagreements


def schedule_of(config: dict) -> TimmCosine:
    """Ours with the options of a case; what it leaves out has timm's default."""
    options = config["schedule"]
    return TimmCosine(
        lr=config["lr"],
        epochs=options["epochs"],
        warmup_epochs=options.get("warmup_epochs", 5),
        warmup_lr=options.get("warmup_lr", 1e-5),
        warmup_prefix=options.get("warmup_prefix", False),
        min_lr=options.get("min_lr", 0.0),
        cycle_mul=options.get("lr_cycle_mul", 1.0),
        cycle_limit=options.get("lr_cycle_limit", 1),
        cycle_decay=options.get("lr_cycle_decay", 0.1),
        k_decay=options.get("lr_k_decay", 1.0),
        cooldown_epochs=options.get("cooldown_epochs", 0),
        on_updates=options.get("sched_on_updates", False),
    )
