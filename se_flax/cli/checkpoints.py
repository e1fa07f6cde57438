"""Arguments, messages and descriptions that all commands on a checkpoint share."""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import jax

from se_flax.checkpoints.model_json import to_json
from se_flax.checkpoints.pretrained import Pretrained, load_pretrained
from se_flax.checkpoints.resolve import SUFFIXES
from se_flax.images.decode import INTERPOLATIONS
from se_flax.images.preprocess import CROP_MODES

_SETTINGS = ("image_size", "crop", "crop_mode", "interpolation", "mean", "std", "exif_orientation")


def add_checkpoint(parser: argparse.ArgumentParser, metavar: str = "REF") -> None:
    """Adds the arguments that select a checkpoint."""
    parser.add_argument("ref", metavar=metavar, help="checkpoint: arch.tag, owner/name on the hub, folder or file")
    parser.add_argument("--name", help="the network, for a file whose name does not tell it")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")


def add_preprocessing(parser: argparse.ArgumentParser) -> None:
    """Adds the preprocessing arguments; the default of each is the checkpoint's setting."""
    group = parser.add_argument_group("images", "preprocessing (default of each: the checkpoint's setting)")
    group.add_argument("--image-size", type=int, help="height and width in pixels")
    group.add_argument("--crop", type=float, help="share of height and width that the crop keeps")
    group.add_argument("--crop-mode", choices=CROP_MODES, help="squash resizes without regard to the aspect ratio")
    group.add_argument("--interpolation", choices=tuple(INTERPOLATIONS), help="of the resize")
    group.add_argument("--mean", type=_numbers, metavar="R,G,B", help="of values in [0, 1]")
    group.add_argument("--std", type=_numbers, metavar="R,G,B", help="likewise")
    group.add_argument(
        "--exif-orientation",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="rotate photographs as EXIF says (torchvision and timm do not)",
    )


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def load_checkpoint(options: argparse.Namespace, **arguments: Any) -> Pretrained:
    """Loads the checkpoint of `ref`, `name` and `revision`, with the preprocessing arguments of the command line.

    Prints each deviation from the checkpoint as a line on standard error.

    Args:
      options: parsed command line.
      **arguments: further arguments of `load_pretrained`.

    Raises:
      UserError: there is no such checkpoint, or a setting is invalid.
    """
    given = {name: value for name in _SETTINGS if (value := getattr(options, name, None)) is not None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        loaded = load_pretrained(
            options.ref, name=options.name, revision=options.revision, preprocess=given or None, **arguments
        )
    said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    for text in dict.fromkeys([*loaded.notes, *said]):
        print(f"se-flax: {text}", file=sys.stderr)
    return loaded


def is_checkpoint(ref: str) -> bool:
    """Whether a reference means a file, a folder or a repository, not a network."""
    return "/" in ref or ref.endswith(SUFFIXES) or Path(ref).expanduser().exists()


def facts(loaded: Pretrained) -> dict[str, Any]:
    """A checkpoint as plain data."""
    model: Any = loaded.model
    return {
        "name": loaded.name,
        "params": sum(x.size for x in jax.tree.leaves(loaded.variables["params"])),
        "num_classes": model.num_classes,
        "in_channels": model.in_channels,
        "arguments": {key: to_json(value) for key, value in loaded.arguments.items()},
        "preprocess": loaded.preprocess.to_json(),
        "labels": None if loaded.labels is None else list(loaded.labels),
        "provenance": dict(loaded.provenance),
        "notes": list(loaded.notes),
    }


def describe(loaded: Pretrained) -> str:
    """A checkpoint as text."""
    found, p = facts(loaded), loaded.preprocess
    mean, std = (" ".join(f"{x:.3g}" for x in values) for values in (p.mean, p.std))
    labels = f" ({', '.join(loaded.labels[:5])}{', ...' * (len(loaded.labels) > 5)})" if loaded.labels else ""
    lines = [f"{loaded.name}: {found['params']:,} parameters"]
    lines += [f"classes: {found['num_classes']:,}{labels}", f"channels: {found['in_channels']}"]
    lines += [f"{key}: {json.dumps(value)}" for key, value in found["arguments"].items() if key not in found]
    lines += [f"images: {p.image_size} px ({p.interpolation}, crop {p.crop:g} {p.crop_mode}), mean {mean}, std {std}"]
    lines += [f"{key}: {value}" for key, value in loaded.provenance.items()]
    return "\n".join(lines)
