"""Common prefixes of state dicts (`module.`, `_orig_mod.`, `model.`) and outer dictionaries.

`torch.nn.DataParallel` writes `module.conv1.weight`, a compiled module `_orig_mod.conv1.weight`, and programs with the
network as an attribute, such as Lightning, `model.conv1.weight`. One rule covers all formats: a prefix that all names
have is removed if more names fit the network without it.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Keys of the weights in the dictionaries that training programs save; averaged weights first, as in timm.
_OUTER = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "net")

MAX_PARTS = 8  # of a prefix; bounds the time for crafted files, since each prefix is compared with all names


def unwrapped(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state dict inside a training program's dictionary, or the mapping itself if it is a state dict."""
    return next((content[key] for key in _OUTER if isinstance(content.get(key), Mapping)), content)


def common_prefixes(names: Iterable[str]) -> list[str]:
    """All prefixes (of whole parts) that all names have, the empty one first.

    Args:
      names: parts joined by `.` or `/`.

    Returns:
      Such as `["", "model.", "model._orig_mod."]`.
    """
    paths = [tuple(re.split(r"(?<=[./])", name)) for name in names]
    return ["".join(paths[0][:depth]) if depth else "" for depth in range(min(shared_parts(paths), MAX_PARTS) + 1)]


def shared_parts(paths: Sequence[tuple[str, ...]]) -> int:
    """Number of leading parts that all paths share, not counting the last part of a path."""
    # In sorted order, the leading parts shared by the first and the last path are shared by all.
    first, last = min(paths, default=()), max(paths, default=())
    equal = (a == b for a, b in zip(first[:-1], last[:-1], strict=False))
    return sum(1 for _ in itertools.takewhile(bool, equal))


def best_prefix(prefixes: Iterable[str], fitting: Callable[[str], int]) -> str:
    """The prefix without which most names fit; the shortest if there are several.

    Args:
      prefixes: from `common_prefixes`.
      fitting: returns the number of names that fit without a prefix.
    """
    return max(prefixes, key=fitting)


def without(arrays: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """The arrays with a prefix removed from their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items()} if prefix else arrays


def taken_off(prefix: str) -> str:
    """The note for the user on a removed prefix."""
    return f"the prefix {prefix!r} of all names in the checkpoint was removed"


def outer_part(wanted: Iterable[str], others: Iterable[str]) -> str:
    """The prefix under which all missing names occur beside other arrays (such as a loss's); empty if there is none.

    Args:
      wanted: names that are missing.
      others: names in the file that are not the network's.
    """
    wanted, there = list(wanted), set(others)
    for name in sorted(there) if wanted else ():
        prefix = name.removesuffix(wanted[0])
        if prefix != name and prefix.endswith((".", "/")) and all(prefix + each in there for each in wanted):
            return prefix
    return ""
