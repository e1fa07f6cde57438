"""What the operating system refuses to write, in one sentence; and no tracebacks of background threads around it."""

import errno
import logging
import os
import re
import sys
import threading
from types import TracebackType
from typing import Any

from se_flax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDY = {
    **dict.fromkeys(_FULL, "free some space"),
    **dict.fromkeys((errno.EPERM, errno.EACCES, errno.EROFS), "make the folder writable"),
}


def error_number(error: BaseException | None) -> int | None:
    """The `errno` of an exception or of what caused it; None when none of them comes from the operating system."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        # TensorStore says it in words.
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            return int(found[1])
        if "No space left on device" in str(error) or "RESOURCE_EXHAUSTED: Error writing" in str(error):
            return errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None


def unwritten(number: int, what: str, newest: str) -> UserError:
    """The error for something that could not be written.

    Args:
      number: `errno`.
      what: could not be written.
      newest: where the newest whole checkpoint lies; empty without one.

    Returns:
      An error that says why, where the newest whole checkpoint lies, and what to do.
    """
    why = f"the disk is full: {what}" if number in _FULL else what
    remedy = _REMEDY.get(number, "check the disk")
    return UserError(
        f"{why} could not be written ({os.strerror(number)}); {newest_whole(newest)}; {remedy}, then run the "
        "same command to resume"
    )


def newest_whole(newest: str) -> str:
    """The newest whole checkpoint in words; `newest` is empty without one."""
    return f"the newest whole checkpoint is {newest}" if newest else "no checkpoint is whole yet"


def silence_background_errors() -> None:
    """Leaves out the tracebacks that Orbax and TensorStore print for a save that failed; the save itself raises it.

    An error of the operating system in another thread (TensorBoard's writer) becomes one line.
    """
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if _is_news not in logger.filters:
            logger.addFilter(_is_news)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)
    if not isinstance(threading.excepthook, _InThread):
        threading.excepthook = _InThread(threading.excepthook)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record is about something else than a failed save."""
    if record.name == "asyncio":
        return "exception was never retrieved" not in record.getMessage()
    trace = record.exc_info[2] if isinstance(record.exc_info, tuple) else None
    return not _passes_orbax(trace)


def _passes_orbax(trace: TracebackType | None) -> bool:
    while trace is not None:
        if f"{os.sep}orbax{os.sep}" in trace.tb_frame.f_code.co_filename:
            return True
        trace = trace.tb_next
    return False


class _Unraisable:
    """`sys.unraisablehook` without TensorStore's futures that end after their event loop."""

    def __init__(self, previous: Any):
        self._previous = previous

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._previous(unraisable)


class _InThread:
    """`threading.excepthook` with one line for an error of the operating system."""

    def __init__(self, previous: Any):
        self._previous = previous

    def __call__(self, args: Any) -> None:
        if isinstance(args.exc_value, OSError) and args.exc_value.errno is not None:
            print(f"warning: a thread in the background ended: {args.exc_value}", file=sys.stderr, flush=True)
        else:
            self._previous(args)
