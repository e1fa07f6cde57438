"""Checkpoint metadata as JSON: network, arguments, preprocessing, labels, provenance.

The metadata is in `se_flax.json` of a saved folder, in the header of a .safetensors file (under `se_flax`), and in a
JSON file beside any other file of arrays: `weights.npz.json` describes `weights.npz`. Conversions keep it. For files
from elsewhere it can be written by hand, with any key left out:

    {"architecture": "seresnet50", "preprocess": {"image_size": 224, "crop": 0.95}, "labels": ["cat", "dog"]}
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from se_flax.checkpoints import model_json as argument_json
from se_flax.checkpoints.files import open_arrays, replacing, write_arrays
from se_flax.errors import UserError
from se_flax.images.preprocess import SETTINGS, Preprocess
from se_flax.version import __version__
from se_flax.zoo import get_variant

FORMAT = 1
KEY = "se_flax"
_MAX_JSON = 16 << 20  # labels of 21,843 classes take one megabyte


@dataclass(frozen=True)
class Description:
    """Metadata of a checkpoint.

    Attributes:
      architecture: name of the network; None if unknown.
      arguments: for `create_model`.
      preprocess: settings by name, see `se_flax.Preprocess.to_json`; None if unknown.
      labels: names of the classes in the order of the logits; None without labels.
      says_labels: whether the metadata has the key `labels`, possibly null.
      provenance: origin of the weights.
    """

    architecture: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] | None = None
    labels: tuple[str, ...] | None = None
    says_labels: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The metadata as plain data, for a file.

        Raises:
          UserError: an argument of the network cannot be saved.
        """
        return {
            "format": FORMAT,
            "se_flax": __version__,
            "architecture": self.architecture,
            "arguments": {key: argument_json.to_json(value) for key, value in self.arguments.items()},
            "preprocess": None if self.preprocess is None else dict(self.preprocess),
            "labels": list(self.labels) if self.labels is not None else None,
            "provenance": dict(self.provenance),
        }


def from_json(data: Mapping[str, Any], where: str) -> Description:
    """The inverse of `Description.to_json`; any key may be missing.

    Args:
      data: content of an untrusted file.
      where: the file, for messages.

    Raises:
      UserError: the format is another, or a value is invalid.
    """
    if data.get("format", FORMAT) != FORMAT:
        raise UserError(f"{where} has format {data['format']!r}; this version reads {FORMAT}")
    kinds = {"arguments": dict, "preprocess": dict, "labels": list, "provenance": dict}
    for key, kind in kinds.items():
        if not isinstance(data.get(key), kind | None):
            wanted = "a list of names" if kind is list else "an object"
            raise UserError(f"{where} has {key}={data[key]!r}; {wanted} is needed, or null"[:400])
    architecture = data.get("architecture")
    return Description(
        None if architecture is None else network_name(architecture, where),
        {str(key): argument_json.from_json(value) for key, value in (data.get("arguments") or {}).items()},
        data.get("preprocess"),
        None if data.get("labels") is None else tuple(map(str, data["labels"])),
        "labels" in data,
        data.get("provenance") or {},
    )


def completed(said: Mapping[str, Any], default: Preprocess) -> Preprocess:
    """Preprocessing with some settings given and the others from a default.

    Args:
      said: the given settings, by name.
      default: the other settings; those marked as assumed stay so.

    Raises:
      UserError: a name is unknown, or a value invalid.
    """
    filled = {name for name in SETTINGS if name not in said}
    marked = said.get("assumed") or ()
    assumed = [name for name in SETTINGS if name in marked or (name in filled and name in default.assumed)]
    return Preprocess.from_json({**default.to_json(), **said, "assumed": assumed})


def network_name(value: Any, where: object) -> str:
    """The name of a network in a description.

    Raises:
      UserError: the value is not a string.
    """
    if not isinstance(value, str):
        raise UserError(f"{where} has architecture={value!r}; the name of a network is needed")
    get_variant(value)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from an untrusted file.

    Raises:
      UserError: the file is too large, or not a JSON object.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_JSON + 1)
    except OSError as error:
        raise UserError(f"{path} is not readable JSON ({error}); save or download the checkpoint again") from error
    return _parsed(raw, str(path))


def _parsed(raw: bytes | str, where: str) -> dict[str, Any]:
    if len(raw) > _MAX_JSON:
        raise UserError(f"{where} has more than {_MAX_JSON >> 20} MB; this is not a checkpoint's description")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not readable JSON ({error}); save or download the checkpoint again") from error
    if not isinstance(data, dict):
        raise UserError(f"{where} holds {type(data).__name__} instead of an object; save or download it again")
    return data


def beside(path: Path) -> Path:
    """Path of the JSON file that describes a file of arrays, for formats without a header for metadata."""
    return path.with_name(path.name + ".json")


def of_file(path: Path) -> tuple[Description, str] | None:
    """Metadata of a file of arrays, from its header or the JSON file beside it.

    Args:
      path: an existing file.

    Returns:
      The metadata and the path of the file it was read from; None without metadata.

    Raises:
      UserError: the file or the JSON is damaged, or the JSON belongs to another file.
    """
    if path.suffix.lower() == ".safetensors":
        with open_arrays(path) as arrays:
            text = arrays.metadata.get(KEY)
        if text is not None:
            where = f"the header of {path}"
            return from_json(_parsed(text, where), where), str(path)
    file = beside(path)
    if not file.is_file():
        return None
    data = read_json(file)
    if "sha256" in data and data["sha256"] != _sha256(path):
        raise UserError(
            f"{file} describes another file than {path}, which was replaced or damaged since; convert it again, or "
            f"remove {file.name}"
        )
    return from_json(data, str(file)), str(file)


def write_described(path: str | os.PathLike[str], arrays: Mapping[str, Any], description: Description) -> None:
    """Writes arrays with their metadata, which `of_file` reads.

    Args:
      path: ends in `.safetensors`, with the metadata in its header, or in `.npz`, with the metadata in a JSON file
        beside it.
      arrays: as for `se_flax.checkpoints.files.write_arrays`.
      description: the metadata.

    Raises:
      UserError: as for `write_arrays`; or an argument of the network cannot be saved.
    """
    path, data = Path(path), description.to_json()
    if path.suffix.lower() == ".safetensors":
        write_arrays(path, arrays, metadata={KEY: json.dumps(data)})
        return
    write_arrays(path, arrays)
    # Binds the metadata to these bytes: other arrays written to this path later must not inherit it.
    data["sha256"] = _sha256(path)
    with replacing(beside(path)) as stream:
        stream.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file that can") from error
