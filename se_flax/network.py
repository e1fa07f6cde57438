"""What a network says of its parts: its classifier, the convolution that reads the images, and its blocks.

Fine-tuning, layer-wise rates and the import of weights with other classes or channels ask for these; nothing guesses
them from shapes or names.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import flax.linen as nn

from se_flax.errors import UserError

Path = tuple[str, ...]
"""Names from the network down to a submodule, `("layer1_0", "conv1")`, or to a parameter."""
Stem = TypeVar("Stem", bound=Callable[..., Any])


class Network(nn.Module):
    """Base of every network in the zoo: images to logits, `network(images, train=False, return_features=False)`."""

    @property
    def head_path(self) -> Path:
        """Of the classifier, also where `num_classes=0` leaves it out."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its classifier is")

    @property
    def stem_path(self) -> Path:
        """Of the convolution that reads the images; its kernel alone depends on `in_channels`."""
        raise NotImplementedError(f"{type(self).__name__} does not say which convolution reads its images")

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """Of the blocks, in the order in which the network calls them.

        A block is what layer-wise rates tell apart. What is called before the first one is the stem, and what is called
        between two blocks, or between the last one and the classifier, goes with the block before it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say which blocks it has")


def numbered_blocks(depths: Sequence[int], name: str = "layer{}_{}", first: int = 1) -> tuple[Path, ...]:
    """Paths of blocks that are numbered by stage and place.

    Args:
      depths: blocks per stage.
      name: of a block, with places for the numbers of its stage and of itself (from 0).
      first: number of the first stage.

    Returns:
      One path per block, in order.
    """
    return tuple((name.format(stage, i),) for stage, depth in enumerate(depths, first) for i in range(depth))


def reads_images(*path: str) -> Callable[[Stem], Stem]:
    """Declares of a function that makes a network's first layers which of them the images go to.

    Args:
      *path: of that convolution, from the network down.

    Returns:
      A decorator; `first_layer` reads what it wrote.
    """

    def declare(stem: Stem) -> Stem:
        stem.reads_images = path  # type: ignore[attr-defined]
        return stem

    return declare


def first_layer(stem: Any) -> Path:
    """Path of the convolution that a stem hands the images to.

    Args:
      stem: a function that `reads_images` was put before, or a partial of one.

    Raises:
      UserError: it declares nothing.
    """
    while isinstance(stem, partial):
        stem = stem.func
    if not hasattr(stem, "reads_images"):
        raise UserError(
            f"the stem {getattr(stem, '__name__', stem)} does not say which of its layers the images go to; put "
            "se_flax.network.reads_images before it, with that convolution's name: @reads_images('conv1')"
        )
    path: Path = stem.reads_images
    return path


def lies_in(path: Path, module: Path) -> bool:
    """Whether a path is that of a module or of something in it."""
    return path[: len(module)] == module
