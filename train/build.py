"""Turns the settings' words into modules: the one place where strings become classes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

import se_flax
from se_flax.errors import UserError, closest
from train.config import Attention, Config
from train.step import AXIS

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BATCH_NORMS = {"replica": None, "global": AXIS}


def _squeeze_excite(a: Attention, axis: str | None) -> Callable[..., nn.Module]:
    del axis
    return partial(se_flax.SqueezeExcite, reduction=a.reduction, squeeze=a.squeeze, gate=a.gate, use_bias=a.bias)


def _eca(a: Attention, axis: str | None) -> Callable[..., nn.Module]:
    del axis
    return partial(se_flax.ECA, kernel_size=a.kernel_size or None)


def _cbam(a: Attention, axis: str | None) -> Callable[..., nn.Module]:
    return partial(se_flax.CBAM, reduction=a.reduction, axis_name=axis)


def _effective_se(a: Attention, axis: str | None) -> Callable[..., nn.Module]:
    del a, axis
    return se_flax.EffectiveSE


ATTENTIONS: dict[str, Callable[[Attention, str | None], Any]] = {
    "none": lambda a, axis: None,
    "se": _squeeze_excite,
    "eca": _eca,
    "cbam": _cbam,
    "ese": _effective_se,
}


def _axis(config: Config) -> str | None:
    """The axis over which batch norms average their statistics."""
    scope = config.parallel.batch_norm
    if scope not in BATCH_NORMS:
        raise UserError(f"unknown parallel.batch_norm {scope!r}; {closest(scope, BATCH_NORMS)}")
    return BATCH_NORMS[scope]


def attention_attributes(config: Config) -> dict[str, Any]:
    """The network's attributes that `model.attention` sets; the others keep what the architecture's name says.

    Args:
      config: the settings.

    Returns:
      Keywords of `se_flax.create_model`.

    Raises:
      UserError: unknown attention or batch-norm scope.
    """
    attention = config.model.attention
    attributes: dict[str, Any] = {}
    if attention.kind != "default":
        if attention.kind not in ATTENTIONS:
            raise UserError(
                f"unknown model.attention.kind {attention.kind!r}; {closest(attention.kind, ['default', *ATTENTIONS])}"
            )
        attributes["attention"] = ATTENTIONS[attention.kind](attention, _axis(config))
    if attention.stages:
        attributes["stages"] = attention.stages
    if attention.placement != "standard":
        attributes["placement"] = attention.placement
    return attributes


def _norm(name: str, axis: str | None) -> Any:
    """The network's own norm; a batch norm is told over which replicas its statistics go."""
    norm = se_flax.create_model(name).norm
    kind: Any = norm.func if isinstance(norm, partial) else norm
    return partial(norm, axis_name=axis) if issubclass(kind, se_flax.BatchNorm) else norm


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Builds the network of a run.

    Args:
      config: the settings.
      num_classes: of the data.

    Returns:
      The module.

    Raises:
      UserError: unknown model, attention, gate, squeeze, placement, stage, precision or batch-norm scope.
    """
    settings = config.model
    if config.precision not in PRECISIONS:
        raise UserError(f"unknown precision {config.precision!r}; {closest(config.precision, PRECISIONS)}")
    return se_flax.create_model(
        settings.name,
        num_classes=num_classes,
        norm=_norm(settings.name, _axis(config)),
        dtype=PRECISIONS[config.precision],
        drop_rate=settings.drop_rate,
        drop_path_rate=settings.drop_path_rate,
        **attention_attributes(config),
    )
