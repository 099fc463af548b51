"""Text for a terminal or a pipe that is not UTF-8: a character it cannot show becomes the nearest that it can."""

from __future__ import annotations

import codecs
import io
import unicodedata
from typing import TextIO

_NEAREST = {
    **dict.fromkeys("▏▎▍", "."), **dict.fromkeys("▌▋▊▉█", "#"), "·": ".", "µ": "u", "×": "x", "…": ".", "•": "*",
    **dict.fromkeys("─━┄╌—–−", "-"), **dict.fromkeys("│┃┆", "|"), **dict.fromkeys("┴┬┼└┘┌┐╭╮╰╯", "+"), "╱": "/",
    **dict.fromkeys("‘’", "'"), **dict.fromkeys("“”", '"'), "→": ">", "←": "<", "↑": "^", "↓": "v", "✓": "y", "✗": "n",
    "●": "o", "◆": "d", "▲": "A", "■": "#", "○": "0", "◇": "v", "△": "^", "□": "%",
}  # fmt: skip
"""One character for one, so that columns stay aligned."""


def _nearest(error: UnicodeError) -> tuple[str, int]:
    """What codecs.register_error wants: the replacement, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(char: str) -> str:
    if char in _NEAREST:
        return _NEAREST[char]
    return unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()[:1] or "?"


def fall_back(stream: TextIO) -> None:
    """Let `stream` write any text, whatever its encoding."""
    if isinstance(stream, io.TextIOWrapper):
        codecs.register_error("fasim.nearest", _nearest)
        stream.reconfigure(errors="fasim.nearest")
