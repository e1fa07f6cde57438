"""Torchvision's EfficientNet, EfficientNetV2, MobileNetV3 and RegNetY -> Linen variables.

The networks are timm's, so a module of torchvision follows from ours; only its list indexes differ:

| ours | EfficientNet | MobileNetV3 |
|---|---|---|
| `conv_stem`, `bn1` | `features.0.0`, `features.0.1` | the same |
| `blocks_3_0/...` | `features.4.0.block...` | `features.8.block...`: blocks are numbered through |
| a convolution and its norm in a block | `block.<i>.0`, `block.<i>.1` in the order of the computation | the same |
| `.../se/conv_reduce`, `conv_expand` | `block.<i>.fc1`, `fc2` | the same |
| last 1x1 convolution before the pooling, norm | `features.<last>.0`, `.1` | the same |
| 1x1 convolution after the pooling | | `classifier.0`, a linear layer |
| `classifier` | `classifier.1` | `classifier.3` |

RegNetY: `s2/b1/conv1/conv` is `trunk_output.block2.block2-0.f.a.0`. Batch norms of EfficientNet-B5 to B7, MobileNetV3
and EfficientNetV2 have epsilon 1e-3 there and 1e-5 in timm and here. The difference is added to their running
variances, so that evaluation is the same; a training step, which uses the batch's variances, differs by it.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from se_flax.backbones.efficientnet import EfficientNet, attention_by_row
from se_flax.checkpoints.convert import Layout, Path, Shape, import_variables, unprefixed
from se_flax.checkpoints.prefix import unwrapped
from se_flax.checkpoints.torch import LAYOUT, from_torch_layout, torch_shape
from se_flax.errors import UserError, closest
from se_flax.nn.mobile import ConvBlock, DepthwiseSeparable, FusedInvertedResidual, InvertedResidual
from se_flax.nn.norm import BatchNorm
from se_flax.zoo import create_model, get_variant


class Theirs(NamedTuple):
    """A network of torchvision: its name there, and the epsilon of its batch norms."""

    name: str
    epsilon: float = 1e-5


NETWORKS: Mapping[str, Theirs] = {
    **{f"efficientnet_b{i}": Theirs(f"efficientnet_b{i}", 1e-5 if i < 5 else 1e-3) for i in range(8)},
    **{f"efficientnetv2_{size}": Theirs(f"efficientnet_v2_{size}", 1e-3) for size in "sml"},
    **{f"mobilenetv3_{size}_100": Theirs(f"mobilenet_v3_{size}", 1e-3) for size in ("small", "large")},
    **{
        f"regnety_{ours}": Theirs(f"regnet_y_{size}")
        for ours, size in {
            "004": "400mf",
            "008_tv": "800mf",
            "016": "1_6gf",
            "032": "3_2gf",
            "080_tv": "8gf",
            "160": "16gf",
            "320": "32gf",
            "1280": "128gf",
        }.items()
    },
}
"""The supported networks of torchvision, by our name."""

# Convolutions and norms of each kind of block in the order of the computation; None is the attention.
_UNITS: dict[Any, tuple[tuple[str, str] | None, ...]] = {
    ConvBlock: (("conv", "bn1"),),
    DepthwiseSeparable: (("conv_dw", "bn1"), None, ("conv_pw", "bn2")),
    InvertedResidual: (("conv_pw", "bn1"), ("conv_dw", "bn2"), None, ("conv_pwl", "bn3")),
    FusedInvertedResidual: (("conv_exp", "bn1"), None, ("conv_pwl", "bn2")),
}
_REGNET = (
    (r"^stem\.(conv|bn)$", r"stem.\1"),
    (r"^s(\d)\.b(\d+)\.downsample\.(conv|bn)$", r"trunk_output.block\1.block\1-\2.proj.\3"),
    (r"^s(\d)\.b(\d+)\.conv(\d)\.(conv|bn)$", r"trunk_output.block\1.block\1-\2.f.conv\3.\4"),
    (r"^s(\d)\.b(\d+)\.se\.(fc\d)$", r"trunk_output.block\1.block\1-\2.f.se.\3"),
    (r"^head\.fc$", "fc"),
)
_PARTS = {"conv": "0", "bn": "1", "conv1": "a", "conv2": "b", "conv3": "c"}


def _is_mobile(name: str) -> bool:
    return "mobilenetv3" in name


def _modules(model: EfficientNet, mobile: bool) -> Iterator[tuple[Path, str]]:
    """Our modules with weights and torchvision's, for networks of a table of blocks."""
    yield from ((("conv_stem",), "features.0.0"), (("bn1",), "features.0.1"))
    attentions = attention_by_row(model.attention, model.layout, model.stages)
    number = 0
    for stage, rows in enumerate(model.layout):
        block = 0
        for row, attention in zip(rows, attentions[stage], strict=True):
            kind = getattr(row.block, "func", row.block)
            for _ in range(row.repeats):
                number += 1
                ours = (f"blocks_{stage}_{block}",)
                if mobile and kind is ConvBlock:  # the last convolution before the pooling
                    yield from (((*ours, "conv"), f"features.{number}.0"), ((*ours, "bn1"), f"features.{number}.1"))
                    continue
                place = f"features.{number}.block" if mobile else f"features.{stage + 1}.{block}.block"
                units = [unit for unit in _UNITS[kind] if unit is not None or attention is not None]
                for i, unit in enumerate(units):
                    names = (("se", "conv_reduce"), ("se", "conv_expand")) if unit is None else ((unit[0],), (unit[1],))
                    for part, module in zip(("fc1", "fc2") if unit is None else "01", names, strict=True):
                        yield (*ours, *module), f"{place}.{i}.{part}"
                block += 1
    if mobile:
        yield from ((("conv_head",), "classifier.0"), (("classifier",), "classifier.3"))
    else:
        last = f"features.{len(model.layout) + 1}"
        yield from ((("conv_head",), f"{last}.0"), (("bn2",), f"{last}.1"), (("classifier",), "classifier.1"))


