"""`load_pretrained` and `save_pretrained`: a trained network with preprocessing, labels and provenance."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from se_flax import synonyms
from se_flax.checkpoints import keras, torch, torchvision
from se_flax.checkpoints.atomic_folder import atomic_folder, refuse_overwrite
from se_flax.checkpoints.convert import Layout, import_variables, sizes_in, unprefixed
from se_flax.checkpoints.description import Description, completed
from se_flax.checkpoints.files import open_arrays
from se_flax.checkpoints.names import kind_of
from se_flax.checkpoints.object_store import is_url, local_copy
from se_flax.checkpoints.resolve import OWN, SUFFIXES, Source, default_preprocess, locate
from se_flax.errors import UserError
from se_flax.images.preprocess import Preprocess
from se_flax.zoo import create_model

NATIVE = Layout("checkpoint", "/".join, lambda path, shape: shape, lambda path, value, shape: value)
"""Layout of our own checkpoints: `params/layer1_0/conv1/kernel`."""


@dataclass(frozen=True)
class Pretrained:
    """A trained network, ready to use.

    Attributes:
      name: of the network, one of `se_flax.list_models()`.
      model: the Linen module.
      variables: `{"params": ..., "batch_stats": ...}`, float32.
      preprocess: from images to the input of the network.
      labels: names of the classes in the order of the logits; None if unknown.
      arguments: arguments of `create_model` beside the name.
      provenance: origin of the weights, and their licence if known.
      notes: a sentence on each deviation from the checkpoint.
    """

    name: str
    model: nn.Module
    variables: Mapping[str, Any] = field(repr=False)
    preprocess: Preprocess
    labels: tuple[str, ...] | None = field(default=None, repr=False)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def describe(self) -> Description:
        """The metadata that is saved with the variables in every format."""
        return Description(
            self.name, self.arguments, self.preprocess.to_json(), self.labels, provenance=self.provenance
        )

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Saves variables and metadata; see `save_pretrained`."""
        save_pretrained(folder, self, overwrite=overwrite)


def load_pretrained(
    ref: str | os.PathLike[str],
    *,
    name: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **attributes: Any,
) -> Pretrained:
    """Restores a trained network with its preprocessing.

    Args:
      ref: a published checkpoint (`"seresnet50.ra2_in1k"`, or `"owner/name"` on the Hugging Face hub); a folder written
        by `save_pretrained`, by timm or by the training program; a `.safetensors`, `.npz`, `.h5` or `.weights.h5` file
        (`.pth` with PyTorch installed); the folder of an Orbax checkpoint; or one of these in a bucket, `gs://...` or
        `s3://...`, which is copied for as long as it is read. Names and layouts of timm, torchvision,
        Keras and se-flax are told apart by the arrays' names.
      name: the network, if neither metadata nor file name tells it.
      num_classes: number of classes. If it is not the checkpoint's, the classifier is initialised anew, with a sentence
        in `notes`; 0 is a network without classifier.
      in_channels: number of image channels. If it is not 3, the stem is adapted, with a sentence in `notes`.
      preprocess: preprocessing, or single settings by name (`{"image_size": 224}`), instead of the checkpoint's.
        Settings that neither gives are assumed as in a published checkpoint of the network; a warning and `notes` say
        so, and `preprocess.assumed` lists them.
      revision: branch, tag or commit on the hub.
      cache_dir: folder for downloads, instead of the hub's own (`HF_HOME`).
      **attributes: further arguments for `create_model`, such as `dtype` or `drop_path_rate`.

    Returns:
      Network, variables, preprocessing, labels and provenance.

    Raises:
      UserError: the checkpoint does not exist, cannot be read, is damaged, or does not fit the network.

    Examples:
      >>> loaded = se_flax.load_pretrained("seresnet50.ra2_in1k")  # doctest: +SKIP
      >>> logits = jax.jit(loaded.model.apply)(loaded.variables, loaded.preprocess("cat.jpg"))  # doctest: +SKIP
    """
    for key in attributes.keys() & synonyms.NETWORK.keys():  # before anything is fetched
        raise UserError(f"load_pretrained has no argument {key!r}; {synonyms.advice(key, synonyms.NETWORK.values())}")
    if is_url(os.fspath(ref)):
        with local_copy(os.fspath(ref), SUFFIXES, OWN) as copy:
            return load_pretrained(
                copy,
                name=name,
                num_classes=num_classes,
                in_channels=in_channels,
                preprocess=preprocess,
                revision=revision,
                cache_dir=cache_dir,
                **attributes,
            )
    source = locate(ref, name=name, revision=revision, cache_dir=cache_dir)
    if source.digests is not None:
        _check_digests(source.arrays, source.digests)
    given = {**source.arguments, **attributes}
    with open_arrays(source.arrays) as arrays:
        renamed, layout, names = _layout(source, arrays, given)
        if source.digests is None:  # the metadata, if any, may lack num_classes and in_channels
            given |= _unsaid_sizes(source, renamed, layout, given)
        variables, asked = import_variables(
            source.name, renamed, layout, num_classes=num_classes, in_channels=in_channels, attributes=given
        )
        notes = (*arrays.notes, *names, *asked)
    prepare = _prepare(source, preprocess)
    requested: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    given |= {key: value for key, value in requested.items() if value is not None}
    model = create_model(source.name, **given)
    channels = getattr(model, "in_channels", 3)
    prepare = prepare.for_channels(channels) if channels in (1, 4) else prepare
    labels = _labels(source, getattr(model, "num_classes", 0), num_classes)
    if prepare.assumed:
        assumption = _assumption(os.fspath(ref), prepare, labels is not None and source.labels_assumed)
        warnings.warn(assumption, stacklevel=2)
        notes = (*notes, assumption)
    return Pretrained(
        source.name,
        model,
        variables,
        prepare,
        labels,
        given,
        source.provenance,
        notes,
    )


