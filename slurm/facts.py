"""What is known of one run, from its folder and Slurm's queue."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from runfolder.folder import relative
from runfolder.records import is_number
from runfolder.states import State, is_cancelled
from runfolder.tickets import modified, now_in
from slurm.ledger import Entry
from slurm.queue import QueuedJob

Run = dict[str, Any]  # what facts() gives
_MINUTES_TO_START = 10  # without a word from a job; its run may be importing torch, or copying data


def facts(entry: Entry) -> Run:
    """What is known of a run, as ``--json`` gives it; None is unknown.

    ``damaged`` says that a file which should tell more cannot be read.
    """
    source, values, damaged = _told_figures(entry), {}, False
    for key in ("step", "steps", "epoch", "epochs", "value", "images_per_second", "seconds_left", "seconds"):
        value = source.get(key)
        values[key] = value if is_finite(value) else None
        damaged |= value is not None and values[key] is None
    if entry.state != State.running:
        values |= {"images_per_second": None, "seconds_left": None}
    told = entry.folder.result if entry.state == State.finished else entry.folder.progress
    damaged |= values["step"] is None and os.path.exists(told)
    failure = _failure_of(entry) if entry.state == State.failed else None
    return {
        "run": entry.folder.name,
        "experiment": entry.folder.experiment,
        "folder": str(entry.folder),
        "state": entry.state,
        **values,
        "primary_metric": text(source.get("primary_metric")),
        "attempts": entry.attempts or (source["attempts"] if is_finite(source.get("attempts")) else 0),
        "node": _node_of(entry, failure),
        "job": entry.job.id if entry.job else None,
        "submission": text(entry.claim.get("submission")),
        "reason": _reason_of(entry, failure),
        "failure": failure,
        "damaged": damaged,
    }


def _told_figures(entry: Entry) -> dict[str, Any]:
    """Figures of ``progress.json``, or of ``result.json`` in the same form."""
    if entry.state != State.finished:
        return entry.progress
    result, metrics = entry.result, entry.result.get("metrics")
    if not isinstance(metrics, dict):
        return {}
    value = metrics.get(text(result.get("primary_metric")))
    whole = {"step": result.get("steps"), "epoch": result.get("epochs"), "value": value}
    return result | whole


def _failure_of(entry: Entry) -> dict[str, Any]:
    failure = entry.failure
    lines = failure.get("traceback")
    return {
        "kind": text(failure.get("kind")) or "?",
        "reason": text(failure.get("reason")) or f"{entry.folder.failure.name} cannot be read",
        "host": text(failure.get("host")),
        "when": text(failure.get("when")),
        "traceback": [text(line) or "" for line in lines] if isinstance(lines, list) else [],
    }


def _node_of(entry: Entry, failure: dict | None) -> str | None:
    if entry.job and entry.job.nodes:
        return entry.job.nodes
    if entry.state in (State.finished, State.queued, State.missing):
        return None
    return (failure or {}).get("host") or text(entry.progress.get("host"))


def _reason_of(entry: Entry, failure: dict | None) -> str | None:
    """Why a run is not (or no longer) computing, in a word or two."""
    if failure:
        return failure["kind"]
    if entry.state == State.running:
        return "is being cancelled" if is_cancelled(entry.folder) else None
    if entry.state != State.queued:
        return None
    if entry.job:
        waits = _life_of(entry, entry.job) if entry.job.state == "RUNNING" else entry.job.state.lower()
        return entry.job.reason or waits
    if not entry.claim.get("submitted"):
        return "being submitted"
    return "local" if entry.claim.get("scheduler") == "local" else "Slurm does not answer"


def _life_of(entry: Entry, job: QueuedJob) -> str:
    """What can be told of a run that has not begun although its job has."""
    logs, now = logs_of_job(entry), now_in(entry.folder.runs)
    said = [now - modified(path) for path in (*logs, entry.folder.output) if path.is_file()]
    silent = min([job.seconds or 0, *said])
    if silent < 60 * _MINUTES_TO_START:
        return "starting"
    return f"hanging? no sign of life for {silent / 60:.0f} min, see {relative(logs[-1] if logs else entry.folder)}"


def logs_of_job(entry: Entry) -> list[Path]:
    """What the job that trains a run has printed, else the folder where it would be; none without a submission."""
    submission = entry.claim.get("submission")
    if not submission:
        return []
    jobs, job = entry.folder.submissions / submission / "jobs", entry.claim.get("job")
    job = job or (entry.job.id if entry.job else None)
    return sorted(jobs.glob(f"{job}_*_log.*")) or ([jobs] if jobs.is_dir() else [])


def is_finite(value: object) -> bool:
    """Whether a value from a file is a finite number."""
    return is_number(value) and abs(value) < 1e15


def text(value: object) -> str | None:
    """A value from a file as text for one line of a terminal; None where there is none."""
    if value is None or value == "":
        return None
    return "".join(sign if sign.isprintable() else " " for sign in str(value))