def _regnet_module(module: Path) -> str:
    """Torchvision's name of a module of a RegNet."""
    ours = ".".join(module)
    for pattern, theirs in _REGNET:
        if match := re.match(pattern, ours):
            # Our blocks count from 1, theirs from 0.
            found = re.sub(r"-(\d+)", lambda number: f"-{int(number[1]) - 1}", match.expand(theirs))
            return ".".join(_PARTS.get(part, part) for part in found.split("."))
    return ours


def layout(name: str, **attributes: Any) -> Layout:
    """Keys and shapes of a network's variables in torchvision.

    Args:
      name: one of `NETWORKS`.
      **attributes: as given to `create_model`.

    Raises:
      UserError: torchvision does not have the network.
    """
    get_variant(name)
    if name not in NETWORKS:
        raise UserError(
            f"{name} has no counterpart in torchvision; {closest(name, NETWORKS)} "
            "(se_flax.checkpoints.torchvision.NETWORKS gives all)"
        )
    model, mobile = create_model(name, **attributes), _is_mobile(name)
    modules = dict(_modules(model, mobile)) if isinstance(model, EfficientNet) else {}
    missing = NETWORKS[name].epsilon - BatchNorm.epsilon

    @cache
    def key(path: Path) -> str:
        module = path[1:-1]
        theirs = modules.get(module, "/".join(module)) if modules else _regnet_module(module)
        return f"{theirs}.{LAYOUT.key((path[0], path[-1]))}"

    def is_linear(path: Path) -> bool:
        return mobile and path[1:] == ("conv_head", "kernel")

    def shape(path: Path, ours: Shape) -> Shape:
        found = torch_shape(path, ours)
        return found[:2] if is_linear(path) else found

    def to_ours(path: Path, value: np.ndarray, ours: Shape) -> np.ndarray:
        if path[-1] == "var" and missing:
            return value + np.float32(missing)
        return from_torch_layout(path, value[..., None, None] if is_linear(path) else value, ours)

    return Layout("torchvision state dict", key, shape, to_ours, LAYOUT.ignored)


def from_torchvision(
    name: str,
    state_dict: Mapping[str, np.ndarray],
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    **attributes: Any,
) -> dict[str, Any]:
    """Turns a state dict of torchvision into variables.

    Where torchvision's batch norms have another epsilon, it is added to the running variances, see above.

    Args:
      name: our name of the network, one of `se_flax.checkpoints.torchvision.NETWORKS`.
      state_dict: NumPy arrays by torchvision's keys, in its layout; wrappers and prefixes as for `from_timm`.
      num_classes: as for `from_timm`.
      in_channels: as for `from_timm`.
      **attributes: as given to `create_model`, if the network differs from its default.

    Returns:
      `{"params": ..., "batch_stats": ...}` of float32 arrays.

    Raises:
      UserError: torchvision does not have the network; or keys are missing, unexpected or of another shape, all listed
        in one message.
    """
    theirs = layout(name, **attributes)
    arrays, theirs, notes = unprefixed(name, unwrapped(state_dict), theirs, attributes)
    variables, _ = import_variables(
        name, arrays, theirs, num_classes=num_classes, in_channels=in_channels, attributes=attributes
    )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return variables
