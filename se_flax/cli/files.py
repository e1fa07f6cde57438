"""`se-flax convert`: a checkpoint from one format to another."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np

from se_flax.checkpoints.description import beside, write_described
from se_flax.checkpoints.keras import to_keras
from se_flax.checkpoints.pretrained import Pretrained
from se_flax.checkpoints.torch import to_timm
from se_flax.cli.checkpoints import add_checkpoint, add_preprocessing, load_checkpoint
from se_flax.errors import UserError


def _own_names(name: str, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    del name
    return {"/".join(path): np.asarray(x) for path, x in flax.traverse_util.flatten_dict(dict(variables)).items()}


LAYOUTS: dict[str, Callable[[str, Mapping[str, Any]], dict[str, np.ndarray]]] = {
    "timm": to_timm,
    "keras": to_keras,
    "se-flax": _own_names,
}


def add_commands(commands: Any) -> None:
    """Adds the command of this file to an argument parser."""
    parser = commands.add_parser(
        "convert",
        help="a checkpoint from one format to another",
        description="Reads any checkpoint and writes it in another format. DST without a suffix is a folder for "
        "load_pretrained (variables, preprocessing, labels, provenance, digests). .safetensors and .npz hold the "
        "arrays under the names of --layout; the metadata is in the header or, for .npz, in DST.json.",
    )
    add_checkpoint(parser, "SRC")
    parser.add_argument("target", metavar="DST", help="a new folder, or a .safetensors or .npz file")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), help="names in a .safetensors or .npz file (default: timm)")
    parser.add_argument("--num-classes", type=int, help="another number of classes: the classifier is initialised anew")
    parser.add_argument("--in-channels", type=int, help="another number of image channels: the stem is adapted")
    add_preprocessing(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DST")
    parser.set_defaults(run=convert)


def convert(options: argparse.Namespace) -> None:
    """Writes the checkpoint.

    Raises:
      UserError: the source cannot be read, or the target exists or is of an unknown format.
    """
    target = Path(options.target).expanduser()
    if target.suffix not in ("", ".safetensors", ".npz") and not target.is_dir():
        raise UserError(f"{target} is neither a folder nor a .safetensors or .npz file; choose one of these")
    written = (target, beside(target)) if target.suffix == ".npz" else (target,)
    taken = next((path for path in written if path.exists()), None)
    if taken is not None and not options.overwrite:
        raise UserError(f"{taken} exists already; choose another name, or pass --overwrite to replace it")
    arrays_alone = target.suffix in (".safetensors", ".npz")
    if options.layout and not arrays_alone:
        raise UserError(
            f"got --layout={options.layout} for the folder {target}, whose format has its own names; leave it out, or "
            "write a .safetensors or .npz file"
        )
    loaded = load_checkpoint(options, num_classes=options.num_classes, in_channels=options.in_channels)
    if arrays_alone:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_described(target, LAYOUTS[options.layout or "timm"](loaded.name, loaded.variables), loaded.describe())
    else:
        loaded.save(target, overwrite=options.overwrite)
    print(f"{target}: {_summary(loaded)}")


def _summary(loaded: Pretrained) -> str:
    leaves = [np.asarray(x) for x in flax.traverse_util.flatten_dict(dict(loaded.variables)).values()]
    size = sum(x.nbytes for x in leaves) / 1e6
    return f"{loaded.name}, {len(leaves)} arrays, {size:.1f} MB"
