"""Parsing of network names in file names and in `name=`."""

import re
from collections.abc import Iterable
from pathlib import Path

from se_flax.checkpoints import keras_files
from se_flax.checkpoints.files import open_arrays
from se_flax.checkpoints.torchvision import NETWORKS
from se_flax.errors import UserError, closest
from se_flax.zoo import VARIANTS, get_variant

_BY_LETTERS = {re.sub(r"[^a-z0-9]", "", name): name for name in VARIANTS}
_EXACT = {theirs.name: ours for ours, theirs in NETWORKS.items()} | {name: name for name in VARIANTS}
_TORCHVISION = re.compile(r"(^|\.)(features\.0\.0|trunk_output\.block1\.block1-0\.f\.a\.0)\.weight$")


def kind_of(keys: Iterable[str]) -> str:
    """Naming scheme of arrays: `se-flax` (`params/...`), `keras` (`<layer>/<weight>`), `torchvision` or `timm`."""
    keys = list(keys)
    if any(re.search(r"(^|/)params/", key) for key in keys):
        return "se-flax"
    if any("/" in key for key in keys):
        return "keras"
    return "torchvision" if any(_TORCHVISION.search(key) for key in keys) else "timm"


def our_name(words: str, *, whole: bool) -> str | None:
    """The network that words mean, with any separators: `SE-ResNet_50` is `seresnet50`; or torchvision's own spelling.

    Args:
      words: joined by `-`, `_` or spaces, in upper or lower case.
      whole: whether `words` must be the name alone; otherwise more may follow it (`seresnet50_ra-8efdb4bb`), and the
        longest name counts.

    Returns:
      One of `list_models()`, or None.
    """
    parts = re.split(r"[-_ ]", words.lower())
    heads = [parts] if whole else [parts[:length] for length in range(len(parts), 0, -1)]
    exact = (_EXACT[name] for head in heads if (name := "_".join(head)) in _EXACT)
    return next(exact, None) or next((_BY_LETTERS[head] for head in map("".join, heads) if head in _BY_LETTERS), None)


def meanings(name: str) -> tuple[str, ...]:
    """The networks that a name can mean: ours, and the one that keras.applications spells the same.

    Args:
      name: such as `seresnet50`, `SE-ResNet-50`, `seresnet50.ra2_in1k`, `EfficientNetV2B0`.

    Raises:
      UserError: there is no such network, or it has no published checkpoint with that tag.
    """
    head, _, tag = name.partition(".")
    found = (our_name(head, whole=True), keras_files.network(head, whole=True))
    if not any(found):
        raise UserError(f"unknown model {name!r}; {closest(name, VARIANTS)} (se_flax.list_models() gives all)")
    networks = tuple(each for each in found if each)
    tags = [weights.tag for weights in get_variant(networks[0]).weights]
    if tag and tag not in tags:
        raise UserError(f"unknown checkpoint {name!r}; {networks[0]} has {', '.join(tags) or 'none'}")
    return networks


def network_of(path: Path, name: str | None) -> str:
    """The network of a file or folder without metadata.

    Args:
      path: of the file.
      name: the user's name of the network; None takes the file's name, in which more may follow the network's.

    Returns:
      One of `list_models()`. If a network of ours and one of keras.applications have the same spelling
      (`efficientnet_b0`), the names of the arrays decide.

    Raises:
      UserError: neither of them names a network.
    """
    if name is not None:
        found = meanings(name)
    else:
        own, keras = our_name(path.name.partition(".")[0], whole=False), keras_files.network(path.name)
        found = tuple(each for each in (own, keras) if each)
    if not found:
        raise UserError(f"{path} does not say which network it holds; pass name=... (se_flax.list_models() gives all)")
    if len(set(found)) > 1 and path.suffix.lower() in keras_files.SUFFIXES:
        with open_arrays(path) as arrays:
            return found[kind_of(arrays) == "keras"]
    return found[0]
