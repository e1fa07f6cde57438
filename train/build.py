"""Construction of modules from settings: the one place where strings become classes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import se_flax
from se_flax.errors import UserError, closest
from train.config import Attention, Config
from train.optim.margins import arcface, cosface
from train.run.curves import CROSS_ENTROPY
from train.run.step import AXIS

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


def _global_context(a: Attention, axis: str | None) -> Callable[..., nn.Module]:
    del axis
    return partial(se_flax.attention.GlobalContext, reduction=a.reduction)


def _scse(a: Attention, axis: str | None) -> Callable[..., nn.Module]:
    del axis
    return partial(se_flax.ScSE, reduction=a.reduction)


ATTENTIONS: dict[str, Callable[[Attention, str | None], Any]] = {
    "none": lambda a, axis: None,
    "se": _squeeze_excite,
    "eca": _eca,
    "cbam": _cbam,
    "ese": _effective_se,
    "scse": _scse,
    "gc": _global_context,
}


# Function, its usual margin, and the margin that is too much.
MARGINS: dict[str, tuple[Callable[..., jax.Array], float, float]] = {
    "arcface": (arcface, 0.5, math.pi / 2),
    "cosface": (cosface, 0.4, 2.0),
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


def network_attributes(config: Config) -> dict[str, Any]:
    """The network's attributes that belong to it for good, and are saved with it: `model.attention` and `loss`.

    Args:
      config: the settings.

    Returns:
      Keywords of `se_flax.create_model`.

    Raises:
      UserError: as `attention_attributes` and `loss_margin`.
    """
    attributes = attention_attributes(config)
    if loss_margin(config) is not None:
        attributes["classifier"] = partial(se_flax.CosineClassifier, scale=config.loss.scale)
    return attributes


def loss_margin(config: Config) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """What training does to the logits before the cross-entropy.

    Args:
      config: the settings.

    Returns:
      From logits and class indices to logits with a margin; None for the plain cross-entropy.

    Raises:
      UserError: unknown loss, a margin or scale out of range, or mixed images, which have no one right class.
    """
    loss = config.loss
    if loss.name == "cross_entropy":
        return None
    if loss.name not in MARGINS:
        raise UserError(f"unknown loss.name {loss.name!r}; {closest(loss.name, ['cross_entropy', *MARGINS])}")
    function, own, limit = MARGINS[loss.name]
    margin = own if loss.margin < 0 else loss.margin
    if not margin < limit:
        raise UserError(f"got loss.margin={loss.margin} for {loss.name}; give 0 to below {limit:.4g}, or -1 for {own}")
    if not 0 < loss.scale < math.inf:
        raise UserError(f"got loss.scale={loss.scale}; it must be positive and finite (the papers have 64)")
    if config.augment.mixup or config.augment.cutmix:
        raise UserError(
            f"got loss.name={loss.name} with augment.mixup={config.augment.mixup:g} and "
            f"augment.cutmix={config.augment.cutmix:g}, but a mixed image has no one right class; set both to 0"
        )
    return partial(function, margin=margin, scale=loss.scale)


def training_loss(config: Config) -> str:
    """What training minimises, in words for a picture.

    Args:
      config: the settings.

    Returns:
      `train.run.curves.CROSS_ENTROPY` for what evaluation computes too; anything else is another quantity, which
      cannot be compared with the loss on held-out data.
    """
    loss, augment = config.loss, config.augment
    words = [CROSS_ENTROPY]
    if loss.name in MARGINS:
        margin = MARGINS[loss.name][1] if loss.margin < 0 else loss.margin
        words = [f"{loss.name} with margin {margin:g}"]
    parts = {"label smoothing": config.optim.label_smoothing, "mixup": augment.mixup, "CutMix": augment.cutmix}
    return ", ".join(words + [f"{name} {value:g}" for name, value in parts.items() if value])


def _told(norm: Any, axis: str | None, lean: bool) -> Any:
    """The network's own norm; a batch norm is told over which replicas its statistics go, and what it may leave out."""
    kind: Any = norm.func if isinstance(norm, partial) else norm
    if kind is None or not issubclass(kind, se_flax.BatchNorm):
        return norm
    told = partial(norm, axis_name=axis)
    return partial(told, defer_conv=True) if lean else told


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Builds the network of a run.

    Args:
      config: the settings.
      num_classes: of the data.

    Returns:
      The module.

    Raises:
      UserError: unknown model, attention, gate, squeeze, placement, stage, loss, precision or batch-norm scope.
    """
    settings = config.model
    if config.precision not in PRECISIONS:
        raise UserError(f"unknown precision {config.precision!r}; {closest(config.precision, PRECISIONS)}")
    attributes = network_attributes(config)
    rates = {"drop_rate": settings.drop_rate, "drop_path_rate": settings.drop_path_rate}
    model = se_flax.create_model(
        settings.name,
        num_classes=num_classes,
        dtype=PRECISIONS[config.precision],
        **{name: rate for name, rate in rates.items() if rate},
        **attributes,
    )
    told: dict[str, Any] = {"norm": _told(model.norm, _axis(config), config.lean)}
    attention = model.attention
    if isinstance(attention, partial) and attention.keywords.get("norm"):
        norm = _told(attention.keywords["norm"], _axis(config), lean=False)
        told["attention"] = partial(attention, norm=norm)
    return model.clone(**told)
