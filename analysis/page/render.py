"""The page as one text: template, styles, script and runs, with a policy that forbids everything else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis.page.parts import Section

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Head:
    """What stands at the top of the page."""

    title: str
    intro: str
    facts: tuple[tuple[str, tuple[str, ...]], ...]  # (name, words)


def render_page(head: Head, sections: Sequence[Section], runs: Sequence[str]) -> str:
    """The whole page; nothing in it is fetched from anywhere.

    Args:
        head: its top.
        sections: in their order.
        runs: ``packed`` runs by their numbers.
    """
    style, script = (Markup((_HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))  # noqa: S704
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    jinja = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = jinja.get_template("page.html")
    return template.render(head=head, sections=sections, runs=runs, style=style, script=script, policy=policy)


def _digest(text: str) -> str:
    """How a content security policy names an inline text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
