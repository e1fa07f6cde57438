"""Resolution of a checkpoint reference to file, network and preprocessing."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from se_flax.checkpoints import description, hub, keras_files
from se_flax.checkpoints.atomic_folder import recover
from se_flax.checkpoints.description import completed, network_name, read_json
from se_flax.checkpoints.files import open_arrays
from se_flax.checkpoints.names import kind_of, meanings, network_of, our_name
from se_flax.errors import UserError, closest
from se_flax.images.labels import imagenet_labels
from se_flax.images.preprocess import SETTINGS, Preprocess
from se_flax.variant import Weights
from se_flax.zoo import VARIANTS, get_variant

OWN = "se_flax.json"
SUFFIXES = (".safetensors", ".npz", ".h5", ".hdf5", ".pth", ".pt", ".bin", ".ckpt", ".tar")
# Arguments in timm's `model_args` without effect in evaluation.
_HARMLESS = {"drop_rate", "drop_path_rate", "drop_block_rate", "pretrained", "scriptable", "exportable"}


@dataclass(frozen=True)
class Source:
    """A checkpoint before its arrays are read.

    Attributes:
      name: the network.
      arrays: file or folder of the arrays.
      preprocess: its preprocessing, with settings that are not in the metadata marked as assumed.
      arguments: for `create_model`, if the network differs from its default.
      labels: names of the classes; None if unknown.
      labels_assumed: whether the labels are ImageNet's by assumption, since the network was designed for it.
      provenance: origin of the weights.
      digests: recorded SHA-256 of the files under `arrays`, by relative path; None without a record.
      bare: whether there is no metadata; then the classifier tells the number of classes.
    """

    name: str
    arrays: Path
    preprocess: Preprocess
    arguments: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] | None = None
    bare: bool = False
    labels_assumed: bool = False


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
      name: the network, for files without metadata.
      revision: of a repository on the hub.
      cache_dir: of the hub.

    Returns:
      Network, files and metadata; the arrays are not read.

    Raises:
      UserError: the checkpoint does not exist, the reference is ambiguous, or the metadata is invalid.
    """
    text = os.fspath(ref)
    path = Path(text).expanduser()
    recover(path)
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
    """A published checkpoint by `arch.tag`, or by `arch` if there is just one.

    Raises:
      UserError: there is no such network or tag, no published checkpoint, or several to choose from.
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
    """A checkpoint's preprocessing; without one, marked as assumed, that of the network's first or ImageNet's."""
    if weights is not None:
        return Preprocess.of(weights)
    rows = get_variant(name).weights
    guess = Preprocess.of(rows[0]) if rows else Preprocess(image_size=get_variant(name).input_size)
    return replace(guess, assumed=SETTINGS)


def _folder(path: Path, name: str | None) -> Source:
    if (path / OWN).is_file():
        return _own(path, name)
    recover(path / "model")
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
    return _bare(path, name, default_preprocess(name))


def _own(path: Path, name: str | None) -> Source:
    where = path / OWN
    data = read_json(where)
    if "format" not in data:
        raise UserError(f"{where} has format None; this version reads {description.FORMAT}")
    said, digests = description.from_json(data, str(where)), data.get("digests")
    architecture = network_name(said.architecture, where)
    _check_same_network(name, architecture, where)
    if said.preprocess is None or "arguments" not in data or not isinstance(digests, dict):
        raise UserError(f"{where} lacks arguments, preprocess or digests; save the checkpoint again")
    preprocess = completed(said.preprocess, default_preprocess(architecture))
    arrays = path / "variables"
    return Source(architecture, arrays, preprocess, said.arguments, said.labels, said.provenance, digests)


def _timm_config(config: Path, arrays: Path, name: str | None, weights: Weights | None) -> Source:
    """A folder or repository in timm's format: `config.json` beside the weights."""
    data = read_json(config)
    architecture = network_name(data.get("architecture"), config)
    _check_same_network(name, architecture, config)
    cfg = data["pretrained_cfg"] if isinstance(data.get("pretrained_cfg"), dict) else data
    given: dict[str, Any] = {}
    classes = data.get("num_classes", cfg.get("num_classes", 1000))
    if classes != 1000 or "num_classes" in data:
        given["num_classes"] = classes
    arguments = data.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise UserError(f"{config} has model_args {arguments!r}; arguments by name are needed")
    for key, value in arguments.items():
        if key in ("num_classes", "in_chans"):
            given["num_classes" if key == "num_classes" else "in_channels"] = value
        elif key not in _HARMLESS:
            raise UserError(f"{config} asks for {key}={value!r}, an argument of timm's that has no counterpart here")
    labels = data.get("label_names", cfg.get("label_names"))
    names = tuple(map(str, labels)) if isinstance(labels, list) and len(labels) == classes else None
    if names is None and classes == 1000:
        names = tuple(label.name for label in imagenet_labels())
    return Source(architecture, arrays, _timm_preprocess(cfg, config, architecture, weights), given, names)


