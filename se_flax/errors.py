"""User errors: one sentence that says what was given, what is allowed, what to do."""

import difflib
import re
from collections.abc import Iterable, Mapping


class UserError(ValueError):
    """Something that the user can mend. The command lines print it in one line, without a traceback."""


def respelled(text: str, names: Mapping[str, str]) -> str:
    """A message in the words of another program: `pass name=...` becomes `pass --name=...`.

    Messages write an argument as Python does, with its equals sign.

    Args:
      text: the message.
      names: what to write in place of `name=`, or of a whole `overwrite=True`.
    """
    longest_first = sorted(names, key=len, reverse=True)
    pattern = rf"(?<![\w./=-])(?:{'|'.join(map(re.escape, longest_first))})"
    return re.sub(pattern, lambda found: names[found[0]], text) if names else text


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
