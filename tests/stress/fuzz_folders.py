"""Folders and images for the fuzzer. A folder's input is a ZIP archive of its files."""

import contextlib
import importlib
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from se_flax.checkpoints.files import open_arrays
from se_flax.cli.labelled import labelled_images
from se_flax.errors import UserError
from se_flax.images.preprocess import Preprocess
from train.config import Data
from train.data.examples import PrepareEval, PrepareTrain
from train.data.sources import FolderSource, ImageData

from . import mutations


def read_all(path: Path) -> None:
    with open_arrays(path) as arrays:
        for array in arrays.values():
            np.asarray(array)


def _packed(folder: Path) -> bytes:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return mutations.archive([(path.relative_to(folder).as_posix(), path.read_bytes()) for path in files])


def _unpack(data: bytes, folder: Path) -> None:
    """Writes files of an archive; one that a file system cannot have, or that leads out of the folder, is left out."""
    try:
        content = mutations.members(data)
    except Exception:
        raise UserError("no folder") from None
    for name, raw in content:
        path = folder / name
        if ".." in path.parts or not path.is_relative_to(folder):
            continue
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            if path.is_symlink() or not path.parent.resolve().is_relative_to(folder.resolve()):
                continue  # a link, or behind one
            path.parent.mkdir(parents=True, exist_ok=True)
            if raw.startswith(b"-> "):
                path.symlink_to(raw[3:].decode())
            else:
                path.write_bytes(raw)


def checkpoint_seeds(folder: Path) -> list[bytes]:
    ocp = importlib.import_module("orbax.checkpoint")
    found = []
    tree = {
        "params": {"stem": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4)}},
        "batch_stats": {"mean": np.ones((2, 2), np.float16)},
    }
    for ocdbt in (True, False):
        path = folder / str(ocdbt)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
            checkpointer.save(path, tree)
        shutil.rmtree(path / "ocdbt.process_0", ignore_errors=True)  # merged already
        found.append(_packed(path))
    return found


def in_checkpoint(name: str) -> mutations.Mutation:
    if name.endswith(("METADATA", ".zarray", "_sharding")):
        return mutations.as_json
    return mutations.sealed if "ocdbt" in name or name.startswith("d/") else mutations.blind


def run_checkpoint(data: bytes, folder: Path) -> None:
    _unpack(data, folder)
    read_all(folder)


def picture(kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).save(out, kind, **options)
    return out.getvalue()


def pictures() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        ("PNG", {}),
        ("JPEG", {"exif": exif}),
        ("JPEG", {"progressive": True}),
        ("BMP", {}),
        ("GIF", {}),
        ("PPM", {}),
    ]
    kinds += [
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {}),
        ("AVIF", {}),
    ]
    return [picture(kind, **options) for kind, options in kinds if kind in Image.registered_extensions().values()]


def run_image(data: bytes, folder: Path) -> None:
    (folder / "1.jpg").write_bytes(data)
    source = FolderSource(str(folder), ("1.jpg",), (0,))
    refused = None
    for crop in ("random_resized", "center", "resize"):
        settings = Data(image_size=8, train_crop=crop)
        try:
            PrepareTrain(source, settings)(0, np.random.default_rng(0))
            PrepareEval(source, settings)(0)
        except UserError as error:
            refused = error
    if refused:
        raise refused
    Preprocess(image_size=8).pixels(folder / "1.jpg")


def folder_seeds(_: Path) -> list[bytes]:
    small = picture("PNG")
    plain = [("cat/1.png", small), ("cat/2.png", small), ("dog/1.png", small), ("dog/x/2.png", small)]
    split = [(f"{part}/{name}", small) for part in ("train", "val") for name, _ in plain]
    linked = [*plain, ("dog/link", b"-> ../cat"), ("dog/3.png", b"-> ../cat/1.png"), ("other", b"-> cat")]
    named = [("n01440764_1.png", small), ("0_1.png", small), ("12_x.JPEG", small)]
    return [mutations.archive(files) for files in (plain, split, linked, named)]


def run_folder(data: bytes, folder: Path) -> None:
    _unpack(data, folder)
    settings = Data(source=f"folder:{folder}", image_size=8, eval_fraction=0.5)
    for labels in (None, ("cat", "dog"), ("n01440764 tench", "cat", "0")):
        with contextlib.suppress(UserError), contextlib.redirect_stderr(io.StringIO()):
            labelled_images(folder, labels, len(labels or "ab"))
    splits = ImageData(settings).open()
    for i in range(min(4, len(splits.train))):
        PrepareTrain(splits.train, settings)(i, np.random.default_rng(i))
