"""What the fuzzer calls: for each format seeds that our own writers or its library made, mutations, and our reader."""

import contextlib
import importlib
import importlib.util
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import se_flax
from se_flax.checkpoints import description, orbax, resolve
from se_flax.checkpoints.files import write_arrays
from se_flax.errors import MOST, UserError
from se_flax.images.class_names import ClassNames
from se_flax.images.preprocess import Preprocess
from train import validate
from train.cli import parse
from train.ctr import config as ctr_config
from train.ctr.encode import fit
from train.ctr.sources import open_splits

from . import mutations
from .fuzz_folders import (
    checkpoint_seeds,
    folder_seeds,
    in_checkpoint,
    pictures,
    read_all,
    run_checkpoint,
    run_folder,
    run_image,
)

assert orbax  # imports it for its coverage


@dataclass(frozen=True)
class Target:
    """A format.

    Attributes:
      seeds: makes valid inputs; the folder is empty.
      mutate: changes one.
      run: writes an input into an empty folder and reads it; raises UserError for what is refused.
      mebibytes: of address space that an input may take beyond the imports.
      needs: a module without which the format is not read.
    """

    seeds: Callable[[Path], list[bytes]]
    mutate: mutations.Mutation
    run: Callable[[bytes, Path], None]
    mebibytes: int = 512
    needs: str = ""


ARRAYS = {
    "params/stem/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "batch_stats/stem/mean": np.ones(4, np.float32),
    "half": np.ones((2, 2), np.float16),
    "count": np.asarray(7, np.int64),
}


