"""Parts of a page that needs no network: notes, tables, figures, and the page around them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["figure_part", "note", "table", "write_page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1240px; padding: 0 1rem;
       color: #1c1f26; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e3e6ec; }
th:first-child, td:first-child, .text { text-align: left; }
td.text { font-size: .85rem; max-width: 46rem; overflow-wrap: anywhere; }
table.small { font-size: .85rem; } td.kept { color: #9aa0ab; }
tr.best td { font-weight: 600; background: #f2f7fd; } p.note { color: #555b66; }
"""

LONG = 24
"""Characters above which a cell is a text and no number."""


def note(text: str) -> str:
    """A paragraph in gray."""
    return f'<p class="note">{html.escape(text)}</p>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool]) -> str:
    """Rows below headings; the marked ones are bold, columns of long texts stand left."""
    wordy = [any(len(row[i]) > LONG for row in rows) for i in range(len(headings))]
    kinds = [" class=text" if words else "" for words in wordy]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(kinds, cells, strict=True)
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in pairs)

    body = [
        f"<tr{' class=best' if mark else ''}>{line('td', row)}</tr>"
        for row, mark in zip(rows, marked, strict=True)
    ]
    head = line("th", headings)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def figure_part(figure: Figure, *, first: bool) -> str:
    """A figure as HTML; the first of a page brings the drawing code along."""
    return str(figure.to_html(full_html=False, include_plotlyjs=first))


def write_page(path: Path, title: str, parts: Sequence[str]) -> Path:
    """Write a page of parts below its title; return its path."""
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    body = f"<h1>{html.escape(title)}</h1>" + "\n".join(parts)
    page = f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>"
    path.write_text(page, encoding="utf-8")
    return path
