"""The arguments that name a checkpoint and say how its images are prepared, and the checkpoint that they name."""

import argparse
import sys
import warnings
from typing import Any

from se_flax.images import INTERPOLATIONS
from se_flax.preprocess import CROP_MODES
from se_flax.weights.pretrained import Pretrained, load_pretrained

_SETTINGS = ("image_size", "crop", "crop_mode", "interpolation", "mean", "std", "exif_orientation")


def add_preprocessing(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say how images are prepared; each that is not given is the checkpoint's."""
    group = parser.add_argument_group("images", "how they are prepared (default of each: as the checkpoint says)")
    group.add_argument("--image-size", type=int, help="side in pixels")
    group.add_argument("--crop", type=float, help="share of the side that the crop keeps")
    group.add_argument("--crop-mode", choices=CROP_MODES, help="squash takes all of a picture")
    group.add_argument("--interpolation", choices=tuple(INTERPOLATIONS), help="of the resize")
    group.add_argument("--mean", type=_numbers, metavar="R,G,B", help="of values in [0, 1]")
    group.add_argument("--std", type=_numbers, metavar="R,G,B", help="likewise")
    group.add_argument(
        "--exif-orientation",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="turn photographs as EXIF says; without, as torchvision and timm",
    )


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def load_checkpoint(options: argparse.Namespace, **arguments: Any) -> Pretrained:
    """The checkpoint of `ref`, `name` and `revision`, with the preprocessing that `add_preprocessing` was given.

    What is not as in the checkpoint is said on standard error, a line each.

    Args:
      options: of the command line.
      **arguments: further ones for `load_pretrained`.

    Raises:
      UserError: no such checkpoint, or settings that cannot be.
    """
    given = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_pretrained(
            options.ref, name=options.name, revision=options.revision, preprocess=given or None, **arguments
        )
    for warning in caught:
        if str(warning.message) not in loaded.notes:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    for note in loaded.notes:
        print(f"se-flax: note: {note}", file=sys.stderr)
    return loaded