def _layout(
    source: Source, arrays: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Layout, tuple[str, ...]]:
    """The arrays without a common prefix, their layout, and a sentence if a prefix was removed."""
    kind = kind_of(arrays)
    if kind == "keras":
        return keras.unprefixed(source.name, arrays)
    known = {"se-flax": NATIVE, "timm": torch.LAYOUT}
    return unprefixed(source.name, arrays, known.get(kind) or torchvision.layout(source.name, **given), given)


def _unsaid_sizes(
    source: Source, arrays: Mapping[str, Any], layout: Layout, given: Mapping[str, Any]
) -> dict[str, int]:
    """num_classes and in_channels that are not in the metadata, from the arrays, unless they are the defaults."""
    unsaid = ({"num_classes", "in_channels"} if source.bare else {"in_channels"}) - given.keys()
    found = sizes_in(source.name, {key: np.shape(x) for key, x in arrays.items()}, layout, given) if unsaid else {}
    model = create_model(source.name, **given)
    return {name: size for name, size in found.items() if name in unsaid and size != getattr(model, name)}


def _prepare(source: Source, given: Preprocess | Mapping[str, Any] | None) -> Preprocess:
    if isinstance(given, Preprocess):
        return given
    said = given or {}
    prepare = completed(said, source.preprocess)
    return replace(prepare, assumed=tuple(name for name in prepare.assumed if name not in said))


def _labels(source: Source, classes: int, asked: int | None) -> tuple[str, ...] | None:
    """Labels of the classes; None for a new classifier."""
    if source.labels is None or len(source.labels) == classes:
        return source.labels
    if asked is None and not source.labels_assumed:
        raise UserError(
            f"{source.arrays} has {classes} classes and is described with {len(source.labels)} labels; correct the "
            "description, or leave the labels out of it"
        )
    return None


def _assumption(subject: str, prepare: Preprocess, imagenet: bool) -> str:
    labels = "; its 1,000 classes are taken for ImageNet's" if imagenet else ""
    return (
        f"{subject} does not say how its images are prepared; assumed: {prepare.words(prepare.assumed)}{labels}; pass "
        "preprocess= (--image-size, --crop, --mean, ...) where that is wrong"
    )


