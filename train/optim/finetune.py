"""Fine-tuning: a run that starts from a checkpoint's weights and takes settings that are left empty from it."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

import se_flax
from se_flax.errors import UserError, respelled
from se_flax.images.class_folders import canonical
from se_flax.nn.network import lies_in
from train.build import attention_attributes
from train.config import IMAGENET_MEAN, IMAGENET_STD, INTERPOLATION, NETWORK, Config

# Attributes of the network that the run's settings define, not the checkpoint.
_OWN = ("num_classes", "classifier", "in_channels", "dtype", "drop_rate", "drop_path_rate", "parent", "name")
# Settings that may be left empty; their final values are saved with the run.
_OPEN = ("model.name", "data.mean", "data.std", "data.interpolation")


def load(config: Config, num_classes: int) -> Any:
    """Loads the checkpoint that a run starts from.

    Args:
      config: the settings, with `init_from`.
      num_classes: of the data; a classifier with another number of classes is initialised anew.

    Returns:
      A `se_flax.Pretrained`.

    Raises:
      UserError: there is no such checkpoint, it is of another network than `model.name`, or does not fit it.
    """
    name, attributes = config.model.name or None, attention_attributes(config)
    if config.loss.name == "cross_entropy":  # a checkpoint's CosineClassifier is replaced
        attributes["classifier"] = nn.Dense
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = se_flax.load_pretrained(config.init_from, name=name, num_classes=num_classes, **attributes)
    except UserError as error:
        given = f" with model.name={name}" if name else ""
        text = respelled(str(error), {"name=": "--config.model.name=", "num_classes=": "--config.model.num_classes="})
        raise UserError(f"init_from={config.init_from}{given}: {text}") from error
    for warning in caught:
        if str(warning.message) not in loaded.notes:  # `describe` prints the notes
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if config.model.name not in ("", loaded.name):
        raise UserError(
            f"init_from={config.init_from} holds {loaded.name}, but model.name is {config.model.name!r}; "
            "leave it empty (--config.model.name=) to take the checkpoint's network, or name another checkpoint"
        )
    return loaded if config.loss.name == "cross_entropy" else _without_bias(loaded)


def _without_bias(loaded: Any) -> Any:
    """The checkpoint without the classifier's bias, which a `CosineClassifier` does not have."""
    params = flax.traverse_util.flatten_dict(dict(loaded.variables["params"]))
    layers = [path[:-1] for path in params if lies_in(path, loaded.model.head_path) and path[-1] == "kernel"]
    biases = [params.pop((*layer, "bias"), jnp.zeros(1)) for layer in layers]
    note = f"{loaded.name}: the classifier's bias was left out, as cosines have none"
    notes = (*loaded.notes, note) if any(jnp.any(bias != 0) for bias in biases) else loaded.notes
    variables = {**loaded.variables, "params": flax.traverse_util.unflatten_dict(params)}
    return dataclasses.replace(loaded, variables=variables, notes=notes)


def complete(config: Config, saved: Mapping[str, Any] | None, loaded: Any) -> Config:
    """Fills in the settings that were left empty.

    Args:
      config: the settings as given.
      saved: flattened settings of the run that is continued, or None.
      loaded: checkpoint that a new run starts from, or None.

    Returns:
      A copy with the network's name, mean, std and interpolation as given; else from the continued run; else from the
      checkpoint; else SE-ResNet-18, ImageNet's mean and std, and bilinear.
    """
    values: dict[str, Any] = {
        "model.name": NETWORK,
        "data.mean": IMAGENET_MEAN,
        "data.std": IMAGENET_STD,
        "data.interpolation": INTERPOLATION,
    }
    if loaded is not None:
        mean, std = _pixels(config, loaded.preprocess)
        interpolation = loaded.preprocess.interpolation
        values = {"model.name": loaded.name, "data.mean": mean, "data.std": std, "data.interpolation": interpolation}
    if saved is not None:
        values = {name: saved[name] for name in _OPEN}
    sections: dict[str, Any] = {"model": config.model, "data": config.data}
    for name, value in values.items():
        section, field = name.split(".")
        if not getattr(sections[section], field):
            value = tuple(value) if isinstance(value, list) else value
            sections[section] = dataclasses.replace(sections[section], **{field: value})
    return dataclasses.replace(config, **sections)


