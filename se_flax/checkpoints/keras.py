"""Weights of keras.applications <-> Linen variables, by one table of layers.

A key is `<layer>/<weight>` with Keras 3's names: `block4a_se_reduce/kernel`, `conv_1_bn/gamma`. The networks are the
same, so the name of a Keras layer follows from our module:

| ours | EfficientNet, EfficientNetV2 | MobileNetV3 |
|---|---|---|
| `conv_stem`, `bn1` | `stem_conv`, `stem_bn` | `conv`, `conv_bn` |
| `blocks_3_0/...` | `block4a_...` | `expanded_conv_6_...` |
| `.../se/conv_reduce` | `..._se_reduce` | `..._squeeze_excite_conv` |
| `.../se/conv_expand` | `..._se_expand` | `..._squeeze_excite_conv_1` |
| last 1x1 convolution before the pooling, norm | `top_conv`, `top_bn` | `conv_1`, `conv_1_bn` |
| 1x1 convolution after the pooling | | `conv_2` |
| `classifier` | `predictions` | `logits`, a 1x1 convolution |

EfficientNet numbers the stages from 1 and the blocks of a stage by letters; MobileNetV3 numbers all blocks from 0.
Depthwise kernels are HWC1 in Keras and HW1C here; all other layouts are equal. In Keras 2, and so in the published
files, a depthwise kernel is `depthwise_kernel`, and MobileNetV3's layers are `Conv_1/BatchNorm` and
`expanded_conv_6/depthwise`. Both kinds of names are read.

Keras has the normalisation of images inside the network; here it is in `Preprocess` (`keras_files.preprocess`).
Variables of the layer `normalization` (mean, variance, count) and of an optimizer are ignored.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

from se_flax.backbones.efficientnet import EfficientNet, attention_by_row
from se_flax.checkpoints.convert import Layout, Path, Shape, import_variables
from se_flax.checkpoints.prefix import best_prefix, common_prefixes, taken_off, without
from se_flax.errors import UserError, closest
from se_flax.nn.mobile import ConvBlock, DepthwiseSeparable, FusedInvertedResidual, InvertedResidual
from se_flax.zoo import create_model, get_variant

APPLICATIONS: Mapping[str, str] = {
    **{f"tf_efficientnet_b{i}": f"EfficientNetB{i}" for i in range(8)},
    **{f"tf_efficientnetv2_{size}": f"EfficientNetV2{size.upper()}" for size in (*("b0", "b1", "b2", "b3"), *"sml")},
    **{
        f"tf_mobilenetv3_{size}_{ours}": f"MobileNetV3{size.title()}{arguments}"
        for size in ("small", "large")
        for ours, arguments in (("100", ""), ("075", "(alpha=0.75)"), ("minimal_100", "(minimalistic=True)"))
    },
}
"""The supported networks of keras.applications, by our name."""

# Submodules of each kind of block in the order of the computation, with EfficientNet's names for them.
_SE = (("se/conv_reduce", "se_reduce"), ("se/conv_expand", "se_expand"))
_BLOCKS: dict[Any, tuple[tuple[str, str], ...]] = {
    ConvBlock: (("conv", "project_conv"), ("bn1", "project_bn")),
    DepthwiseSeparable: (
        *(("conv_dw", "dwconv"), ("bn1", "bn")),
        *_SE,
        *(("conv_pw", "project_conv"), ("bn2", "project_bn")),
    ),
    InvertedResidual: (
        *(("conv_pw", "expand_conv"), ("bn1", "expand_bn"), ("conv_dw", "dwconv"), ("bn2", "bn")),
        *_SE,
        *(("conv_pwl", "project_conv"), ("bn3", "project_bn")),
    ),
    FusedInvertedResidual: (
        *(("conv_exp", "expand_conv"), ("bn1", "expand_bn")),
        *_SE,
        *(("conv_pwl", "project_conv"), ("bn2", "project_bn")),
    ),
}
_MOBILE = {
    "expand_conv": "expand",
    "expand_bn": "expand/BatchNorm",
    "dwconv": "depthwise",
    "bn": "depthwise/BatchNorm",
    "se_reduce": "squeeze_excite/Conv",
    "se_expand": "squeeze_excite/Conv_1",
    "project_conv": "project",
    "project_bn": "project/BatchNorm",
    "stem_conv": "Conv",
    "stem_bn": "Conv/BatchNorm",
    "top_conv": "Conv_1",
    "top_bn": "Conv_1/BatchNorm",
    "head_conv": "Conv_2",
    "predictions": "Logits",
}
# Weights of each Keras layer class in Keras's order, with our names of the leaves.
_WEIGHTS: dict[str, dict[str, str]] = {
    "conv2d": {"kernel": "kernel", "bias": "bias"},
    "depthwise_conv2d": {"kernel": "kernel"},
    "batch_normalization": {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"},
    "dense": {"kernel": "kernel", "bias": "bias"},
    "normalization": {"mean": "", "variance": "", "count": ""},
}
_IGNORED = frozenset(f"normalization/{weight}" for weight in _WEIGHTS["normalization"])
_OPTIMIZER = ("optimizer/", "optimizer_weights/")


class _Layer(NamedTuple):
    """A Keras layer: our module, its class in snake case, Keras 2's name, whether the network has it."""

    module: Path
    kind: str
    keras2: str
    present: bool = True

    @property
    def name(self) -> str:
        return self.keras2.replace("/BatchNorm", "_bn").replace("/", "_").lower()


