"""Strict conversion of named arrays to variables: every key is used once, every variable filled, every shape equal.

Two deviations are possible on request and noted: for another number of classes the classifier is initialised anew; for
another number of image channels the stem is adapted. A prefix that all keys have is removed by `unprefixed`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from se_flax.checkpoints.array_file import BFLOAT16, is_raw_bfloat16
from se_flax.checkpoints.mismatch import mismatch_report
from se_flax.checkpoints.prefix import best_prefix, common_prefixes, outer_part, taken_off, without
from se_flax.errors import UserError
from se_flax.nn.network import Network, Path, lies_in
from se_flax.zoo import create_model, get_variant

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Names and layout of a network's variables in another library.

    Attributes:
      what: a set of arrays in this layout, for messages: `state dict`.
      key: from a variable's path (collection first) to its key.
      shape: from path and our shape to the shape in this layout.
      to_ours: from path, array in this layout and our shape to the array in our layout.
      ignored: from the keys of all variables to further keys that are not imported.
    """

    what: str
    key: Callable[[Path], str]
    shape: Callable[[Path, Shape], Shape]
    to_ours: Callable[[Path, np.ndarray, Shape], np.ndarray]
    ignored: Callable[[Mapping[str, Path]], set[str]] = lambda targets: set()

    def without(self, prefix: str) -> "Layout":
        """The same layout for keys without a prefix, which its messages mention."""
        return replace(self, what=f"{self.what} without the prefix {prefix!r}")


def variable_shapes(model: nn.Module, image_size: int) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shapes of a network's variables, without computing them.

    Args:
      model: a network.
      image_size: height and width of the images to trace it with.

    Returns:
      Shape and dtype by path (collection first).
    """
    images = jax.ShapeDtypeStruct((1, image_size, image_size, getattr(model, "in_channels", 3)), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return flax.traverse_util.flatten_dict(variables)


def import_variables(
    name: str,
    arrays: Mapping[str, Any],
    layout: Layout,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    attributes: Mapping[str, Any] = {},
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fills a network's variables from arrays in another layout.

    Names and shapes are compared before any array is read.

    Args:
      name: the network.
      arrays: arrays by key: objects with `shape` and `__array__`.
      layout: layout of the arrays.
      num_classes: of the network; if the arrays have another number, the classifier is initialised anew.
      in_channels: of the network; from 3 to 1 the stem's kernel is summed over the colours, from 3 to another number
        the colours are repeated and scaled by 3 / in_channels (timm's `adapt_input_conv`).
      attributes: as given to `create_model`, if the network differs from its default.

    Returns:
      The variables (float32 on the default device), and a sentence on each deviation.

    Raises:
      UserError: keys are missing, unexpected or of another shape; one message lists all and says what to do.
    """
    size = get_variant(name).input_size
    requested: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    attributes = {**attributes, **{key: value for key, value in requested.items() if value is not None}}
    model = create_model(name, **attributes)
    shapes = variable_shapes(model, size)
    head = {} if num_classes is None else _head(model, size, shapes)
    stem = set() if in_channels is None else _stem(model, shapes)

    targets = {layout.key(path): path for path in shapes}
    given = {key: tuple(np.shape(array)) for key, array in arrays.items()}
    wanted = {path: tuple(layout.shape(path, leaf.shape)) for path, leaf in shapes.items()}
    fits = {path for key, path in targets.items() if given.get(key) == wanted[path]}
    # If only part of the classifier fits, such as its bias, all of it is initialised.
    redrawn = head.keys() & shapes.keys() if head.keys() - fits else set()
    colours = {path: _with_channels(shapes[path].shape, 3, in_channels or 3) for path in stem & shapes.keys()}
    adapted = {
        path: shape
        for path, shape in colours.items()
        if path not in fits and given.get(layout.key(path)) == tuple(layout.shape(path, shape))
    }
    settled = fits | redrawn | adapted.keys()
    missing = [key for key, path in targets.items() if key not in given and path not in settled]
    wrong = [
        f"{key} {given[key]} instead of {wanted[path]}"
        for key, path in targets.items()
        if key in given and path not in settled
    ]
    known = targets.keys() | layout.ignored(targets) | {layout.key(path) for path in head}
    unexpected = [key for key in given if key not in known]
    if missing or unexpected or wrong:
        unsettled = {path for path in targets.values() if path not in settled}
        advice = _advice(name, given, layout, attributes, unsettled, unexpected)
        raise UserError(mismatch_report(name, missing, unexpected, wrong, layout.what) + advice)

    flat: dict[Path, Any] = {}
    for key, path in targets.items():
        if path in redrawn:
            continue
        source = adapted.get(path, shapes[path].shape)
        value = layout.to_ours(path, _numbers(key, arrays[key]), source)
        if path in adapted:
            value = adapt_channels(value, in_channels or 3)
        flat[path] = jnp.asarray(value, shapes[path].dtype)
    notes = []
    if redrawn or any(layout.key(path) in given for path in head.keys() - fits):
        flat.update(_draw(model, size, redrawn) if redrawn else {})
        classes = _classes(head, given, layout)
        before = f"{classes:,} classes" if classes else "none"
        after = f"initialised anew for {num_classes:,} classes" if redrawn else "left out"
        notes.append(f"{name}: the classifier was {after} (the checkpoint's: {before})")
    if adapted:
        rule = "summed over the colours" if in_channels == 1 else f"its colours repeated and scaled by 3/{in_channels}"
        notes.append(f"{name}: the stem was adapted from 3 channels to {in_channels} ({rule})")
    return flax.traverse_util.unflatten_dict(flat), tuple(notes)


