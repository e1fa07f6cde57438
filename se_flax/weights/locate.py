"""From what a person calls a checkpoint to its file, network and preprocessing."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from se_flax.errors import UserError, closest
from se_flax.labels import imagenet_labels
from se_flax.preprocess import Preprocess
from se_flax.variant import Weights
from se_flax.weights import arguments, hub, keras_files
from se_flax.weights.names import meanings, network_of, our_name
from se_flax.zoo import VARIANTS, get_variant

OWN = "se_flax.json"
FORMAT = 1
SUFFIXES = (".safetensors", ".npz", ".h5", ".hdf5", ".pth", ".pt", ".bin", ".ckpt", ".tar")
_MAX_JSON = 16 << 20  # labels of 21,843 classes take one megabyte
# What timm's `model_args` may hold that changes nothing in evaluation.
_HARMLESS = {"drop_rate", "drop_path_rate", "drop_block_rate", "pretrained", "scriptable", "exportable"}


@dataclass(frozen=True)
class Source:
    """A checkpoint before its arrays are read.

    Attributes:
      name: the network.
      arrays: file or folder that holds them.
      preprocess: what belongs to it.
      arguments: for `create_model`, where it differs from the network's default.
      labels: names of the classes; None where nothing says.
      provenance: where it came from.
      digests: SHA-256 by relative path of the files under `arrays`, where they are recorded.
      bare: there is nothing but the arrays; how many classes they have shows in the classifier.
    """

    name: str
    arrays: Path
    preprocess: Preprocess
    arguments: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] | None = None
    bare: bool = False


def locate(
    ref: str | os.PathLike[str],
    *,
    name: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Source:
    """Finds a checkpoint.

    Args:
      ref: as for `load_pretrained`.
      name: the network, for files that do not say.
      revision: of a repository on the hub.
      cache_dir: of the hub.

    Returns:
      What is known about it without reading its arrays.

    Raises:
      UserError: it does not exist, cannot be told apart or describes itself wrongly.
    """
    text = os.fspath(ref)
    path = Path(text).expanduser()
    if path.exists():
        if revision is not None:
            raise UserError(f"got revision={revision!r} with {text}, which is no repository; leave it out")
        return (_folder if path.is_dir() else _file)(path, name)
    if text.endswith(SUFFIXES) or text.startswith((".", "~", "/")) or text.count("/") > 1 or "\\" in text:
        raise UserError(
            f"{text}: no such file or folder; give one, or a published checkpoint such as seresnet50.ra2_in1k"
        )
    repo = re.sub(r"^hf[-_]hub:", "", text)
    weights: Weights | None = None
    if "/" not in repo:
        architecture, weights = published(repo)
        _check_same_network(name, architecture, repo)
        if weights.hub_id is None:
            raise UserError(f"{text} is published at its authors' address only; download it and pass the file")
        repo = weights.hub_id
    try:
        fetched = hub.fetch(repo, revision, cache_dir)
    except UserError as error:
        if repo == text and "/" in text:  # it may have been meant as a path
            raise UserError(f"{text}: no such file or folder; as a repository, {error}") from error
        raise
    source = _timm_config(fetched.config, fetched.arrays, name, weights)
    provenance = {"source": f"https://huggingface.co/{repo}", "revision": fetched.revision, "sha256": fetched.sha256}
    if weights is not None:
        provenance["licence"] = weights.licence
    return replace(source, provenance=provenance)


def published(ref: str) -> tuple[str, Weights]:
    """A published checkpoint by `arch.tag`, or by `arch` where there is just one.

    Raises:
      UserError: no such network or tag, none published, or several to choose from.
    """
    head, _, tag = ref.partition(".")
    name = our_name(head, whole=True)
    if name is None:
        known = [*VARIANTS, *(f"{n}.{w.tag}" for n in VARIANTS for w in get_variant(n).weights)]
        raise UserError(
            f"unknown checkpoint {ref!r}; {closest(ref, known)} (no such file or folder either; se-flax list shows all)"
        )
    weights = get_variant(name).weights
    if not weights:
        raise UserError(f"no checkpoint of {name} is published; train one, or pass the path of a file")
    tags = {w.tag: w for w in weights}
    if not tag and len(tags) == 1:
        return name, weights[0]
    if tag not in tags:
        given = f"unknown checkpoint {ref!r}" if tag else f"{name} has several checkpoints"
        raise UserError(f"{given}; choose one of {', '.join(f'{name}.{t}' for t in tags)}")
    return name, tags[tag]


def default_preprocess(name: str, weights: Weights | None = None) -> Preprocess:
    """That of a checkpoint, else of the network's first one, else ImageNet's usual at the network's size."""
    rows = [weights] if weights else list(get_variant(name).weights)
    return Preprocess.of(rows[0]) if rows else Preprocess(image_size=get_variant(name).input_size)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file that nobody trusts.

    Raises:
      UserError: it is too large, or not a JSON object.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_JSON + 1)
        if len(raw) > _MAX_JSON:
            raise UserError(f"{path} has more than {_MAX_JSON >> 20} MB; this is not a checkpoint's description")
        data = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not readable JSON ({error}); save or download the checkpoint again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {type(data).__name__} instead of an object; save or download it again")
    return data


