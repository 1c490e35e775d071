"""Everything about one run on one screen: progress, attempts, failure, output, files, ways on."""

from __future__ import annotations

import argparse
import os
import shlex
from contextlib import suppress
from pathlib import Path

from experiments.training.files import read_json
from experiments.training.lease import describe, highest
from slurm import ledger
from slurm.facts import LIVE, Run, facts, is_number, text
from slurm.ledger import Entry
from slurm.listing import shown, span, typed
from slurm.tail import last_lines, output_of


def details(entry: Entry, options: argparse.Namespace) -> list[str]:
    """The lines of ``show``; ``options`` as for :func:`slurm.listing.listing`."""
    said = facts(entry)
    blocks = [
        _head(entry, said),
        _attempts(entry),
        _whole_failure(said),
        _last_output(entry.folder),
        _files(entry),
        _ways_on(entry, options),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block).split("\n")


def _head(entry: Entry, said: Run) -> list[str]:
    unknown = "?" if said["damaged"] else "-"
    values = {key: round(value, 2) if is_number(value) else unknown for key, value in said.items()}
    progress = f"step {values['step']} of {values['steps']}, epoch {values['epoch']} of {values['epochs']}"
    speed = [f"{said['headline'] or 'score'} {values['score']}"]
    speed += [f"{said['images_per_second']:.0f} images/s"] if said["images_per_second"] is not None else []
    speed += [f"{span(said['seconds_left'])} left"] if said["seconds_left"] is not None else []
    speed += [f"{span(said['seconds'])} of training"] if said["seconds"] is not None else []
    lines = [
        f"run         {said['run']}",
        f"state       {said['state']}{' (' + said['reason'] + ')' if said['reason'] else ''}",
        f"folder      {shown(entry.folder)}",
        f"progress    {', '.join([progress, *speed])}",
    ]
    if said["submission"]:
        lines.append(f"submission  {said['submission']}")
    if entry.task:
        lines.append(f"job         {entry.task.job}, {entry.task.state} {entry.task.nodes}".rstrip())
    if entry.state == "running":
        lines.append(f"trained by  {holder(entry.folder)}")
    return lines


def holder(folder: Path) -> str:
    """Who trains a run, by its lease; ? where that cannot be read."""
    path = highest(folder / "lease")[1]
    with suppress(KeyError, TypeError):
        return text(describe(read_json(path) if path else {})) or "?"
    return "?"


def _attempts(entry: Entry) -> list[str]:
    """A table of all attempts; lost steps are those that the next attempt had to repeat."""
    attempts = ledger.attempts(entry.folder)
    if not attempts:
        return []
    rows = [("attempt", "job", "node", "from", "reached", "saved", "lost", "outcome", "started", "ended", "reason")]
    total = 0
    for number, attempt in enumerate(attempts, start=1):
        last = number == len(attempts)
        reached = attempt.get("reached_step")
        if last and reached is None:
            reached = entry.progress.get("step")
        began = None if last else attempts[number].get("from_step")
        if last and entry.state not in ("running", "finished"):
            began = ledger.last_step(entry.folder)
        lost = max(0, reached - began) if is_number(reached) and is_number(began) else None
        total += lost or 0
        outcome = attempt.get("outcome") or ("running" if last and entry.state == "running" else "cut off")
        again = f" (start {attempt['restart'] + 1})" if is_number(attempt.get("restart")) else ""
        job = f"{attempt['job']}{again}" if attempt.get("job") else None
        steps = (attempt.get("from_step"), reached, attempt.get("saved_step"), lost)
        times = (attempt.get("started"), attempt.get("ended"))
        cells = (number, job, attempt.get("node"), *steps, outcome, *times, attempt.get("reason"))
        rows.append(tuple("-" if text(cell) is None else text(cell) for cell in cells))
    sizes = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows]
    return [*lines, f"steps that had to be repeated: {total}"]


def _whole_failure(said: Run) -> list[str]:
    failure = said["failure"]
    if failure is None:
        return []
    place = " on " + failure["host"] if failure["host"] else ""
    when = " at " + failure["when"] if failure["when"] else ""
    head = f"failure: {failure['kind']}{place}{when}: {failure['reason']}"
    return [head, *(f"  | {line}" for line in failure["traceback"])]


def _last_output(folder: Path) -> list[str]:
    path = output_of(folder)
    if path is None:
        return []
    with open(path, "rb") as file:
        lines = last_lines(file, 5).decode(errors="replace").splitlines()
    return [f"the end of {path.name}:", *(f"  {text(line) or ''}" for line in lines)]


def _files(entry: Entry) -> list[str]:
    folder = entry.folder
    found = [folder / name for name in ("output.txt", "log.txt") if os.path.isfile(folder / name)]
    submission = entry.claim.get("submission")
    if isinstance(submission, str) and submission:
        jobs = folder.absolute().parent / ledger.SUBMISSIONS / submission / "jobs"
        job = entry.claim.get("job") or (entry.task.job if entry.task else None)
        logs = sorted(jobs.glob(f"{job}_*_log.*")) if isinstance(job, str) else []
        found += logs or ([jobs] if jobs.is_dir() else [])
    return ["files:", *(f"  {shown(path)}" for path in found)] if found else []


def _ways_on(entry: Entry, options: argparse.Namespace) -> list[str]:
    name = entry.folder.name
    if entry.state == "finished":
        return []
    if entry.state in LIVE:
        return [f"follow: {typed(options, 'logs', name)}", f"stop:   {typed(options, 'cancel', name)}"]
    script = Path(__file__).resolve().parents[1] / "experiments" / f"{entry.folder.absolute().parent.name}.py"
    here = shlex.join(["python", shown(script), "--resume", shown(entry.folder)])
    again = typed(options, "retry", name) if entry.claim.get("submission") else None
    return [*([f"submit again:  {again}"] if again else []), f"continue here: {here}"]
