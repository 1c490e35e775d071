"""What a page is made of. Whoever has a table or a figure to show makes these; the template knows nothing else."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from analysis.drawing import make_drawable
from analysis.grouping import ABSENT

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# The colours of analysis/figures.py as the page's own, so that a figure is readable in either scheme.
_COLOURS = {
    "#000000": "currentColor",
    "#ffffff": "var(--page)",
    "#dddddd": "var(--rule)",
    "#d55e00": "var(--line-1)",
    "#0072b2": "var(--line-2)",
    "#009e73": "var(--line-3)",
    "#cc79a7": "var(--line-4)",
    "#e69f00": "var(--line-5)",
    "#56b4e9": "var(--line-6)",
}


@dataclass(frozen=True)
class Link:
    """The way to a run, by its number on the page."""

    text: str
    run: int


@dataclass(frozen=True)
class Entry:
    """One cell of a table.

    Args:
        text: what it says.
        value: what it is sorted by; None: its text.
        links: its runs, shown when it is opened.
        opens: number of the run that it stands for.
    """

    text: str
    value: float | None = None
    links: tuple[Link, ...] = ()
    opens: int | None = None

    @property
    def key(self) -> float | str:
        """What it is sorted by; empty where there is nothing, which comes last."""
        if self.value is not None:
            return self.value
        return "" if self.text.startswith(ABSENT) else self.text


@dataclass(frozen=True)
class Grid:
    """A table that can be sorted, with a sentence or two above it."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    filter: str = ""  # the label of a field to filter its rows by, if it has one

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold nothing but numbers."""
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.columns)
        return tuple(all(not isinstance(entry.key, str) or entry.key == "" for entry in column) for column in columns)


@dataclass(frozen=True)
class Picture:
    """A figure as SVG, with the words that stand for it."""

    alt: str
    svg: Markup


@dataclass(frozen=True)
class Group:
    """Sentences under a heading."""

    title: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A part of the page: its parts are shown in this order."""

    title: str
    intro: tuple[str, ...] = ()
    grids: tuple[Grid, ...] = ()
    pictures: tuple[Picture, ...] = ()
    groups: tuple[Group, ...] = ()
    holds_runs: bool = False  # whether opened runs are shown here


def picture(figure: Figure, name: str, alt: str) -> Picture:
    """A matplotlib figure as SVG within the page: text stays text, and colours follow the page's scheme.

    Args:
        figure: the figure; it stays open.
        name: unique on the page; every id in the figure begins with it.
        alt: what the figure shows, in words.
    """
    make_drawable(figure)
    text = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(text.getvalue())
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    for element in root.iter():
        _attributes_for_style(element)
        _own_ids(element, name)
    root.attrib |= {"role": "img", "aria-label": alt, "fill": "currentColor"}
    ElementTree.register_namespace("", _SVG)
    return Picture(alt, Markup(ElementTree.tostring(root, encoding="unicode")))  # noqa: S704


def _attributes_for_style(element: ElementTree.Element) -> None:
    """The page's policy allows no style attributes; each of SVG's properties is an attribute too."""
    for declaration in element.attrib.pop("style", "").split(";"):
        name, _, value = declaration.partition(":")
        if name.strip() and name.strip() != "font-family":
            value = value.strip()
            element.set(name.strip(), _COLOURS.get(value, value))


def _own_ids(element: ElementTree.Element, name: str) -> None:
    target = element.attrib.pop(f"{{{_XLINK}}}href", None)
    if target is not None:
        element.set("href", re.sub("^#", f"#{name}-", target))
    for key, value in element.attrib.items():
        element.set(key, f"{name}-{value}" if key == "id" else value.replace("url(#", f"url(#{name}-"))