def check_fit(config: Config, model: nn.Module, shapes: Mapping[str, Any], loaded: Any) -> None:
    """Compares the checkpoint's network with that of the run.

    Args:
      config: the completed settings, for the message.
      model: the network of the run.
      shapes: shapes of its variables.
      loaded: the checkpoint, from `load`.

    Raises:
      UserError: an attribute differs, such as the placement of the attention, or names or shapes of variables differ.
    """
    remedy = "set model.attention to what the checkpoint was trained with, or train from scratch without init_from"
    for field in dataclasses.fields(model):
        ours, theirs = (_described(getattr(network, field.name)) for network in (model, loaded.model))
        if field.name not in _OWN and ours != theirs:
            raise UserError(
                f"init_from={config.init_from} has a network with {field.name}={theirs}, this run {ours}; {remedy}"
            )
    wanted = flax.traverse_util.flatten_dict(dict(shapes), sep="/")
    given = flax.traverse_util.flatten_dict(dict(loaded.variables), sep="/")
    wrong = sorted(
        name
        for name in wanted.keys() | given.keys()
        if getattr(wanted.get(name), "shape", None) != getattr(given.get(name), "shape", None)
    )
    if wrong:
        shown = ", ".join(wrong[:4]) + (f", ... ({len(wrong)} in all)" if len(wrong) > 4 else "")
        raise UserError(
            f"init_from={config.init_from} does not fit {config.model.name}: missing, unexpected or of another shape "
            f"are {shown}; {remedy}"
        )


def _described(value: Any) -> str:
    """An attribute of a network as text, for comparison: partials compare by identity, their texts do not."""
    if isinstance(value, partial | type):
        made, keywords = (value.func, value.keywords) if isinstance(value, partial) else (value, {})
        # The axis belongs to the training program, not to the network.
        given = (f"{key}={_described(x)}" for key, x in sorted(keywords.items()) if key != "axis_name")
        return f"{made.__name__}({', '.join(given)})"
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def as_arrays(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Loaded variables as plain dictionaries of float32 arrays, with both collections."""
    trees = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), trees)


def describe(config: Config, loaded: Any) -> Iterator[str]:
    """Messages on the checkpoint that a new run starts from.

    Args:
      config: the completed settings.
      loaded: the checkpoint, from `load`.
    """
    data, of = config.data, loaded.preprocess
    yield f"starting from {config.init_from} ({loaded.name})"
    yield from loaded.notes
    yield f"images: mean {_shown(data.mean)}, std {_shown(data.std)}, {data.interpolation}"
    mean, std = _pixels(config, of)
    there = {"mean": mean, "std": std, "interpolation": of.interpolation, "image_size": of.image_size}
    there |= {"eval_crop_fraction": of.crop, "exif_orientation": of.exif_orientation}
    for name, value in there.items():
        here = getattr(data, name)
        if _shown(here) != _shown(value):
            yield f"data.{name} is {_shown(here)} here and {_shown(value)} in the checkpoint"


def describe_classes(loaded: Any, class_names: Sequence[str]) -> Iterator[str]:
    """Message on a classifier that was kept since the number of classes is the same, but whose classes are others.

    Args:
      loaded: the checkpoint, from `load`.
      class_names: of the data.
    """
    # Without labels the classifier is new, or its classes are unknown.
    pairs = enumerate(zip(map(canonical, loaded.labels or ()), map(canonical, class_names), strict=False))
    other = next(((i, there, here) for i, (there, here) in pairs if there != here), None)
    if other is not None:
        i, there, here = other
        yield (
            f"the classifier starts from the checkpoint's, as it has {len(class_names)} classes too, but others: "
            f"class {i} is {there!r} there and {here!r} here"
        )


def _pixels(config: Config, of: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of a checkpoint, converted to RGB images in [0, 1] as in the training step.

    Raises:
      UserError: the checkpoint takes images with other channels or another colour order.
    """
    if of.color_order != "rgb" or len(of.mean) != 3:
        raise UserError(
            f"init_from={config.init_from} takes images with {len(of.mean)} channels in the order {of.color_order}, "
            "and the training program has RGB only; start from another checkpoint"
        )
    return tuple(x / of.input_max for x in of.mean), tuple(x / of.input_max for x in of.std)


def _shown(value: Any) -> str:
    return "(" + ", ".join(f"{x:g}" for x in value) + ")" if isinstance(value, tuple | list) else str(value)
