"""The zoo: every family's table of variants, collected once."""

import dataclasses
import fnmatch
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import flax.linen as nn

from se_flax import backbones
from se_flax.errors import UserError, closest
from se_flax.nn.network import Network
from se_flax.nn.residual import Placement
from se_flax.synonyms import advice
from se_flax.variant import Variant, published_weights

_MOST_CLASSES = 100_000_000


def _families() -> Iterator[ModuleType]:
    for found in sorted(pkgutil.iter_modules(backbones.__path__), key=lambda found: found.name):
        module = importlib.import_module(f"{backbones.__name__}.{found.name}")
        if hasattr(module, "VARIANTS"):
            yield module


FAMILIES: tuple[ModuleType, ...] = tuple(_families())
"""One module per family: those of `se_flax.backbones` that have a table `VARIANTS`."""


def collect(families: tuple[ModuleType, ...]) -> Mapping[str, Variant]:
    """Joins the families' tables.

    Args:
      families: modules with a `VARIANTS` table.

    Returns:
      Read-only mapping from name to variant.

    Raises:
      ValueError: two families use one name.
    """
    table: dict[str, Variant] = {}
    for family in families:
        twice = table.keys() & family.VARIANTS.keys()
        if twice:
            raise ValueError(f"{family.__name__} defines {sorted(twice)[0]!r}, which another family defines already")
        table.update(family.VARIANTS)
    return MappingProxyType(table)


VARIANTS = collect(FAMILIES)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks.

    Args:
      pattern: shell wildcard, such as `"*seresnet*"`.

    Returns:
      Sorted names that match.
    """
    return sorted(fnmatch.filter(VARIANTS, pattern))


def get_variant(name: str) -> Variant:
    """The entry of a network, with its published checkpoints.

    Raises:
      UserError: unknown name; the message names the closest ones.
    """
    if name not in VARIANTS:
        network, _, tag = str(name).partition(".")
        if tag and network in VARIANTS:
            raise UserError(
                f"{name!r} is a checkpoint: se_flax.load_pretrained({name!r}) restores it; the network is {network!r}"
            )
        raise UserError(f"unknown model {name!r}; {closest(str(name), VARIANTS)} (se_flax.list_models() gives all)")
    variant = VARIANTS[name]
    return variant if variant.weights else dataclasses.replace(variant, weights=published_weights().get(name, ()))


# The words that configurations of other libraries have, timm's `attn_layer` among them.
_ATTENTION = {
    "se": "se_flax.SqueezeExcite",
    "squeeze_excite": "se_flax.SqueezeExcite",
    "ese": "se_flax.EffectiveSE",
    "eca": "se_flax.ECA",
    "cbam": "se_flax.CBAM",
    "scse": "se_flax.ScSE",
    "gc": "se_flax.attention.GlobalContext",
}


def _check_attention(attention: Any) -> None:
    if attention is not None and not callable(attention):
        known = _ATTENTION.get(str(attention).lower().replace("-", "_"))
        if known:
            raise UserError(f"got attention={attention!r}; attention is given as a class: attention={known}")
        raise UserError(
            f"got attention={attention!r}; pass a class or a partial of one, such as se_flax.SqueezeExcite or "
            "functools.partial(se_flax.SqueezeExcite, reduction=8), or None"
        )
    if isinstance(attention, nn.Module):
        raise UserError(
            f"got the attention module {attention.__class__.__name__}(...), one instance that all blocks would share; "
            f"pass the class, or functools.partial({attention.__class__.__name__}, ...)"
        )


def create_model(name: str, **attributes: Any) -> Network:
    """Builds a network.

    Args:
      name: one of `list_models()`.
      **attributes: of the network's module, overriding the variant's: `num_classes`, `attention`, `stages`,
        `placement`, `dtype`, `norm`, `drop_rate`, `drop_path_rate` and what else its class documents.

    Returns:
      A Linen module: `model.init(key, images)`, `model.apply(variables, images, train=False, return_features=False)`,
      both to be compiled: `jax.jit(model.init)`, `jax.jit(model.apply, static_argnames=("train", "return_features"))`.

    Raises:
      UserError: unknown name or attribute, or a value that cannot be one.

    Examples:
      >>> import se_flax
      >>> model = se_flax.create_model("resnet50", num_classes=10, attention=se_flax.ECA, stages=(4, 5))
      >>> model.num_classes
      10
    """
    build = get_variant(name).build
    cls = build
    while isinstance(cls, functools.partial):
        cls = cls.func
    assert inspect.isclass(cls) and dataclasses.is_dataclass(cls)
    allowed = {f.name for f in dataclasses.fields(cls)} - {"name", "parent"}
    for given in attributes:
        if given not in allowed:
            raise UserError(f"{name} has no attribute {given!r}; {advice(given, allowed)}")
    given_attention = attributes.get("attention")
    by_stage = isinstance(given_attention, tuple | list) and getattr(cls, "ATTENTION_BY_STAGE", False)
    for attention in given_attention if by_stage else [given_attention]:  # type: ignore[union-attr]
        _check_attention(attention)
    for key in ("stages", "depths", "attention"):
        if isinstance(attributes.get(key), list):
            attributes[key] = tuple(attributes[key])
    if "placement" in attributes:
        attributes["placement"] = Placement.parse(attributes["placement"])
    classes = attributes.get("num_classes", 0)
    if not isinstance(classes, int) or not 0 <= classes <= _MOST_CLASSES:
        raise UserError(
            f"got num_classes={classes!r:.40}; give a whole number up to {_MOST_CLASSES:,}, 0 for no classifier"
        )
    return build(**attributes)