def unprefixed(
    name: str, arrays: Mapping[str, Any], layout: Layout, attributes: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Layout, tuple[str, ...]]:
    """Removes a prefix that all keys have, if the keys fit the network without it.

    Args:
      name: the network.
      arrays: arrays by key.
      layout: layout of the arrays.
      attributes: as for `import_variables`.

    Returns:
      The arrays by the shorter keys, the layout (which mentions the prefix in its messages), and a sentence on the
      prefix; without such a prefix the arguments and no sentence.
    """
    prefixes = common_prefixes(arrays)
    if len(prefixes) == 1:
        return arrays, layout, ()
    known = known_keys(name, layout, attributes)
    prefix = best_prefix(prefixes, lambda prefix: len(known & without(arrays, prefix).keys()))
    if not prefix:
        return arrays, layout, ()
    return without(arrays, prefix), layout.without(prefix), (taken_off(prefix),)


def known_keys(name: str, layout: Layout, attributes: Mapping[str, Any]) -> set[str]:
    """Keys of a network's variables in a layout; arguments as for `import_variables`."""
    shapes = variable_shapes(create_model(name, **attributes), get_variant(name).input_size)
    return {layout.key(path) for path in shapes}


def sizes_in(name: str, shapes: Mapping[str, Shape], layout: Layout, attributes: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of classes and image channels of a checkpoint, by the shapes of its classifier and stem.

    Args:
      name: the network.
      shapes: of the arrays, by key.
      layout: layout of the arrays.
      attributes: as for `import_variables`.

    Returns:
      `num_classes` and `in_channels`, without those that the arrays do not tell (`num_classes` without a classifier).
    """
    model, size = create_model(name, **attributes), get_variant(name).input_size
    ours = variable_shapes(model, size)
    classes = _classes(_head(model, size, ours), shapes, layout)
    found = {} if classes is None else {"num_classes": classes}
    for path in _stem(model, ours):
        if len(ours[path].shape) != 4:  # beside the kernel
            continue
        shape, pixels = shapes.get(layout.key(path), ()), ours[path].shape[-2] // model.in_channels
        fitting = [
            n // pixels
            for n in shape
            if n % pixels == 0
            and tuple(layout.shape(path, _with_channels(ours[path].shape, n // pixels, model.in_channels))) == shape
        ]
        found |= {"in_channels": fitting[0]} if fitting else {}
    return found


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A stem's kernel for another number of image channels; the output for a grey image stays the same.

    timm's rule (`timm/models/_manipulate.py`, `adapt_input_conv`).

    Args:
      kernel: HWIO with I = 3, or a multiple of it where the stem reads squares of pixels (the channels of one pixel
        after the other's).
      channels: 1 (the sum over the colours), or any other number (the colours repeated, times 3 / channels).

    Returns:
      HWIO with I = channels, or as many times more.
    """
    height, width, inputs, outputs = kernel.shape
    kernel = kernel.reshape(height, width, inputs // 3, 3, outputs)
    if channels == 1:
        return kernel.sum(axis=-2)
    repeated = np.tile(kernel, (1, 1, 1, math.ceil(channels / 3), 1))[..., :channels, :]
    return (repeated * np.float32(3 / channels)).reshape(height, width, -1, outputs)


def _with_channels(shape: Shape, channels: int, now: int) -> Shape:
    """The shape of a stem's kernel for other channels than `now`; the stem may read several pixels at once."""
    return (*shape[:-2], shape[-2] // now * channels, shape[-1]) if len(shape) == 4 else shape


def _head(model: Network, size: int, shapes: Mapping[Path, Any]) -> dict[Path, Any]:
    """Shapes of the classifier's variables; for a network without a classifier those of one with a single class."""
    if not getattr(model, "num_classes", 1):
        shapes = variable_shapes(model.clone(num_classes=1), size)
    return {path: leaf for path, leaf in shapes.items() if lies_in(path[1:], model.head_path)}


def _stem(model: Network, shapes: Mapping[Path, Any]) -> set[Path]:
    """Variables of the convolution that reads the images."""
    return {path for path in shapes if lies_in(path[1:], model.stem_path)}


def _classes(head: Mapping[Path, Any], given: Mapping[str, Shape], layout: Layout) -> int | None:
    """Number of classes of the classifier among arrays of given shapes; None without a classifier."""
    for path, leaf in head.items():
        if path[-1] != "kernel":  # a norm before it has as many values as there are features
            continue
        shape = given.get(layout.key(path), ())
        for classes in shape:
            if tuple(layout.shape(path, (*leaf.shape[:-1], classes))) == shape:
                return classes
    return None


def _advice(
    name: str,
    given: Mapping[str, Shape],
    layout: Layout,
    attributes: Mapping[str, Any],
    unsettled: set[Path],
    unexpected: list[str],
) -> str:
    """Advice on arrays that do not fit: the end of a sentence, with a leading `; `, or nothing."""
    model, size = create_model(name, **attributes), get_variant(name).input_size
    ours = variable_shapes(model, size)
    head, stem = _head(model, size, ours).keys(), _stem(model, ours)
    rest = unsettled - head - stem
    if rest or unexpected:
        outer = outer_part(map(layout.key, rest), unexpected)
        beside = next((key for key in unexpected if not key.startswith(outer)), "")
        return f"; the missing keys are under {outer!r}, beside {beside!r}: save only them" if outer else ""
    found = sizes_in(name, given, layout, attributes)
    advice = ""
    if unsettled & stem and "in_channels" in found:
        channels = found["in_channels"]
        advice += f"; its stem takes {channels} channel{'s' * (channels != 1)}: pass in_channels={channels}"
    if unsettled & head and "num_classes" in found:
        advice += f"; its classifier has {found['num_classes']} classes: pass num_classes={found['num_classes']}"
    elif unsettled & head and not any(layout.key(path) in given for path in head):
        advice += "; it has no classifier: pass num_classes=0 for a network without one, or the classes of a new one"
    return advice


def _numbers(key: str, array: Any) -> np.ndarray:
    """An array of real numbers; `|V2` is read as bfloat16."""
    value = np.asarray(array)
    if is_raw_bfloat16(value.dtype):
        return value.view(BFLOAT16)
    if not jnp.issubdtype(value.dtype, jnp.number) or jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise UserError(f"{key} has dtype {value.dtype}; give an array of real numbers, such as float32 or bfloat16")
    return value


def _draw(model: nn.Module, size: int, paths: set[Path]) -> dict[Path, jax.Array]:
    """Initial values of some variables; XLA does not compute the others."""
    images = jnp.zeros((1, size, size, getattr(model, "in_channels", 3)))

    def draw(key: jax.Array) -> list[jax.Array]:
        flat = flax.traverse_util.flatten_dict(model.init(key, images))
        return [flat[path] for path in sorted(paths)]

    return dict(zip(sorted(paths), jax.jit(draw)(jax.random.key(0)), strict=True))
