"""Mistakes of the person at the keyboard, told in one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A wrong path, name or value. The command line prints its message and exits with status 2."""


def unknown(what: str, got: object, known: Iterable[str]) -> UserError:
    """The error for a name that is not among ``known``, with the nearest that is."""
    known = sorted(str(name) for name in known)
    near = get_close_matches(str(got), known, 1, cutoff=0.5)
    if near:
        return UserError(f"{what}: no {str(got)!r}; did you mean {near[0]!r}?")
    listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return UserError(f"{what}: no {str(got)!r}; there is {listed or 'none'}")
