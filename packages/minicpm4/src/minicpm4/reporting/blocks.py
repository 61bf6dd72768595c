"""What a report is made of: sections of paragraphs, tables, figures and text samples."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

# One colour for each meaning, readable for the colour-blind, the same in every figure.
DENSE, SPARSE, TERNARY, GOOD, POOR = "#3b6ea8", "#d1772a", "#7b529c", "#3b8a5a", "#b0413e"


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str
    kind: str = "paragraph"


@dataclass(frozen=True)
class Table:
    """Rows of values; numbers are formatted by `number` and set to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """An SVG drawing and what it shows."""

    svg: str
    caption: str
    kind: str = "figure"


@dataclass(frozen=True)
class Samples:
    """Pieces of text, each with a label, in a fixed-width frame."""

    items: Sequence[tuple[str, str]]
    caption: str = ""
    kind: str = "samples"


@dataclass(frozen=True)
class Section:
    """One stage in the report.

    `headline` is (value, what it is) for the row of figures at the top of the page.
    """

    name: str
    title: str
    summary: str
    headline: tuple[str, str]
    blocks: Sequence[Paragraph | Table | Figure | Samples]
    facts: dict[str, Any] = field(default_factory=dict)


def number(value: Any) -> str:
    """A value as a reader wants it: thousands apart, three or four digits that mean something."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    if isinstance(value, float):
        if abs(value) >= 1000:
            return f"{value:,.0f}".replace(",", "\u202f")
        return f"{value:.4g}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def svg(figure: MatplotlibFigure) -> str:
    """A matplotlib figure as an inline `<svg>` element, the same bytes for the same drawing."""
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt and no date: the report of an unchanged run does not change.
    with matplotlib.rc_context({"svg.hashsalt": "minicpm4", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def new_figure(width: float = 6.4, height: float = 3.2) -> tuple[MatplotlibFigure, Any]:
    """An empty figure with one axis, drawn without a window system."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(width, height))
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axis