@dataclass(frozen=True)
class _Network:
    """The layers of a network that have weights, in the order of the computation.

    Attributes:
      layers: all possible layers, including attention and classifier.
      mobile: whether the network is a MobileNetV3.
    """

    layers: tuple[_Layer, ...]
    mobile: bool


def _network(name: str, attributes: Mapping[str, Any]) -> _Network:
    get_variant(name)
    if name not in APPLICATIONS:
        raise UserError(
            f"{name} has no counterpart in keras.applications; {closest(name, APPLICATIONS)} "
            "(se_flax.checkpoints.keras.APPLICATIONS gives all)"
        )
    model = create_model(name, **attributes)
    assert isinstance(model, EfficientNet)
    mobile = "mobilenetv3" in name
    return _Network(tuple(_layers(model, mobile, "dwconv2" if "efficientnetv2" in name else "dwconv")), mobile)


def _kind(role: str, mobile: bool) -> str:
    if role == "dwconv":
        return "depthwise_conv2d"
    if role == "predictions" and not mobile:
        return "dense"
    return "batch_normalization" if role.endswith("bn") else "conv2d"


def _layers(model: EfficientNet, mobile: bool, depthwise: str) -> Iterator[_Layer]:
    def outer(module: str, role: str) -> _Layer:
        return _Layer((module,), _kind(role, mobile), _MOBILE[role] if mobile else role)

    yield from (outer("conv_stem", "stem_conv"), outer("bn1", "stem_bn"))
    attentions = attention_by_row(model.attention, model.layout, model.stages)
    index = 0
    for stage, rows in enumerate(model.layout):
        block = 0
        for row, attention in zip(rows, attentions[stage], strict=True):
            kind = getattr(row.block, "func", row.block)
            for _ in range(row.repeats):
                place = f"blocks_{stage}_{block}"
                for submodule, role in _BLOCKS[kind]:
                    if not mobile:
                        name = f"block{stage + 1}{chr(ord('a') + block)}_{depthwise if role == 'dwconv' else role}"
                    elif kind is ConvBlock:  # MobileNetV3's last stage is Keras's last convolution
                        name = _MOBILE[role.replace("project", "top")]
                    else:
                        name = f"expanded_conv{f'_{index}' if index else ''}/{_MOBILE[role]}"
                    present = attention is not None or not role.startswith("se_")
                    yield _Layer((place, *submodule.split("/")), _kind(role, mobile), name, present)
                block, index = block + 1, index + 1
    if mobile:
        yield outer("conv_head", "head_conv")
    else:
        yield from (outer("conv_head", "top_conv"), outer("bn2", "top_bn"))
    yield outer("classifier", "predictions")


def _depthwise(path: Path) -> bool:
    return path[-2:] == ("conv_dw", "kernel")


