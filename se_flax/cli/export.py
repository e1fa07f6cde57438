"""`se-flax export`: a checkpoint as a network for serving."""

import argparse
from pathlib import Path
from typing import Any

from se_flax.cli.checkpoints import add_checkpoint, add_preprocessing, load_checkpoint
from se_flax.export.serving import FORMATS, export_pretrained


def add_commands(commands: Any) -> None:
    """Adds the command of this file to an argument parser."""
    parser = commands.add_parser(
        "export",
        help="a network for serving: StableHLO, ONNX or SavedModel",
        description="Writes a folder with the network, its weights inside, and serving.json: input, output, "
        "preprocessing and labels. The batch size stays free. stablehlo runs in JAX on CPU, CUDA and TPU from one "
        "file; onnx in ONNX Runtime and others; savedmodel in TensorFlow.",
    )
    add_checkpoint(parser)
    parser.add_argument("target", metavar="DST", help="a new folder")
    parser.add_argument("--format", choices=tuple(FORMATS), default="stablehlo", help="(default: stablehlo)")
    add_preprocessing(parser)
    parser.add_argument("--no-fuse", action="store_true", help="leave the batch norms beside their convolutions")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at DST")
    parser.set_defaults(run=export)


def export(options: argparse.Namespace) -> None:
    """Writes the network and says what it is.

    Raises:
      UserError: no such checkpoint, DST is taken, or a package is missing.
    """
    written = export_pretrained(
        options.target,
        load_checkpoint(options),
        format=options.format,
        fuse=not options.no_fuse,
        overwrite=options.overwrite,
    )
    folder = Path(options.target).expanduser()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    shapes = " -> ".join(f"[{', '.join(map(str, written[key]['shape']))}]" for key in ("input", "output"))
    print(f"{folder}: {written['architecture']}, {written['format']}, {shapes}, {size:.1f} MB")
    if "difference" in written:
        apart = written["difference"]
        print(
            "not checked: ONNX Runtime is not installed (pip install onnxruntime)"
            if apart is None
            else f"ONNX Runtime differs from JAX by {apart:.1g} of the largest logit"
        )
