"""User errors: one sentence that says what was given, what is allowed, what to do."""

import difflib
import re
from collections.abc import Iterable, Mapping


class UserError(ValueError):
    """An error that the user can correct. The command lines print it as one line, without a traceback."""


def respelled(text: str, names: Mapping[str, str]) -> str:
    """Replaces the Python arguments in a message by a command's options: `name=...` becomes `--name=...`.

    Args:
      text: the message, with arguments as in Python (`name=`).
      names: replacements, by argument with its equals sign (`name=`, or `overwrite=True` as a whole).
    """
    longest_first = sorted(names, key=len, reverse=True)
    pattern = rf"(?<![\w./=-])(?:{'|'.join(map(re.escape, longest_first))})"
    return re.sub(pattern, lambda found: names[found[0]], text) if names else text


def closest(given: str, allowed: Iterable[str], count: int = 3) -> str:
    """The allowed values closest to a wrong one, for the end of an error message.

    Args:
      given: the wrong value.
      allowed: the allowed values.
      count: greatest number of suggestions.

    Returns:
      `"closest: a, b"` if some are similar, else `"allowed: a, b, c"` (shortened if long).
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=count, cutoff=0.6)
    if near:
        return "closest: " + ", ".join(near)
    shown = names if len(names) <= 12 else [*names[:12], f"... ({len(names)} in all)"]
    return "allowed: " + ", ".join(shown)
