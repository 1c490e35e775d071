"""Everything about one run on one screen: progress, attempts, failure, output, files, ways on."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from runfolder.folder import RunFolder, relative
from runfolder.states import LIVE, State
from slurm import ledger
from slurm.facts import Run, facts, is_finite, logs_of_job, text
from slurm.ledger import Entry
from slurm.overview import command_line, span
from slurm.tail import last_lines, output_of


def details(entry: Entry, options: argparse.Namespace) -> list[str]:
    """The lines of ``show``; ``options`` as for :func:`slurm.overview.listing`."""
    run = facts(entry)
    blocks = [
        _head(entry, run),
        _attempts(entry),
        _whole_failure(run),
        _last_output(entry.folder),
        _files(entry),
        _ways_on(entry, options),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block).split("\n")


def _head(entry: Entry, run: Run) -> list[str]:
    unknown = "?" if run["damaged"] else "-"
    values = {key: round(value, 2) if is_finite(value) else unknown for key, value in run.items()}
    progress = f"step {values['step']} of {values['steps']}, epoch {values['epoch']} of {values['epochs']}"
    speed = [f"{run['primary_metric'] or 'value'} {values['value']}"]
    speed += [f"{run['images_per_second']:.0f} images/s"] if run["images_per_second"] is not None else []
    speed += [f"{span(run['seconds_left'])} left"] if run["seconds_left"] is not None else []
    speed += [f"{span(run['seconds'])} of training"] if run["seconds"] is not None else []
    lines = [
        f"run         {run['run']}",
        f"state       {run['state']}{' (' + run['reason'] + ')' if run['reason'] else ''}",
        f"folder      {relative(entry.folder)}",
        f"progress    {', '.join([progress, *speed])}",
    ]
    if run["submission"]:
        lines.append(f"submission  {run['submission']}")
    if entry.job:
        lines.append(f"job         {entry.job.id}, {entry.job.state} {entry.job.nodes}".rstrip())
    if entry.state == State.running:
        lines.append(f"trained by  {text(ledger.holder(entry.folder))}")
    return lines


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
        if last and entry.state not in (State.running, State.finished):
            began = entry.folder.last_step()
        lost = max(0, reached - began) if is_finite(reached) and is_finite(began) else None
        total += lost or 0
        outcome = attempt.get("outcome") or ("running" if last and entry.state == State.running else "cut off")
        again = f" (start {attempt['restart'] + 1})" if is_finite(attempt.get("restart")) else ""
        job = f"{attempt['job']}{again}" if attempt.get("job") else None
        steps = (attempt.get("from_step"), reached, attempt.get("saved_step"), lost)
        times = (attempt.get("started"), attempt.get("ended"))
        cells = (number, job, attempt.get("node"), *steps, outcome, *times, attempt.get("reason"))
        rows.append(tuple("-" if text(cell) is None else text(cell) for cell in cells))
    sizes = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows]
    return [*lines, f"steps that had to be repeated: {total}"]


def _whole_failure(run: Run) -> list[str]:
    failure = run["failure"]
    if failure is None:
        return []
    place = " on " + failure["host"] if failure["host"] else ""
    when = " at " + failure["when"] if failure["when"] else ""
    head = f"failure: {failure['kind']}{place}{when}: {failure['reason']}"
    return [head, *(f"  | {line}" for line in failure["traceback"])]


def _last_output(folder: RunFolder) -> list[str]:
    path = output_of(folder)
    if path is None:
        return []
    with open(path, "rb") as file:
        lines = last_lines(file, 5).decode(errors="replace").splitlines()
    return [f"the end of {path.name}:", *(f"  {text(line) or ''}" for line in lines)]


def _files(entry: Entry) -> list[str]:
    folder = entry.folder
    found = [path for path in (folder.output, folder.log) if os.path.isfile(path)] + logs_of_job(entry)
    return ["files:", *(f"  {relative(path)}" for path in found)] if found else []


def _ways_on(entry: Entry, options: argparse.Namespace) -> list[str]:
    name = entry.folder.name
    if entry.state == State.finished:
        return []
    if entry.state in LIVE:
        return [f"follow: {command_line(options, 'logs', name)}", f"stop:   {command_line(options, 'cancel', name)}"]
    script = Path(__file__).resolve().parents[1] / "experiments" / f"{entry.folder.experiment}.py"
    here = shlex.join(["python", relative(script), "--resume", relative(entry.folder)])
    again = command_line(options, "retry", name) if entry.claim.get("submission") else None
    return [*([f"submit again:  {again}"] if again else []), f"continue here: {here}"]
