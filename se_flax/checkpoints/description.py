"""Checkpoint metadata as JSON: network, arguments, preprocessing, labels, provenance.

It stands in `se_flax.json` of a saved folder, in the header of a .safetensors file (metadata under `se_flax`), and
beside every other file of arrays: `weights.npz` is described by `weights.npz.json`. So it goes along with every
conversion, and can be written by hand for files from elsewhere: every key may be left out there.

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
    """What a source says of itself.

    Attributes:
      architecture: name of the network; None where it does not say.
      arguments: for `create_model`.
      preprocess: settings by name, see `se_flax.Preprocess.to_json`; None where it does not say.
      labels: names of the classes in the order of the logits; None where there are none.
      says_labels: whether it speaks of labels at all.
      provenance: where the weights came from.
    """

    architecture: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] | None = None
    labels: tuple[str, ...] | None = None
    says_labels: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a file.

        Raises:
          UserError: an argument of the network that cannot be saved.
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
      data: of a file that nobody trusts.
      where: it stands, for messages.

    Raises:
      UserError: another format, or a value that is not what it should be.
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
    """Preprocessing of which a source says a part.

    Args:
      said: settings by name.
      default: what fills in the others; those that it only assumes stay marked so.

    Raises:
      UserError: unknown names, or values of the wrong kind.
    """
    filled = {name for name in SETTINGS if name not in said}
    marked = said.get("assumed") or ()
    assumed = [name for name in SETTINGS if name in marked or (name in filled and name in default.assumed)]
    return Preprocess.from_json({**default.to_json(), **said, "assumed": assumed})


def network_name(value: Any, where: object) -> str:
    """The name of a network as a description gives it.

    Raises:
      UserError: it is none.
    """
    if not isinstance(value, str):
        raise UserError(f"{where} has architecture={value!r}; the name of a network is needed")
    get_variant(value)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file that nobody trusts.

    Raises:
      UserError: it is too large, or not a JSON object.
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
    """Where the description of a file of arrays stands that has no room for it."""
    return path.with_name(path.name + ".json")


def of_file(path: Path) -> tuple[Description, str] | None:
    """What a file of arrays says of itself, in its own header or else in the JSON beside it, and where it says so.

    Args:
      path: an existing file.

    Returns:
      None where nothing is said.

    Raises:
      UserError: the file or the JSON is damaged, or the JSON is of another file.
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
    """Writes arrays with what belongs to them; `of_file` finds it.

    Args:
      path: ends in `.safetensors`, whose header takes the description, or in `.npz`, which gets a JSON file beside it.
      arrays: as for `se_flax.checkpoints.files.write_arrays`.
      description: what belongs to them.

    Raises:
      UserError: as `write_arrays`; an argument of the network that cannot be saved.
    """
    path, data = Path(path), description.to_json()
    if path.suffix.lower() == ".safetensors":
        write_arrays(path, arrays, metadata={KEY: json.dumps(data)})
        return
    write_arrays(path, arrays)
    # Bound to these very bytes: arrays that take the file's place later shall not inherit its preprocessing.
    data["sha256"] = _sha256(path)
    with replacing(beside(path)) as stream:
        stream.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file that can") from error
