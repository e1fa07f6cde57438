"""Test-time augmentation: the views of an image whose logits an evaluation averages."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from se_flax.errors import UserError, closest

Array = jax.Array
Views = Callable[[Array], list[tuple[float, Array]]]


def _one(images: Array) -> list[tuple[float, Array]]:
    return [(1.0, images)]


def _with_mirror(images: Array) -> list[tuple[float, Array]]:
    return [(0.5, images), (0.5, images[:, :, ::-1])]


def _with_shifts(images: Array) -> list[tuple[float, Array]]:
    height, width = images.shape[1:3]
    padded = jnp.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
    shifted = (padded[:, i : i + height, i : i + width] for i in (0, 2))
    parts = ((0.5, images), *((0.25, x) for x in shifted))
    return [(share * weight, view) for share, x in parts for weight, view in _with_mirror(x)]


VIEWS: Mapping[str, Views] = {"none": _one, "flip": _with_mirror, "flip_shift": _with_shifts}
"""Weights and views of images [N, H, W, C], by the name that `eval_tta` has.

- `none`: the image.
- `flip`: the image and its mirror image.
- `flip_shift`: of the mean of the logits one half is `flip` of the image, one half `flip` of the image shifted by one
  pixel down and right, and up and left, with the border reflected (Jordan 2024, section 3.5).
"""


def check(name: str) -> None:
    """Raises `UserError` for a name that is not in `VIEWS`."""
    if name not in VIEWS:
        raise UserError(f"unknown eval_tta {name!r}; {closest(name, VIEWS)}")
