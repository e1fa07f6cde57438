"""Common prefixes of state dicts (`module.`, `_orig_mod.`, `model.`) and outer dictionaries.

`torch.nn.DataParallel` writes `module.conv1.weight`, a compiled module `_orig_mod.conv1.weight`, Lightning and other
programs that keep the network as an attribute `model.conv1.weight`. One rule covers them in every format: parts that
all names begin with are taken off when more names fit the network without them.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Keys under which training programs keep the weights in what they save; averaged ones first, like timm.
_OUTER = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "net")

MAX_PARTS = 8  # that a prefix has; each is tried against all names, of which a crafted file can have many


def unwrapped(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state dict inside what a training program saved, or the same mapping where it is one itself."""
    return next((content[key] for key in _OUTER if isinstance(content.get(key), Mapping)), content)


def common_prefixes(names: Iterable[str]) -> list[str]:
    """Every prefix of whole parts that all names have, the empty one first.

    Args:
      names: parts joined by `.` or `/`.

    Returns:
      Such as `["", "model.", "model._orig_mod."]`.
    """
    paths = [tuple(re.split(r"(?<=[./])", name)) for name in names]
    return ["".join(paths[0][:depth]) if depth else "" for depth in range(min(shared_parts(paths), MAX_PARTS) + 1)]


def shared_parts(paths: Sequence[tuple[str, ...]]) -> int:
    """How many parts, not counting a path's last one, all paths begin with."""
    # Whatever these two share, all between them in the order share as well.
    first, last = min(paths, default=()), max(paths, default=())
    equal = (a == b for a, b in zip(first[:-1], last[:-1], strict=False))
    return sum(1 for _ in itertools.takewhile(bool, equal))


def best_prefix(prefixes: Iterable[str], fitting: Callable[[str], int]) -> str:
    """The prefix without which most names fit; the shortest of equals, so an empty one that changes nothing.

    Args:
      prefixes: as `common_prefixes` gives them.
      fitting: how many names fit without a prefix.
    """
    return max(prefixes, key=fitting)


def without(arrays: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """The same arrays, their names without a prefix."""
    return {name.removeprefix(prefix): array for name, array in arrays.items()} if prefix else arrays


def taken_off(prefix: str) -> str:
    """The sentence that says so."""
    return f"the prefix {prefix!r} of all names in the checkpoint was taken off"


def outer_part(wanted: Iterable[str], others: Iterable[str]) -> str:
    """The prefix under which all wanted names stand among others, such as a loss's; empty where they do not.

    Args:
      wanted: names that are missing.
      others: names that are there and belong to nothing.
    """
    wanted, there = list(wanted), set(others)
    for name in sorted(there) if wanted else ():
        prefix = name.removesuffix(wanted[0])
        if prefix != name and prefix.endswith((".", "/")) and all(prefix + each in there for each in wanted):
            return prefix
    return ""
