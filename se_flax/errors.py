"""User errors: one sentence that says what was given, what is allowed, what to do."""

import difflib
import re
from collections.abc import Iterable, Mapping

MOST = 4000  # characters of a message
# Characters that end a line, or that a terminal acts on; surrogates, which no stream can write.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """An error that the user can correct. The command lines print it as one line, without a traceback.

    A message may quote a foreign file: ends of lines become blanks, other control characters `?`, and of more than
    `MOST` characters the middle is left out.

    Args:
      message: one sentence.
    """

    def __init__(self, message: object):
        text = _CONTROL.sub("?", re.sub(r"[\r\n]+", " ", str(message)))
        super().__init__(text if len(text) <= MOST else f"{text[: MOST // 2]} ... {text[-MOST // 3 :]}")


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
