"""
A comparison of switch strategies as a picture: one panel for each kind of CPU and workload, one bar for each strategy.

Plain SVG, written by hand: bars and labels need no library. A bar is divided as the cost is: entry, exit, trapped
accesses, the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from hwbp.kvm import Row

LABEL, BAR, NUMBER = 190, 420, 80  # widths in pixels, from left to right
LINE, TITLE, GAP = 16, 26, 14  # heights
PARTS: Final = (
    ("entry", "#4c78a8"),
    ("exit", "#72b7b2"),
    ("accesses", "#e45756"),
    ("rest", "#bab0ac"),
)


def svg(rows: Sequence[Row]) -> str:
    """Return the picture; panels in the order of the rows, each with a scale of its own."""
    shapes, y = _legend(), TITLE + GAP
    for (model, workload), group in groupby(rows, key=lambda row: (row.model, row.workload)):
        own = sorted(group, key=lambda row: row.cost)
        most = max(row.cost for row in own) or 1
        shapes.append(_text(4, y + LINE, f"{model}, {workload}: {own[0].unit} for an interval", "title"))
        y += TITLE
        for row in own:
            shapes += _bar(row, y, BAR / most)
            y += LINE
        y += GAP
    width = LABEL + BAR + NUMBER
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}">'
    style = "<style>text { font: 11px sans-serif } .title { font-weight: bold } .end { text-anchor: end }</style>"
    return "\n".join([head, style, '<rect width="100%" height="100%" fill="white"/>', *shapes, "</svg>", ""])


def _legend() -> list[str]:
    shapes = []
    for place, (part, colour) in enumerate(PARTS):
        x = LABEL + 90 * place
        shapes += [f'<rect x="{x}" y="8" width="10" height="10" fill="{colour}"/>', _text(x + 14, 17, part)]
    return shapes


def _bar(row: Row, y: int, scale: float) -> list[str]:
    shapes = [_text(LABEL - 6, y + 11, row.strategy, "end")]
    x = float(LABEL)
    for part, colour in PARTS:
        width = getattr(row, part) * scale
        if width > 0:
            shapes.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LINE - 4}" fill="{colour}"/>')
        x += width
    return [*shapes, _text(x + 4, y + 11, f"{row.cost:.0f}")]


def _text(x: float, y: int, text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y}"{attribute}>{escape(text)}</text>'