def layout(name: str, **attributes: Any) -> Layout:
    """Keys and shapes of a network's variables in keras.applications.

    Args:
      name: one of `APPLICATIONS`.
      **attributes: as given to `create_model`.

    Returns:
      The layout, with the names that `by_layer` returns.

    Raises:
      UserError: keras.applications does not have the network.
    """
    network = _network(name, attributes)
    by_module = {layer.module: layer for layer in network.layers}
    weights = {kind: {leaf: weight for weight, leaf in table.items()} for kind, table in _WEIGHTS.items()}

    def key(path: Path) -> str:
        layer = by_module.get(path[1:-1])
        weight = layer and weights[layer.kind].get(path[-1])
        # A module without counterpart in Keras keeps our name, which then is missing in every Keras file.
        return f"{layer.name}/{weight}" if layer and weight else "/".join(path[1:])

    def as_convolution(path: Path) -> bool:
        return network.mobile and path[-2] == "classifier" and path[-1] == "kernel"

    def shape(path: Path, ours: Shape) -> Shape:
        if _depthwise(path):
            return (*ours[:2], ours[3], ours[2])
        return (1, 1, *ours) if as_convolution(path) else ours

    def to_ours(path: Path, value: np.ndarray, ours: Shape) -> np.ndarray:
        return value.swapaxes(2, 3) if _depthwise(path) else value.reshape(ours)

    return Layout("set of Keras weights", key, shape, to_ours, lambda targets: set(_IGNORED))


def by_layer(name: str, arrays: Mapping[str, Any], **attributes: Any) -> dict[str, Any]:
    """Renames arrays to `<layer>/<weight>` from any of Keras's naming schemes.

    Args:
      name: one of `APPLICATIONS`.
      arrays: objects of any type, such as those of `se_flax.checkpoints.files.open_arrays`, by one of these names:

        - `conv_1_bn/gamma`, or Keras 2's `Conv_1/BatchNorm/gamma`;
        - the data sets of an `.h5` file of weights or of a whole model: `stem_conv/stem_conv/kernel:0`, with or without
          a leading `model_weights/` and a final `:0`, and with any parts between layer and weight;
        - the data sets of a `.weights.h5` file: `layers/conv2d_3/vars/0`. Keras numbers the layers of a class in the
          order of the network and omits their names (Keras 2.15 and 3.0 to 3.15 write the same).
      **attributes: as given to `create_model`.

    Returns:
      The same arrays by Keras 3's names, without those of an optimizer. An unknown or duplicate name is kept.

    Raises:
      UserError: keras.applications does not have the network.
    """
    network = _network(name, attributes)
    known = {spelling: layer for layer in network.layers for spelling in (layer.name, layer.keras2)}
    counted: dict[str, str] = {}
    numbers = dict.fromkeys(_WEIGHTS, 0)
    for layer in network.layers:
        if layer.present:
            number = numbers[layer.kind]
            group = f"{layer.kind}_{number}" if number else layer.kind
            counted |= {f"layers/{group}/vars/{i}": f"{layer.name}/{w}" for i, w in enumerate(_WEIGHTS[layer.kind])}
            numbers[layer.kind] += 1

    renamed: dict[str, Any] = {}
    for path, array in arrays.items():
        if not path.startswith(_OPTIMIZER):
            key = counted.get(path) or _preprocessing(path) or _named(path, known)
            renamed[path if key in renamed else key] = array
    return renamed


def unprefixed(
    name: str, arrays: Mapping[str, Any], **attributes: Any
) -> tuple[dict[str, Any], Layout, tuple[str, ...]]:
    """As `convert.unprefixed`, for arrays by any of Keras's names; the arrays are returned as from `by_layer`."""
    known = {f"{layer.name}/{w}" for layer in _network(name, attributes).layers for w in _WEIGHTS[layer.kind]}
    prefixes = common_prefixes(path for path in arrays if not path.startswith(_OPTIMIZER))
    prefix = best_prefix(prefixes, lambda each: len(known & by_layer(name, without(arrays, each), **attributes).keys()))
    theirs = layout(name, **attributes)
    found = by_layer(name, without(arrays, prefix), **attributes)
    return (found, theirs.without(prefix), (taken_off(prefix),)) if prefix else (found, theirs, ())


