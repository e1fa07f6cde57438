"""Networks and their published weights as plain data."""

import functools
import importlib.resources
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from se_flax.nn.network import Network


@dataclass(frozen=True)
class Weights:
    """One published checkpoint of a network and the preprocessing that belongs to it.

    Attributes:
      tag: its name after the architecture's (`ra2_in1k`).
      hub_id: where on the Hugging Face hub it is published; None for one that is only at its authors' address.
      num_classes: of its classifier.
      image_size: side of the images it was made for.
      mean: per channel, of images in [0, 1], RGB.
      std: likewise.
      interpolation: of the resize, `bilinear` or `bicubic`.
      crop: image_size / (short side after the resize).
      licence: of the weights.
      test_image_size: larger side at which they do best, where the source names one.
      test_crop: crop at that side.
      crop_mode: `center`; or `squash`, which resizes both sides to the image's side whatever the aspect ratio.
    """

    tag: str
    hub_id: str | None = None
    num_classes: int = 1000
    image_size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop: float = 0.875
    licence: str = "apache-2.0"
    test_image_size: int | None = None
    test_crop: float | None = None
    crop_mode: str = "center"


@dataclass(frozen=True)
class Variant:
    """One network of a family.

    Attributes:
      build: makes the module; takes the module's attributes as keywords.
      num_params: trainable parameters with the default classifier, a number from the source; tests compare.
      input_size: side of the images it was designed for.
      source: paper, code or checkpoint that defines it.
      weights: published checkpoints; `se_flax.get_variant` fills them in from `data/checkpoints.json`.
    """

    build: Callable[..., Network]
    num_params: int
    input_size: int
    source: str
    weights: tuple[Weights, ...] = field(default=())

    def attributes(self) -> dict[str, Any]:
        """Attributes that this variant sets, by name."""
        return dict(getattr(self.build, "keywords", {}))


@functools.cache
def published_weights() -> Mapping[str, tuple[Weights, ...]]:
    """The published checkpoints of every architecture, by its name.

    Returns:
      Checkpoints sorted by tag; an architecture without any is absent.
    """
    text = importlib.resources.files("se_flax").joinpath("data", "checkpoints.json").read_text()
    return {
        name: tuple(Weights(**{**row, "mean": tuple(row["mean"]), "std": tuple(row["std"])}) for row in rows)
        for name, rows in json.loads(text).items()
    }
