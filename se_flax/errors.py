"""Errors meant for the person at the keyboard: one sentence that says what was given, what is allowed, what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user can mend. The command lines print it in one line, without a traceback."""


def closest(given: str, allowed: Iterable[str], count: int = 3) -> str:
    """Names the allowed values nearest to a wrong one, for the end of an error message.

    Args:
      given: what was asked for.
      allowed: what exists.
      count: at most so many suggestions.

    Returns:
      `"closest: a, b"` when something is near, else `"allowed: a, b, c"` (shortened when long).
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=count, cutoff=0.6)
    if near:
        return "closest: " + ", ".join(near)
    shown = names if len(names) <= 12 else [*names[:12], f"... ({len(names)} in all)"]
    return "allowed: " + ", ".join(shown)
