"""Base classes of networks: images -> feature maps -> pooled features -> logits.

A family defines `trunk`, which makes the feature maps, and declares the paths of its classifier, stem and blocks.
Fine-tuning, layer-wise learning rates and the import of weights with other classes or channels ask for these paths;
nothing guesses them from shapes or names.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.errors import UserError
from se_flax.nn.conv import Conv
from se_flax.nn.head import classifier_init, classify
from se_flax.nn.norm import BatchNorm

Array = jax.Array
ModuleDef = Callable[..., Any]
Path = tuple[str, ...]
"""Names from the network down to a submodule, `("layer1_0", "conv1")`, or to a parameter."""
Stem = TypeVar("Stem", bound=Callable[..., Any])


class Network(nn.Module, kw_only=True):
    """Base of every network in the zoo: trunk, global average pooling, classifier.

    Attributes:
      num_classes: width of the classifier; 0 leaves it out, and the call returns the pooled features.
      attention: attention class or partial; None for none.
      conv: convolution class or partial.
      norm: batch-norm class or partial.
      act: activation.
      classifier: class or partial of the last layer, called as `classifier(num_classes, kernel_init=..., name=...)`.
      drop_rate: dropout rate before the classifier.
      in_channels: channels of the images.
      dtype: of the arithmetic; parameters, statistics, gates and logits are float32.
    """

    num_classes: int = 1000
    attention: ModuleDef | None = None
    conv: ModuleDef = Conv
    norm: ModuleDef = BatchNorm
    act: Callable[[Array], Array] = jax.nn.relu
    classifier: ModuleDef = nn.Dense
    drop_rate: float = 0.0
    in_channels: int = 3
    dtype: Any = None

    classifier_init: ClassVar[nn.initializers.Initializer] = staticmethod(classifier_init)

    @property
    def head_path(self) -> Path:
        """Path of the classifier, also where `num_classes=0` leaves it out."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its classifier is")

    @property
    def stem_path(self) -> Path:
        """Path of the convolution that reads the images; its kernel alone depends on `in_channels`."""
        raise NotImplementedError(f"{type(self).__name__} does not say which convolution reads its images")

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """Paths of the blocks, in the order in which the network calls them.

        A block is the unit of layer-wise learning rates. Layers before the first block are the stem; layers between two
        blocks, or between the last one and the classifier, belong to the block before them.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say which blocks it has")

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False, return_features: bool = False) -> Any:
        """Classifies images.

        Args:
          images: float [N, H, W, in_channels], normalised.
          train: batch norms use the batch's statistics; dropout, stochastic depth and the blocks' own noise are active
            (these need an rng named `dropout`).
          return_features: return the feature maps as well.

        Returns:
          float32 logits [N, num_classes]; with `return_features`, also a named tuple of feature maps [N, h, w, c], one
          per resolution, finest first. `se_flax.feature_info` lists their names, channels and strides.

        Raises:
          UserError: images of the wrong rank, channel count or dtype, or too small for the network; an attribute that
            does not fit the network, such as a stage that it does not have.
        """
        images = check_images(images, self.in_channels)
        maps = self.trunk(images.astype(self.dtype or images.dtype), train)
        x = self.classified(self.pooled(list(maps.values())[-1], train), train)
        return (x, _feature_maps(tuple(maps))(*maps.values())) if return_features else x

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The layers before the pooling.

        Args:
          x: images [N, H, W, in_channels], in the network's dtype.
          train: as for the network.

        Returns:
          Feature maps [N, h, w, c] by name, one per resolution, finest first; the last one is the input of `pooled`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define its trunk")

    def pooled(self, x: Array, train: bool) -> Array:
        """Global average pooling, and the layers around it where a family has any; returns float32 [N, C]."""
        del train
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)

    def classified(self, x: Array, train: bool) -> Array:
        """Dropout and classifier. Args: x [N, C]. Returns: float32 [N, num_classes], or x without classes."""
        return classify(
            x,
            self.classifier,
            self.num_classes,
            path=self.head_path,
            kernel_init=self.classifier_init,
            drop_rate=self.head_drop_rate,
            train=train,
        )

    @property
    def head_drop_rate(self) -> float:
        """Dropout rate before the classifier."""
        return self.drop_rate

    @nn.nowrap
    def parts(self) -> dict[str, Any]:
        """The attributes of every block: `conv` and `norm` with the network's dtype, and `act`."""
        conv, norm = partial(self.conv, dtype=self.dtype), partial(self.norm, dtype=self.dtype)
        return {"conv": conv, "norm": norm, "act": self.act}


class StagedNetwork(Network, kw_only=True):
    """Network of stages of blocks, any of which carry attention.

    Attributes:
      stages: numbers of the stages that carry attention, as in the papers' tables: 1 is the stem, 2 the first stage of
        blocks (conv2_x, torch's `layer1`); None for all.
      drop_path_rate: stochastic depth rate of the last block; it falls linearly to 0 at the first one (Huang et al.
        2016, section 3).
    """

    stages: tuple[int, ...] | None = None
    drop_path_rate: float = 0.0

    @nn.nowrap
    def attention_by_stage(self, count: int) -> list[ModuleDef | None]:
        """The attention, or None, of each of `count` stages.

        Raises:
          UserError: `stages` names one that the network does not have.
        """
        chosen = attention_stages(self.stages, count)
        return [self.attention if number in chosen else None for number in range(2, 2 + count)]

    @nn.nowrap
    def drop_path_rates(self, count: int) -> list[float]:
        """Stochastic depth rate of each of `count` blocks."""
        return [self.drop_path_rate * i / max(count - 1, 1) for i in range(count)]


@functools.cache
def _feature_maps(names: tuple[str, ...]) -> Any:
    """Class of the feature maps of these names; cached, as JAX compares the classes of named tuples by identity."""
    return collections.namedtuple("FeatureMaps", names)


def attention_stages(stages: Sequence[int] | None, count: int) -> frozenset[int]:
    """Checks which stages carry attention.

    Args:
      stages: as in `StagedNetwork`.
      count: stages of blocks in the network.

    Returns:
      The stages' numbers.

    Raises:
      UserError: a stage that the network does not have.
    """
    every = range(2, 2 + count)
    if stages is None:
        return frozenset(every)
    wrong = sorted(set(stages) - set(every))
    if wrong:
        raise UserError(
            f"got attention stages {tuple(stages)}, but {wrong[0]} is not a stage of blocks; allowed: "
            f"{', '.join(map(str, every))} (the paper's numbers: 2 is conv2_x, torch's layer1)"
        )
    return frozenset(stages)


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
    """Decorator of a stem function that declares which of its layers reads the images.

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
    """Path of the convolution of a stem that reads the images.

    Args:
      stem: a function with the decorator `reads_images`, or a partial of one.

    Raises:
      UserError: the function has no such decorator.
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


def check_side(images: Array, smallest: int) -> None:
    """Refuses images that are too small for a network.

    Args:
      images: [N, H, W, C].
      smallest: smallest height and width that leave a pixel for the classifier.

    Raises:
      UserError: the height or width is below `smallest`.
    """
    height, width = images.shape[1:3]
    # A symbolic height or width (jax.export) is compared when it is known: XLA refuses a map of no pixels.
    if any(isinstance(side, int) and side < smallest for side in (height, width)):
        raise UserError(
            f"got images of {height} x {width} pixels, of which this network would leave no pixel for its classifier; "
            f"resize them to at least {smallest} x {smallest}"
        )
