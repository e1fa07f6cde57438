"""`load_pretrained` and `save_pretrained`: a trained network with everything that belongs to it."""

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
from se_flax.checkpoints import keras, torch
from se_flax.checkpoints.atomic_folder import atomic_folder, refuse_overwrite
from se_flax.checkpoints.convert import Layout, import_variables, sizes_in, unprefixed
from se_flax.checkpoints.description import Description, completed
from se_flax.checkpoints.files import open_arrays
from se_flax.checkpoints.names import kind_of
from se_flax.checkpoints.resolve import OWN, Source, default_preprocess, locate
from se_flax.errors import UserError
from se_flax.images.preprocess import Preprocess
from se_flax.zoo import create_model

NATIVE = Layout("checkpoint", "/".join, lambda path, shape: shape, lambda path, value, shape: value)
"""Our own names: `params/layer1_0/conv1/kernel`."""


@dataclass(frozen=True)
class Pretrained:
    """A trained network, ready to use.

    Attributes:
      name: the network's, one of `se_flax.list_models()`.
      model: the Linen module.
      variables: `{"params": ..., "batch_stats": ...}`, float32.
      preprocess: from images to what the network takes.
      labels: the classes' names in the order of the logits; None where the checkpoint does not say.
      arguments: what `create_model` was given beside the name.
      provenance: where the weights came from, and their licence where known.
      notes: a sentence on each thing that is not as in the checkpoint.
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
        """What is saved beside the variables, whatever they are converted to."""
        return Description(
            self.name, self.arguments, self.preprocess.to_json(), self.labels, provenance=self.provenance
        )

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Saves all of it; see `save_pretrained`."""
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
        (`.pth` with PyTorch installed); or the folder of an Orbax checkpoint. Names and layouts of timm, Keras and
        se-flax are told apart by the arrays' names.
      name: the network, where neither folder nor file name says it.
      num_classes: another number of classes than the checkpoint's draws the classifier anew, 0 leaves it out; `notes`
        says so.
      in_channels: another number of image channels than 3 adapts the stem; `notes` says so.
      preprocess: how images are prepared, or single settings of it by name (`{"image_size": 224}`), instead of what the
        checkpoint says. Where neither says it, that of a published checkpoint of the network is assumed; a warning and
        `notes` say so, and `preprocess.assumed` names the settings.
      revision: branch, tag or commit on the hub.
      cache_dir: of downloads, instead of the hub's own (`HF_HOME`).
      **attributes: further arguments for `create_model`, such as `dtype` or `drop_path_rate`.

    Returns:
      Network, variables, preprocessing, labels and provenance.

    Raises:
      UserError: nothing there, not readable, damaged, or not the weights of that network.

    Examples:
      >>> loaded = se_flax.load_pretrained("seresnet50.ra2_in1k")  # doctest: +SKIP
      >>> logits = jax.jit(loaded.model.apply)(loaded.variables, loaded.preprocess("cat.jpg"))  # doctest: +SKIP
    """
    for key in attributes.keys() & synonyms.NETWORK.keys():  # before anything is fetched
        raise UserError(f"load_pretrained has no argument {key!r}; {synonyms.advice(key, synonyms.NETWORK.values())}")
    source = locate(ref, name=name, revision=revision, cache_dir=cache_dir)
    if source.digests is not None:
        _check_digests(source.arrays, source.digests)
    given = {**source.arguments, **attributes}
    with open_arrays(source.arrays) as arrays:
        renamed, layout, names = _layout(source, arrays, given)
        if source.digests is None:  # nothing, or a program that does not always write it, says how large its ends are
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
    """The arrays by the names of a layout, whose names these are, and a sentence where a prefix was taken off."""
    kind = kind_of(arrays)
    if kind == "keras":
        return keras.unprefixed(source.name, arrays)
    return unprefixed(source.name, arrays, NATIVE if kind == "se-flax" else torch.LAYOUT, given)


def _unsaid_sizes(
    source: Source, arrays: Mapping[str, Any], layout: Layout, given: Mapping[str, Any]
) -> dict[str, int]:
    """Numbers of classes and channels that only the arrays say; where they are the network's own, none."""
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
    """The classes' names; those of another classifier belong to nobody."""
    if source.labels is None or len(source.labels) == classes:
        return source.labels
    if asked is None and not source.labels_assumed:
        raise UserError(
            f"{source.arrays} has {classes} classes and is described with {len(source.labels)} labels; mend the "
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
      folder: where to.
      model: what `load_pretrained` returned; or a network's name, with what follows.
      variables: `{"params": ..., "batch_stats": ...}`.
      arguments: what `create_model` was given beside the name.
      preprocess: None assumes that of the network's published weights; a warning says so, now and when it is loaded.
      labels: the classes' names in the order of the logits.
      provenance: JSON-able notes on where the weights came from.
      overwrite: replace a checkpoint that is there already.

    Raises:
      UserError: the folder exists already, the variables are not those of the network, or an argument cannot be saved.
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
    """What is saved must load: the same check as on import, before anything is written."""
    arrays = {"/".join(path): value for path, value in flax.traverse_util.flatten_dict(host).items()}
    import_variables(loaded.name, arrays, NATIVE, attributes=loaded.arguments)
    classes = getattr(loaded.model, "num_classes", None)
    if loaded.labels is not None and classes is not None and len(loaded.labels) != classes:
        raise UserError(f"got {len(loaded.labels)} labels for {classes} classes; give one each, or none")


def _save_orbax(path: Path, host: Mapping[str, Any]) -> None:
    import orbax.checkpoint as ocp  # slow to import; loading a file of timm's does not need it

    # One host writes what it holds; without this Orbax would wait for the other hosts of a run to save as well.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix="save")
    options = alone if jax.process_count() > 1 else ocp.options.MultiprocessingOptions()
    with ocp.StandardCheckpointer(multiprocessing_options=options) as checkpointer:
        checkpointer.save(path.absolute(), host)