def _read(suffix: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        path = folder / f"x{suffix}"
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            description.of_file(path)
        read_all(path)

    return run


def _written(suffix: str, write: Callable[[Path], None]) -> Callable[[Path], list[bytes]]:
    def seeds(folder: Path) -> list[bytes]:
        write(folder / f"x{suffix}")
        return [(folder / f"x{suffix}").read_bytes()]

    return seeds


def _write_safetensors(path: Path) -> None:
    described = description.Description("seresnet20", {"num_classes": 3}, labels=("a", "b", "c"))
    description.write_described(path, ARRAYS, described)


def _npz_seeds(folder: Path) -> list[bytes]:
    write_arrays(folder / "x.npz", ARRAYS)
    packed = io.BytesIO()
    np.savez_compressed(packed, **ARRAYS)
    return [(folder / "x.npz").read_bytes(), packed.getvalue()]


_H5_TYPES = (
    "f4",
    "f8",
    "f2",
    "i8",
    "u1",
    "?",
    ">f4",
    "c8",
    "S3",
    "V2",
    h5py.string_dtype(),
    h5py.ref_dtype,
    [("a", "f4")],
)


def _h5_file(rng: random.Random) -> bytes:
    """A file with groups, datasets, filters and links that are drawn."""
    # Not in a BytesIO, whose Python callbacks outlive what h5py refuses here, and keep the memory.
    with h5py.File("x", "w", driver="core", backing_store=False, libver=rng.choice((None, None, "latest"))) as file:
        groups = [file]
        for _ in range(rng.randrange(1, 8)):
            group, name = rng.choice(groups), rng.choice(("w", "a", "b/c", "é", *mutations.TEXTS[:12]))
            with contextlib.suppress(Exception):  # what h5py itself refuses
                kind = rng.randrange(9)
                if kind == 0:
                    groups.append(group.create_group(name))
                elif kind == 1:
                    group[name] = rng.choice(groups)
                elif kind == 2:
                    group[name] = rng.choice((h5py.SoftLink("/w"), h5py.ExternalLink("x.h5", "/w"), np.dtype("f4")))
                elif kind == 3:
                    group.attrs[name] = mutations.odd(rng)
                else:
                    shape = rng.choice(((), (3,), (2, 2), (0, 4), (40,), (10 ** rng.randrange(2, 13),), None))
                    options: dict[str, Any] = {}
                    if shape and rng.random() < 0.5:
                        options["chunks"] = tuple(rng.choice((1, 7, 100, 10**6)) for _ in shape)
                        options["maxshape"] = tuple(None for _ in shape)
                        options["compression"] = rng.choice((None, "gzip", "lzf"))
                        options |= {key: True for key in ("shuffle", "fletcher32") if rng.random() < 0.3}
                    made = group.create_dataset(name, shape, rng.choice(_H5_TYPES), **options)
                    if shape and np.prod(shape) < 10**6 and rng.random() < 0.8:
                        made[...] = rng.choice((0, 1, b"x"))
        file.flush()
        image: bytes = file.id.get_file_image()
        return image


def _mutate_h5(data: bytes, rng: random.Random) -> bytes:
    made = _h5_file(rng) if rng.random() < 0.2 else data
    return made if made is not data and rng.random() < 0.5 else mutations.blind(made, rng)


def _h5_seeds(folder: Path) -> list[bytes]:
    found = []
    for options in ({}, {"chunks": True, "compression": "gzip", "shuffle": True}):
        with h5py.File(folder / "x.h5", "w") as file:
            for name, array in ARRAYS.items():
                file.create_dataset(name, data=array, **(options if array.ndim else {}))
        found.append((folder / "x.h5").read_bytes())
    return found


def _torch_seeds(_: Path) -> list[bytes]:
    torch = importlib.import_module("torch")
    state = {name.replace("/", "."): torch.from_numpy(array.copy()) for name, array in ARRAYS.items()}
    found = []
    for new in (True, False):
        for content in (state, {"state_dict": state, "epoch": 3}):
            out = io.BytesIO()
            torch.save(content, out, _use_new_zipfile_serialization=new)
            found.append(out.getvalue())
    return found


# --- Text -------------------------------------------------------------------------------------------------------------


def _json_seeds(_: Path) -> list[bytes]:
    arguments = {"num_classes": 3, "attention": se_flax.ECA, "stages": (3, 4), "dtype": np.dtype("float32")}
    said = description.Description(
        "seresnet20", arguments, Preprocess(image_size=8).to_json(), ("a", "b", "c"), True, {"licence": "mit"}
    )
    ours = said.to_json() | {"digests": {"x": "0" * 64}}
    sizes = {
        "input_size": [3, 40, 40],
        "crop_pct": 0.9,
        "interpolation": "bilinear",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    timm = {"architecture": "seresnet50", "num_classes": 2, "pretrained_cfg": sizes, "label_names": ["a", "b"]}
    written = {"architecture": "seresnet50", "preprocess": {"image_size": 224, "crop": 0.95}, "labels": ["cat"]}
    timm["model_args"] = {"in_chans": 1, "drop_rate": 0.1}
    return [json.dumps(each).encode() for each in (ours, timm, written)]


def _run_json(data: bytes, folder: Path) -> None:
    for name in ("own/se_flax.json", "timm/config.json", "bare/x.npz.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(data)
    (folder / "timm/model.safetensors").touch()
    (folder / "bare/x.npz").touch()
    refused = []
    for name in ("own", "timm", "bare/x.npz"):
        try:
            found = resolve.locate(folder / name)
            se_flax.create_model(found.name, **found.arguments)
        except UserError as error:
            refused.append(error)
            _check(error)
    if len(refused) == 3:
        raise refused[0]


def _check(error: UserError) -> None:
    text = str(error)
    if "\n" in text or len(text) > MOST:
        raise AssertionError(f"a message of {len(text)} characters and {len(text.splitlines())} lines") from error


def _label_seeds(_: Path) -> list[bytes]:
    labels = [
        ["cat", "dog, hound"],
        ["grade 1", "grade 2", "3.5"],
        ["1", "0"],
        ["é", "AB-", "A/B"],
        ["n01440764 x", "ß"],
    ]
    return [json.dumps({"labels": each, "names": each}).encode() for each in labels]


def _run_labels(data: bytes, folder: Path) -> None:
    path = folder / "x.json"
    path.write_bytes(data)
    given = description.read_json(path)
    labels = description.from_json(given, str(path)).labels
    names = ClassNames(labels, len(labels or ()) or 5)
    wanted = given.get("names")
    wanted = [str(name) for name in wanted] if isinstance(wanted, list) else []
    for name in wanted:
        with contextlib.suppress(UserError):
            names.described(names.one(name))
    names.classes(dict.fromkeys(wanted), repr)


CSV = b'label,I1,I2,C1\n1,3,0.5,red\n0,,2,"a, ""b"""\n0,10,-1,\n1,3,nan,red\n'


def _encode(data: Any) -> None:
    ctr_config.check(ctr_config.Config(data=data))
    table = open_splits(data).train
    encoder = fit(table, data)
    for chunk in table.read():
        encoder(chunk.columns)
    json.dumps(encoder.to_json()).encode()


def _tables(kind: str, suffix: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        path = folder / f"x{suffix}{'.gz' if data.startswith(bytes((0x1F, 0x8B))) else ''}"
        path.write_bytes(data)
        _encode(
            ctr_config.Data(
                train=f"{kind}:{path}{':t' if kind == 'npz' else ''}",
                numeric="I1-I2" if kind == "csv" else "",
                categorical="C1" if kind == "csv" else "",
                chunk_rows=3,
                bucketing="quantile" if len(data) % 2 else "log",
                encoding="vocabulary" if len(data) % 2 else "hash",
            )
        )

    return run


def _gzip(data: bytes) -> bytes:
    return importlib.import_module("gzip").compress(data, mtime=0)


def _table_npz(_: Path) -> list[bytes]:
    found = []
    for save in (np.savez, np.savez_compressed):
        out = io.BytesIO()
        save(out, t_ids=np.arange(8).reshape(4, 2), t_y=np.asarray([0, 1, 1, 0]))
        found.append(out.getvalue())
    return found


OVERRIDES = (
    "images\ndata.batch_size=32\noptim.learning_rate=0.5\noptim.boundaries=(30,60)\naugment.pad=2\ndata.mean=(0.5,0.5,0.5)",
    "images\noptim.name=lamb\noptim.schedule=step\noptim.boundaries=(1,2)\nepochs=3\ncheckpoint.keep_last=1\nmodel.num_classes=10\nprecision=bf16",
    "images\ndata.crop_scale=(0.2,1)\naugment.mixup=0.2\neval_tta=flip\noptim.ema_decay=0.9\ndata.source=folder:x",
    "tables\ndata.numeric=I1-I13\ndata.categorical=C1-C26\nmodel.hidden=(400,400)\ndata.train=csv:x\noptim.l2=1e-5",
)
RECIPES = {
    "images": 'from train.config import Config\n\ndef get_config():\n    return Config(init_from="x")\n',
    "tables": "from train.ctr.config import Config\n\ndef get_config():\n    return Config()\n",
}


def _run_overrides(data: bytes, folder: Path) -> None:
    # As the system hands over words: without NUL, undecodable bytes as surrogates.
    kind, *lines = data.replace(b"\x00", b"").decode("utf-8", "surrogateescape").split("\n")
    kind = kind if kind in RECIPES else "images"
    recipe = folder.parent / f"{kind}.py"
    if not recipe.exists():
        recipe.write_text(RECIPES[kind])
    config, _ = parse([f"--config={recipe}", "--workdir=x", *(f"--config.{line}" for line in lines)])
    if kind == "tables":
        ctr_config.check(config)
        for names in (config.data.numeric, config.data.categorical, config.data.columns):
            ctr_config.expand(names)
        return
    config.model.name = ""  # a known name would be traced, which takes a second
    config.init_from = "x"
    validate.check_settings_of_run(config)


def _prefixed_seed(_: Path) -> list[bytes]:
    return [text.encode() for text in OVERRIDES]


_npz_members = mutations.zipped(lambda _: mutations.npy)

TARGETS: dict[str, Target] = {
    "safetensors": Target(_written(".safetensors", _write_safetensors), mutations.safetensors, _read(".safetensors")),
    "npz": Target(_npz_seeds, _npz_members, _read(".npz")),
    "h5": Target(_h5_seeds, _mutate_h5, _read(".h5")),
    "pth": Target(_torch_seeds, mutations.zipped(lambda _: mutations.blind), _read(".pth"), needs="torch"),
    "checkpoint JSON": Target(_json_seeds, mutations.as_json, _run_json),
    "zarr and OCDBT": Target(checkpoint_seeds, mutations.zipped(in_checkpoint, 0.02), run_checkpoint, 4096),
    "config overrides": Target(_prefixed_seed, mutations.table, _run_overrides),
    "images": Target(lambda _: pictures(), mutations.image, run_image, 2048),
    "image folders": Target(folder_seeds, mutations.zipped(lambda _: mutations.image, 0.02), run_folder, 2048),
    "label maps": Target(_label_seeds, mutations.as_json, _run_labels),
    "CSV": Target(lambda _: [CSV, _gzip(CSV)], mutations.table, _tables("csv", ".csv")),
    "libsvm": Target(
        lambda _: [b"# x\n1 266:1 1244:1\n\n-1 0:7:1 9\n0 138:1.0 1296:1\n"], mutations.table, _tables("libsvm", ".txt")
    ),
    "tables in npz": Target(_table_npz, _npz_members, _tables("npz", ".npz")),
}


def seeds_of(target: Target, folder: Path) -> list[bytes]:
    """Valid inputs; the folder is emptied afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    found = target.seeds(folder)
    shutil.rmtree(folder)
    return found


def missing(target: Target) -> str:
    """The module that is not installed, if one is needed."""
    return target.needs if target.needs and importlib.util.find_spec(target.needs) is None else ""
