"""Base class of networks: it declares the paths of the classifier, the stem and the blocks.

Fine-tuning, layer-wise rates and the import of weights with other classes or channels ask for these; nothing guesses
them from shapes or names.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.errors import UserError

Array = jax.Array
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
            "se_flax.nn.network.reads_images before it, with that convolution's name: @reads_images('conv1')"
        )
    path: Path = stem.reads_images
    return path


def lies_in(path: Path, module: Path) -> bool:
    """Whether a path is that of a module or of something in it."""
    return path[: len(module)] == module


def check_images(images: Array, channels: int) -> Array:
    """Refuses anything but float NHWC images.

    Args:
      images: what the network was called with.
      channels: how many channels it expects.

    Returns:
      The images as an array of JAX's: NumPy's float64 is its float32, unless `jax_enable_x64` is set.

    Raises:
      UserError: wrong rank, channel count or dtype.
    """
    if images.ndim != 4:
        raise UserError(
            f"got images of shape {tuple(images.shape)}; a network takes [N, H, W, {channels}] "
            "(add the batch axis to a single image: images[None])"
        )
    if images.shape[-1] != channels:
        hint = (
            "; the channels come last, transpose from NCHW with images.transpose(0, 2, 3, 1)"
            if images.shape[1] == channels
            else f"; pass {channels} channels, or create the model with in_channels={images.shape[-1]}"
        )
        raise UserError(
            f"got images of shape {tuple(images.shape)} with {images.shape[-1]} channels; this network takes "
            f"[N, H, W, {channels}]{hint}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"got images of dtype {images.dtype}; a network takes normalised floats: divide by 255, subtract the "
            "mean and divide by the standard deviation of its checkpoint"
        )
    return jnp.asarray(images)
