"""A page: its frame, its scripts, and the data that they draw; as files beside each other or as one file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

ASSETS = ("site.css", "base.js", "timeline.js", "walk.js", "questions.js")
_PAINTED_FIRST = (
    "try{t=localStorage.getItem('fasim.theme')}catch(e){t=null}"
    "document.documentElement.dataset.theme=t||(matchMedia('(prefers-color-scheme: dark)').matches?'dark':'light')"
)
"""Before anything is painted, so that a dark page does not flash."""


def asset(name: str) -> str:
    """The text of one of ASSETS."""
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def page(title: str, body: str, data: dict, links: Iterable[tuple[str, str]] = (), alone: bool = False, foot: str = "") -> str:
    """A document. `alone` holds style and scripts in itself; otherwise they lie beside it, as `links` to other pages do."""
    scripts = [name for name in ASSETS if name.endswith(".js")]
    if alone:
        style = f"<style>\n{asset('site.css')}</style>"
        code = "".join(f"<script>\n{asset(name)}</script>\n" for name in scripts)
    else:
        style = '<link rel="stylesheet" href="site.css">'
        code = "".join(f'<script src="{name}"></script>\n' for name in scripts)
    nav = "".join(f'<a href="{escape(href)}">{escape(text)}</a>' for text, href in links)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<script>{_PAINTED_FIRST}</script>
{style}
</head>
<body>
<header><span class="name">fasim</span><nav>{nav}</nav><button type="button" id="theme">theme</button></header>
<main>
{body}
</main>
<footer>{foot}</footer>
<script type="application/json" id="data">{_data(data)}</script>
{code}</body>
</html>
"""


def _data(data: dict) -> str:
    """As JSON in which nothing can be taken for a tag."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a column whose name starts with ">" is aligned right. Cells are HTML already."""
    right = [' class="right"' if column.startswith(">") else "" for column in columns]
    heads = "".join(f"<th{side}>{escape(name.removeprefix('>'))}</th>" for side, name in zip(right, columns, strict=True))
    cells = ("".join(f"<td{_long(cell, side)}>{cell}</td>" for side, cell in zip(right, row, strict=True)) for row in rows)
    lines = [f"<tr>{row}</tr>" for row in cells]
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _long(cell: str, side: str) -> str:
    return side or (' class="long"' if len(cell) > 40 else "")