def _preprocessing(path: str) -> str | None:
    """Key of a variable of Keras's layer `normalization`; None for other paths."""
    weights = tuple(_WEIGHTS["normalization"])
    counted = re.fullmatch(r"layers/normalization(?:_\d+)?/vars/([012])", path)
    named = re.fullmatch(rf"(?:model_weights/)?normalization(?:_\d+)?/(?:.*/)?({'|'.join(weights)})(?::0)?", path)
    weight = weights[int(counted[1])] if counted else named[1] if named else None
    return weight and f"normalization/{weight}"


def _named(path: str, known: Mapping[str, _Layer]) -> str:
    """Key of a path that begins with a layer's name and ends with the name of a weight."""
    parts = re.sub(r":0$", "", path.removeprefix("model_weights/")).split("/")
    # Longest first, since names of layers can have slashes: `Conv/BatchNorm` is not a weight of `Conv`.
    for length in range(len(parts) - 1, 0, -1):
        layer = known.get("/".join(parts[:length]))
        if layer is not None:
            depthwise = layer.kind == "depthwise_conv2d" and parts[-1] == "depthwise_kernel"
            return f"{layer.name}/{'kernel' if depthwise else parts[-1]}"
    return path


def from_keras(
    name: str,
    arrays: Mapping[str, Any],
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    **attributes: Any,
) -> dict[str, Any]:
    """Turns weights of keras.applications into variables.

    Names and shapes are compared before any array is read.

    Args:
      name: our name of the network, one of `se_flax.checkpoints.keras.APPLICATIONS`.
      arrays: NumPy arrays, or objects with `shape` and `__array__`, by `<layer>/<weight>` in Keras's layout
        (`stem_conv/kernel`, `block1a_dwconv/depthwise_kernel`) or by the data sets of an HDF5 file, see
        `se_flax.checkpoints.keras.by_layer`. A prefix that all names have is removed if the names fit without it, with
        a warning.
      num_classes: of the network. If the arrays have another number of classes, or no classifier
        (`include_top=False`), the classifier is initialised anew; 0 is a network without classifier.
      in_channels: of the network. From 3 to 1 the stem's kernel is summed over the colours, from 3 to another number
        the colours are repeated and scaled.
      **attributes: as given to `create_model`, if the network differs from its default.

    Returns:
      `{"params": ..., "batch_stats": ...}` of float32 arrays.

    Raises:
      UserError: keras.applications does not have the network; or keys are missing, unexpected or of another shape, all
        listed in one message.
    """
    found, theirs, notes = unprefixed(name, arrays, **attributes)
    variables, _ = import_variables(
        name, found, theirs, num_classes=num_classes, in_channels=in_channels, attributes=attributes
    )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return variables


def to_keras(name: str, variables: Mapping[str, Any], *, keras: int = 3) -> dict[str, np.ndarray]:
    """Turns variables into weights of keras.applications; the inverse of `from_keras`.

    Args:
      name: our name of the network, one of `se_flax.checkpoints.keras.APPLICATIONS`.
      variables: `{"params": ..., "batch_stats": ...}`.
      keras: 3 for the names in Keras 3, 2 for those in Keras 2 and in the published weight files; MobileNetV3's layers
        and the depthwise kernels differ.

    Returns:
      NumPy arrays by `<layer>/<weight>`, in Keras's layout.

    Raises:
      UserError: keras.applications does not have the network, or its network does not have one of the modules.
    """
    if keras not in (2, 3):
        raise UserError(f"got keras={keras!r}; give 2 or 3, the Keras version whose names to write")
    theirs = layout(name)
    older = {layer.name: layer.keras2 for layer in _network(name, {}).layers} if keras == 2 else {}
    arrays = {}
    for path, leaf in flax.traverse_util.flatten_dict(dict(variables)).items():
        key, value = theirs.key(path), np.asarray(leaf)
        if key == "/".join(path[1:]):
            raise UserError(
                f"{key} has no place in Keras's {APPLICATIONS[name]}; export variables of {name} with the blocks and "
                "the attention that it is published with"
            )
        moved = value.swapaxes(2, 3) if _depthwise(path) else value
        if keras == 2:
            layer, _, weight = key.rpartition("/")
            key = f"{older[layer]}/{'depthwise_kernel' if _depthwise(path) else weight}"
        arrays[key] = np.ascontiguousarray(moved).reshape(theirs.shape(path, value.shape))
    return arrays