# timm's names of the settings and its defaults (`timm/models/_pretrained.py`).
_TIMM = {"crop": "crop_pct", "crop_mode": "crop_mode", "interpolation": "interpolation", "mean": "mean", "std": "std"}


def _timm_preprocess(cfg: Mapping[str, Any], where: Path, name: str, weights: Weights | None) -> Preprocess:
    said: dict[str, Any] = {"crop_mode": "center"}  # the only mode in older descriptions
    said |= {ours: cfg[theirs] for ours, theirs in _TIMM.items() if cfg.get(theirs) is not None}
    size = cfg.get("input_size")
    if size is not None:
        if not (isinstance(size, list) and len(size) == 3 and size[1] == size[2]):
            raise UserError(f"{where} has input_size {size!r}; [channels, side, side] is needed")
        said["image_size"] = size[1]
    side = default_preprocess(name).image_size
    return completed(said, Preprocess.of(weights) if weights else Preprocess(image_size=side, assumed=SETTINGS))


def _file(path: Path, name: str | None) -> Source:
    """A file of arrays, with its metadata."""
    found = description.of_file(path)
    if found is None:
        return _bare_file(path, name)
    said, where = found
    if said.architecture is not None:
        _check_same_network(name, said.architecture, where)
        name = said.architecture
    source = _bare_file(path, name)
    return replace(
        source,
        preprocess=source.preprocess if said.preprocess is None else completed(said.preprocess, source.preprocess),
        arguments=said.arguments,
        labels=said.labels if said.says_labels else source.labels,
        labels_assumed=not said.says_labels,
        provenance=said.provenance or source.provenance,
    )


def _bare_file(path: Path, name: str | None) -> Source:
    """A file without metadata; the network is given, or parsed from the file's name.

    The preprocessing is that of the published checkpoint with a timm file name; else Keras's, if the arrays have
    Keras's names; else that of the network's first checkpoint. Keras's is marked as assumed unless the file's name is
    Keras's too, and the last always.
    """
    network = network_of(path, name)
    weights = _published_in(name or "", network) or _published_in(path.name, network)
    preprocess = default_preprocess(network, weights)
    if (
        weights is None
        and network in keras_files.NETWORKS
        and path.suffix.lower() in (*keras_files.SUFFIXES, ".safetensors")
    ):
        with open_arrays(path) as arrays:
            if kind_of(arrays) == "keras":
                spelled = (keras_files.network(name or path.name), keras_files.network(path.name))
                preprocess = replace(keras_files.preprocess(network), assumed=() if network in spelled else SETTINGS)
    return _bare(path, network, preprocess)


def _bare(path: Path, name: str, preprocess: Preprocess) -> Source:
    imagenet = get_variant(name).attributes().get("num_classes", 1000) == 1000
    labels = _imagenet() if imagenet else None
    return Source(name, path, preprocess, {}, labels, {"source": str(path)}, bare=True, labels_assumed=True)


def _imagenet() -> tuple[str, ...]:
    return tuple(label.name for label in imagenet_labels())


def _published_in(words: str, name: str) -> Weights | None:
    """The published checkpoint of a network that a file name or a user's name means; None if there is none.

    timm's files are named `seresnet50.ra2_in1k.safetensors`, with the tag, or in older releases
    `seresnet50_ra2-c3c1a7f2.pth`, with the first part of a tag, which must be unique.
    """
    tags = {w.tag: w for w in get_variant(name).weights}
    word = re.split(r"[.-]", words.lower().partition(".")[2])[0]
    if word in tags:
        return tags[word]
    stem = words.lower().partition(".")[0].replace("-", "_")
    if not stem.startswith(name + "_"):
        return None
    word = re.split(r"[.-]", words.lower()[len(name) + 1 :])[0]
    begun = [w for tag, w in tags.items() if word and tag.startswith(word + "_")]
    return tags.get(word) or (begun[0] if len(begun) == 1 else None)


def _check_same_network(name: str | None, architecture: str, where: Path | str) -> None:
    if name is not None and architecture not in meanings(name):
        raise UserError(f"{where} is {architecture}, not the given name={name}; leave that out, or pass a bare file")
