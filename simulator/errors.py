"""The one exception a user is meant to read, and what helps to word it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class UsageError(ValueError):
    """What was asked cannot be done; the message is one clear sentence for the user."""


class EndlessError(Exception):
    """A schedule records more than any that ends; the message says after what it was stopped."""


def did_you_mean(asked: str, known: Iterable[str], synonyms: Mapping[str, str] | None = None, prefix: str = "") -> str:
    """The end of a sentence about a name that is not known: "; did you mean 'pingpong'?", or nothing where none is near.

    `synonyms` are other names people have for something known; `prefix` stands before each in the sentence.
    """
    from difflib import get_close_matches

    by_lower = {name.lower(): name for name in known} | {name.lower(): to for name, to in (synonyms or {}).items()}
    wanted = asked.strip().lower()
    longer = [name for name in by_lower if len(wanted) > 1 and name.startswith(wanted)]
    close = [wanted] if wanted in by_lower else longer[:3] or get_close_matches(wanted, by_lower, n=1)
    found = dict.fromkeys(by_lower[each] for each in close)
    return f"; did you mean {' or '.join(repr(prefix + each) for each in found)}?" if found else ""
