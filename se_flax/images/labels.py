"""Names of ImageNet's 1,000 classes."""

import functools
import importlib.resources
from typing import NamedTuple


class Label(NamedTuple):
    """One class: its WordNet id (`n01440764`) and name (`tench, Tinca tinca`)."""

    wordnet_id: str
    name: str


@functools.cache
def imagenet_labels() -> tuple[Label, ...]:
    """The classes of ILSVRC 2012 in the order of the logits: by WordNet id.

    The names are the lemmas of WordNet 3.0 (Princeton University).

    Returns:
      1,000 labels.
    """
    text = importlib.resources.files("se_flax").joinpath("data", "imagenet_labels.tsv").read_text()
    return tuple(Label(*line.split("\t")) for line in text.splitlines())