def save_pretrained(
    folder: str | os.PathLike[str],
    model: Pretrained | str,
    variables: Mapping[str, Any] | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    preprocess: Preprocess | None = None,
    labels: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a network as a folder that `load_pretrained` reads on any number of devices, bit by bit.

    The folder holds the variables (an Orbax checkpoint) and `se_flax.json`: architecture, arguments, preprocessing,
    labels, provenance and the SHA-256 of every file. It appears as a whole or not at all.

    Args:
      folder: the folder to write.
      model: a `Pretrained`; or the name of a network, with the arguments that follow.
      variables: `{"params": ..., "batch_stats": ...}`.
      arguments: arguments of `create_model` beside the name.
      preprocess: None assumes that of the network's published weights, with a warning now and at loading.
      labels: names of the classes in the order of the logits.
      provenance: origin of the weights; JSON-able.
      overwrite: replaces an existing checkpoint.

    Raises:
      UserError: the folder exists already, the variables do not fit the network, or an argument cannot be saved.
    """
    if isinstance(model, Pretrained):
        loaded = model
        changes: dict[str, Any] = {
            "variables": variables,
            "arguments": arguments,
            "preprocess": preprocess,
            "labels": tuple(labels) if labels is not None else None,
            "provenance": provenance,
        }
        loaded = replace(loaded, **{key: value for key, value in changes.items() if value is not None})
    elif variables is None:
        raise UserError("got a network's name without its variables; pass save_pretrained(folder, name, variables)")
    else:
        loaded = Pretrained(
            model,
            create_model(model, **(arguments or {})),
            variables,
            preprocess or default_preprocess(model),
            tuple(labels) if labels is not None else None,
            arguments or {},
            provenance or {},
        )
    folder = Path(folder).expanduser()
    refuse_overwrite(folder, overwrite, sign=OWN, what="a saved checkpoint")
    host = jax.tree.map(np.asarray, dict(loaded.variables))
    _check_variables(loaded, host)
    description = loaded.describe().to_json()
    with atomic_folder(folder) as building:
        _save_orbax(building / "variables", host)
        description["digests"] = digests(building / "variables")
        (building / OWN).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    if preprocess is None and isinstance(model, str):
        warnings.warn(_assumption(str(folder), loaded.preprocess, False), stacklevel=2)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _check_digests(folder: Path, recorded: Mapping[str, str]) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; save or download the checkpoint again")
    found = digests(folder)
    if found != dict(recorded):
        wrong = sorted(key for key in found.keys() | recorded.keys() if found.get(key) != recorded.get(key))
        raise UserError(
            f"{folder} is damaged: {wrong[0]!r} is not as it was saved ({len(wrong)} such files); "
            "save or download the checkpoint again"
        )


def _check_variables(loaded: Pretrained, host: Mapping[str, Any]) -> None:
    """Checks variables as on import, before anything is written, so that the checkpoint can be loaded."""
    arrays = {"/".join(path): value for path, value in flax.traverse_util.flatten_dict(host).items()}
    import_variables(loaded.name, arrays, NATIVE, attributes=loaded.arguments)
    classes = getattr(loaded.model, "num_classes", None)
    if loaded.labels is not None and classes is not None and len(loaded.labels) != classes:
        raise UserError(f"got {len(loaded.labels)} labels for {classes} classes; give one each, or none")


def _save_orbax(path: Path, host: Mapping[str, Any]) -> None:
    import orbax.checkpoint as ocp  # slow to import; loading a timm file does not need it

    # This host alone writes; without this setting Orbax would wait for the other hosts of a run.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix="save")
    options = alone if jax.process_count() > 1 else ocp.options.MultiprocessingOptions()
    with ocp.StandardCheckpointer(multiprocessing_options=options) as checkpointer:
        checkpointer.save(path.absolute(), host)
