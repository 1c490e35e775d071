"""What is known of one run, from its folder and Slurm's queue."""

from __future__ import annotations

import os
from typing import Any

from slurm.ledger import Entry

LIVE = ("running", "queued")
CANCELLED, FAILURE = "cancelled", "failure.json"
Run = dict[str, Any]  # what facts() gives


def facts(entry: Entry) -> Run:
    """What is known of a run, as ``--json`` gives it; None is unknown.

    ``damaged`` says that a file which should tell more cannot be read.
    """
    source, values, damaged = _told_figures(entry), {}, False
    for key in ("step", "steps", "epoch", "epochs", "score", "images_per_second", "seconds_left", "seconds"):
        value = source.get(key)
        values[key] = value if is_number(value) else None
        damaged |= value is not None and values[key] is None
    if entry.state != "running":
        values |= {"images_per_second": None, "seconds_left": None}
    name = "result.json" if entry.state == "finished" else "progress.json"
    damaged |= values["step"] is None and os.path.exists(entry.folder / name)
    failure = _failure_of(entry) if entry.state == "failed" else None
    return {
        "run": entry.folder.name,
        "experiment": entry.folder.absolute().parent.name,
        "folder": str(entry.folder),
        "state": entry.state,
        **values,
        "headline": text(source.get("headline")),
        "attempts": entry.attempts or (source["attempts"] if is_number(source.get("attempts")) else 0),
        "node": _node_of(entry, failure),
        "job": entry.task.job if entry.task else None,
        "submission": text(entry.claim.get("submission")),
        "reason": _reason_of(entry, failure),
        "failure": failure,
        "damaged": damaged,
    }


def _told_figures(entry: Entry) -> dict[str, Any]:
    """Figures of ``progress.json``, or of ``result.json`` in the same form."""
    if entry.state != "finished":
        return entry.progress
    result, metrics = entry.result, entry.result.get("metrics")
    if not isinstance(metrics, dict):
        return {}
    score = metrics.get(text(result.get("headline")))
    whole = {"step": result.get("steps"), "epoch": result.get("epochs"), "score": score}
    return result | whole


def _failure_of(entry: Entry) -> dict[str, Any]:
    said = entry.failure
    lines = said.get("traceback")
    return {
        "kind": text(said.get("kind")) or "?",
        "reason": text(said.get("reason")) or f"{FAILURE} cannot be read",
        "host": text(said.get("host")),
        "when": text(said.get("when")),
        "traceback": [text(line) or "" for line in lines] if isinstance(lines, list) else [],
    }


def _node_of(entry: Entry, failure: dict | None) -> str | None:
    if entry.task and entry.task.nodes:
        return entry.task.nodes
    if entry.state in ("finished", "queued", "missing"):
        return None
    return (failure or {}).get("host") or text(entry.progress.get("host"))


def _reason_of(entry: Entry, failure: dict | None) -> str | None:
    """Why a run is not (or no longer) computing, in a word or two."""
    if failure:
        return failure["kind"]
    if entry.state == "running":
        return "is being cancelled" if os.path.exists(entry.folder / CANCELLED) else None
    if entry.state != "queued":
        return None
    if entry.task:
        starts = "starting" if entry.task.state == "RUNNING" else entry.task.state.lower()
        return entry.task.reason or starts
    if not entry.claim.get("submitted"):
        return "being submitted"
    return "local" if entry.claim.get("scheduler") == "local" else "Slurm does not answer"


def is_number(value: object) -> bool:
    """Whether a value from a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15  # finite


def text(value: object) -> str | None:
    """A value from a file as text for one line of a terminal; None where there is none."""
    if value is None or value == "":
        return None
    return "".join(sign if sign.isprintable() else " " for sign in str(value))
