"""What every command that reads a checkpoint shares: its arguments, what it says, and what is in the checkpoint."""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import jax

from se_flax.weights.arguments import to_json
from se_flax.weights.locate import SUFFIXES
from se_flax.weights.pretrained import Pretrained, load_pretrained


def add_checkpoint(parser: argparse.ArgumentParser, metavar: str = "REF") -> None:
    """Adds the arguments that say which checkpoint."""
    parser.add_argument("ref", metavar=metavar, help="checkpoint: arch.tag, owner/name on the hub, folder or file")
    parser.add_argument("--name", help="the network, for a file whose name does not say it")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")


def load_checkpoint(options: argparse.Namespace, **arguments: Any) -> Pretrained:
    """Loads it, and prints each of its notes and warnings as one line on standard error.

    Args:
      options: with what `add_checkpoint` added.
      **arguments: further ones of `load_pretrained`.

    Raises:
      UserError: as `load_pretrained`.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        loaded = load_pretrained(options.ref, name=options.name, revision=options.revision, **arguments)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    for text in dict.fromkeys([*loaded.notes, *said]):
        print(f"se-flax: {text}", file=sys.stderr)
    return loaded


def is_checkpoint(ref: str) -> bool:
    """Whether words mean a file, a folder or a repository, and no network."""
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
    """A checkpoint in lines of text."""
    found, p = facts(loaded), loaded.preprocess
    mean, std = (" ".join(f"{x:.3g}" for x in values) for values in (p.mean, p.std))
    labels = f" ({', '.join(loaded.labels[:5])}{', ...' * (len(loaded.labels) > 5)})" if loaded.labels else ""
    lines = [f"{loaded.name}: {found['params']:,} parameters"]
    lines += [f"classes: {found['num_classes']:,}{labels}", f"channels: {found['in_channels']}"]
    lines += [f"{key}: {json.dumps(value)}" for key, value in found["arguments"].items() if key not in found]
    lines += [f"images: {p.image_size} px ({p.interpolation}, crop {p.crop:g} {p.crop_mode}), mean {mean}, std {std}"]
    lines += [f"{key}: {value}" for key, value in loaded.provenance.items()]
    return "\n".join(lines)