def _folder(path: Path, name: str | None) -> Source:
    if (path / OWN).is_file():
        return _own(path, name)
    if (path / "model" / OWN).is_file():  # a work directory of the training program
        return _own(path / "model", name)
    if (path / hub.CONFIG).is_file():
        arrays = next((path / file for file in hub.ARRAYS if (path / file).is_file()), None)
        if arrays is not None:
            return replace(_timm_config(path / hub.CONFIG, arrays, name, None), provenance={"source": str(path)})
    if name is None:
        raise UserError(
            f"{path} holds neither {OWN} (save_pretrained) nor {hub.CONFIG} with {hub.ARRAYS[0]} (timm); "
            "for a bare Orbax checkpoint say which network it is: name=..."
        )
    name = network_of(path, name)
    return Source(name, path, default_preprocess(name), provenance={"source": str(path)}, bare=True)


def _own(path: Path, name: str | None) -> Source:
    data = read_json(path / OWN)
    where = path / OWN
    if data.get("format") != FORMAT:
        raise UserError(f"{where} has format {data.get('format')!r}; this version reads {FORMAT}")
    architecture = _text(data, "architecture", where)
    _check_same_network(name, architecture, where)
    given, labels, digests = data.get("arguments", {}), data.get("labels"), data.get("digests")
    if not isinstance(given, dict) or not isinstance(digests, dict) or not isinstance(data.get("preprocess"), dict):
        raise UserError(f"{where} lacks arguments, preprocess or digests; save the checkpoint again")
    return Source(
        architecture,
        path / "variables",
        Preprocess.from_json(data["preprocess"]),
        {str(key): arguments.from_json(value) for key, value in given.items()},
        tuple(map(str, labels)) if isinstance(labels, list) else None,
        data["provenance"] if isinstance(data.get("provenance"), dict) else {},
        digests,
    )


def _timm_config(config: Path, arrays: Path, name: str | None, weights: Weights | None) -> Source:
    """A folder or repository that timm wrote: `config.json` beside the weights."""
    data = read_json(config)
    architecture = _text(data, "architecture", config)
    _check_same_network(name, architecture, config)
    cfg = data["pretrained_cfg"] if isinstance(data.get("pretrained_cfg"), dict) else data
    given: dict[str, Any] = {}
    classes = data.get("num_classes", cfg.get("num_classes", 1000))
    if classes != 1000 or "num_classes" in data:
        given["num_classes"] = classes
    for key, value in dict(data.get("model_args") or {}).items():
        if key in ("num_classes", "in_chans"):
            given["num_classes" if key == "num_classes" else "in_channels"] = value
        elif key not in _HARMLESS:
            raise UserError(f"{config} asks for {key}={value!r}, an argument of timm's that has no counterpart here")
    labels = data.get("label_names", cfg.get("label_names"))
    names = tuple(map(str, labels)) if isinstance(labels, list) and len(labels) == classes else None
    if names is None and classes == 1000:
        names = tuple(label.name for label in imagenet_labels())
    return Source(
        architecture, arrays, _timm_preprocess(cfg, config, default_preprocess(architecture, weights)), given, names
    )


def _timm_preprocess(cfg: Mapping[str, Any], where: Path, default: Preprocess) -> Preprocess:
    size = cfg.get("input_size", [3, default.image_size, default.image_size])
    if not (isinstance(size, list) and len(size) == 3 and size[1] == size[2]):
        raise UserError(f"{where} has input_size {size!r}; [channels, side, side] is needed")
    return Preprocess.from_json(
        {
            "image_size": size[1],
            "crop": cfg.get("crop_pct", default.crop),
            "crop_mode": cfg.get("crop_mode", default.crop_mode),
            "interpolation": cfg.get("interpolation", default.interpolation),
            "mean": cfg.get("mean", default.mean),
            "std": cfg.get("std", default.std),
        }
    )


def _file(path: Path, name: str | None) -> Source:
    """A bare file: the network is given, or read off the file's name."""
    provenance = {"source": str(path)}
    network = network_of(path, name)
    said = path.name if name is None else name
    spelled = (keras_files.network(said), keras_files.network(path.name))
    if network in spelled and path.suffix.lower() in keras_files.SUFFIXES:
        return Source(network, path, keras_files.preprocess(network), {}, _imagenet(), provenance, bare=True)
    tag = said.partition(".")[2]
    weights = next((w for w in get_variant(network).weights if tag.startswith(w.tag)), None)
    preprocess = default_preprocess(network, weights)
    imagenet = get_variant(network).attributes().get("num_classes", 1000) == 1000
    return Source(network, path, preprocess, {}, _imagenet() if imagenet else None, provenance, bare=True)


def _imagenet() -> tuple[str, ...]:
    return tuple(label.name for label in imagenet_labels())


def _text(data: Mapping[str, Any], key: str, where: Path) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where} has {key}={value!r}; the name of a network is needed")
    get_variant(value)
    return value


def _check_same_network(name: str | None, architecture: str, where: Path | str) -> None:
    if name is not None and architecture not in meanings(name):
        raise UserError(f"{where} is {architecture}, not the given name={name}; leave that out, or pass a bare file")
