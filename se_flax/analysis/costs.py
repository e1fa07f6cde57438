"""Model costs counted from a traced forward pass (nothing is computed): parameters, multiply-adds, activations.

Papers and tools count differently. The counts are kept separately for each layer, and there are two sums of them:

| | convolutions, matrix products | batch norm | final pooling | sum of two maps | attention's pooling |
|---|---|---|---|---|---|
| `macs` | yes | 2 per element | 1 per element | - | - |
| `macs_paper` | yes | - | - | 1 per element | 1 per element |

`macs` is the figure of timm's result tables (fvcore's counter, with 5 per element for layer and group norms), and
`macs_paper` that of tables 2 and 3 of Hu et al. 2020; see docs/costs.md.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from se_flax.attention import ECA
from se_flax.errors import UserError
from se_flax.nn.attention_base import Attention
from se_flax.nn.conv import Conv
from se_flax.nn.norm import BatchNorm, GroupNorm, LayerNorm
from se_flax.zoo import create_model, get_variant

# Operations per element, as fvcore counts them at inference.
_NORMS: Mapping[type, int] = {
    BatchNorm: 2,
    nn.BatchNorm: 2,
    GroupNorm: 5,
    nn.GroupNorm: 5,
    LayerNorm: 5,
    nn.LayerNorm: 5,
}
_BIASED = (Conv, nn.Conv, nn.Dense, *_NORMS)
_SPATIAL, _CHANNEL = (1, 2), (3,)
# Jaxprs that JAX caches: the module's name inside would be that of the first caller.
_SHARED = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "cond")


@dataclass(frozen=True)
class LayerCosts:
    """Costs of one layer for one image.

    Attributes:
      path: of the module, `layer1_0/conv1`; an attention module is one layer. Empty for the network's own operations.
      kind: class of the module.
      is_attention: whether the layer belongs to the attention.
      params: number of trainable parameters.
      statistics: number of running means and variances.
      products: multiply-adds of convolutions and matrix products.
      norms: operations of norms, with fvcore's counts per element.
      final_poolings: input elements of global average pooling outside the attention.
      sums: elements of sums of two maps (residual connections).
      squeezes: input elements of the attention's squeeze.
      activations: output elements of convolutions and matrix products.
    """

    path: str
    kind: str
    is_attention: bool = False
    params: int = 0
    statistics: int = 0
    products: int = 0
    norms: int = 0
    final_poolings: int = 0
    sums: int = 0
    squeezes: int = 0
    activations: int = 0

    @property
    def macs(self) -> int:
        """Multiply-adds as in timm's tables."""
        return self.products + self.norms + self.final_poolings

    @property
    def macs_paper(self) -> int:
        """Multiply-adds as in the squeeze-and-excitation paper."""
        return self.products + self.sums + self.squeezes


@dataclass(frozen=True)
class Costs:
    """Costs of a network for one image; the module's docstring has the two ways to count multiply-adds.

    Attributes:
      params: number of trainable parameters.
      params_with_statistics: trainable parameters, running means and variances, as the paper counts.
      macs: multiply-adds as in timm's tables.
      macs_paper: multiply-adds as in Hu et al. 2020, tables 2 and 3.
      activations: output elements of convolutions and matrix products, as in timm's tables.
      attention_params: the attention's share of `params`.
      attention_macs: the attention's share of `macs`.
      by_layer: the costs of every layer, in the order of the calls.
    """

    params: int
    params_with_statistics: int
    macs: int
    macs_paper: int
    activations: int
    attention_params: int
    attention_macs: int
    by_layer: tuple[LayerCosts, ...] = field(repr=False)

    def totals(self) -> dict[str, int]:
        """The costs of the whole network, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "by_layer"}


def costs(model: nn.Module | str, image_size: int | None = None) -> Costs:
    """Counts the costs of a network for one image, without computing anything.

    Args:
      model: a network, or the name of one of `se_flax.list_models()`.
      image_size: height and width of the image in pixels; None takes the size that a named network was designed for,
        and 224 for a module.

    Returns:
      The counts.

    Raises:
      UserError: the name is unknown, or the size is not a positive whole number.

    Examples:
      >>> import se_flax
      >>> se_flax.costs("resnet50", 224).params
      25557032
    """
    if isinstance(model, str):
        image_size = get_variant(model).input_size if image_size is None else image_size
        model = create_model(model)
    image_size = 224 if image_size is None else image_size
    if not isinstance(image_size, int) or image_size < 1:
        raise UserError(f"got image_size={image_size!r}; give a positive whole number of pixels, such as 224")
    images = jax.ShapeDtypeStruct((1, image_size, image_size, getattr(model, "in_channels", 3)), jnp.float32)
    trace = _Trace(model)
    with trace.watching():
        traced = jax.make_jaxpr(model.init_with_output, return_shape=True)(jax.random.key(0), images)
    program, (_, variables) = traced
    # The program includes the initialisation, which does not depend on the images and so is not counted.
    trace.read(program.jaxpr, "", 1, top=True, images=program.jaxpr.invars[-1])
    return trace.costs(variables)


class _Trace:
    """The modules of a traced call, with the counts of each."""

    def __init__(self, model: nn.Module):
        self._given = tuple(_classes(getattr(model, "attention", None)))
        self._modules: dict[str, nn.Module] = {"": model}
        self._channel_convolved: list[tuple[str, int]] = []  # path of an ECA, elements that it convolves
        self._squeezed_for: dict[str, str] = {}  # path of a norm that also squeezes -> path of the attention
        self._counts: dict[str, dict[str, int]] = {"": {}}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Marks every traced operation with the path of its module."""
        pooling: list[str] = []  # norms that also squeeze, for the attention that is called next

        def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            path = "/".join(module.path)
            if path not in self._modules:
                self._modules[path] = module
                self._counts[path] = {}
            # Every use of a batch norm calls `coefficients`, not always `__call__`.
            if context.method_name == ("coefficients" if isinstance(module, BatchNorm) else "__call__"):
                self._count_norm(module, path, args)
            if kwargs.get("per_image"):
                pooling.append(path)
            if context.method_name == "gates":
                self._squeezed_for.update(dict.fromkeys(pooling, path))
                pooling.clear()
                if isinstance(module, ECA):
                    self._channel_convolved.append((path, args[0].size))
            with jax.named_scope(f"<{path}>"):
                return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            yield

    def _count_norm(self, module: nn.Module, path: str, args: Any) -> None:
        for kind, rate in _NORMS.items():
            if isinstance(module, kind):
                self._add(path, norms=rate * args[0].size)

    def _is_attention(self, module: nn.Module) -> bool:
        return isinstance(module, (Attention, *self._given))

    def _attention_of(self, path: str) -> str | None:
        """Path of the attention that a module is or is part of; None for other modules."""
        parts = path.split("/")
        for i in range(1, len(parts) + 1):
            above = "/".join(parts[:i])
            module = self._modules.get(above)
            if module is None or not self._is_attention(module):
                continue
            if isinstance(module, Attention) and parts[i : i + 1] and parts[i] in module.not_attention:
                return None
            return above
        return None

    def _add(self, path: str, **counts: int) -> None:
        here = self._counts[path]
        for name, count in counts.items():
            here[name] = here.get(name, 0) + count

    def read(self, jaxpr: Any, path: str, times: int, *, top: bool, images: Any = None) -> None:
        """Counts the operations of a jaxpr and of all jaxprs inside.

        Args:
          jaxpr: the jaxpr.
          path: of the module that calls it.
          times: number of calls.
          top: whether it is the network's own jaxpr and not that of a function such as an activation.
          images: count only operations that depend on this variable; None counts all.
        """
        depending = {images}
        for eqn in jaxpr.eqns:
            if images is not None:
                if not any(x in depending for x in eqn.invars if not hasattr(x, "val")):
                    continue
                depending.update(eqn.outvars)
            here = path
            if top:
                marks = re.findall(r"<([^<>]*)>", str(eqn.source_info.name_stack))
                here = marks[-1] if marks else path
            name = eqn.primitive.name
            if name in ("conv_general_dilated", "dot_general"):
                self._add(here, products=times * products(eqn), activations=times * _size(eqn.outvars[0]))
            elif name in ("reduce_sum", "reduce_max"):
                self._count_pooling(eqn, here, times)
            elif name in ("add", "add_any"):
                # A bias is smaller than its map, unless the map has one pixel; activations have jaxprs of their own.
                maps = {x.aval.shape for x in eqn.invars} == {eqn.outvars[0].aval.shape} and eqn.outvars[
                    0
                ].aval.ndim == 4
                if top and maps and not isinstance(self._modules[here], _BIASED) and self._attention_of(here) is None:
                    self._add(here, sums=times * _size(eqn.outvars[0]))
            elif name == "cond":  # jax.lax.platform_dependent; the last branch is the plain implementation
                self.read(eqn.params["branches"][-1].jaxpr, here, times, top=False)
            else:
                inner_times = times * eqn.params["length"] if name == "scan" else times
                for inner in filter(None, map(_program, eqn.params.values())):
                    self.read(inner, here, inner_times, top=top and name not in _SHARED)

    def _count_pooling(self, eqn: Any, path: str, times: int) -> None:
        pooled = eqn.invars[0].aval
        axes = tuple(eqn.params["axes"])
        if len(pooled.shape) != 4 or axes not in (_SPATIAL, _CHANNEL):
            return
        if path in self._squeezed_for:
            self._add(self._squeezed_for[path], squeezes=times * pooled.size)
        elif isinstance(self._modules[path], tuple(_NORMS)):
            return
        elif self._attention_of(path) is not None:
            self._add(path, squeezes=times * pooled.size)
        elif axes == _SPATIAL:
            self._add(path, final_poolings=times * pooled.size)

    def costs(self, variables: Mapping[str, Any]) -> Costs:
        """The counts; an attention with all its submodules is one layer."""
        shapes = {name: flatten_dict(dict(tree), sep="/") for name, tree in variables.items()}
        for collection, name in (("params", "params"), ("batch_stats", "statistics")):
            for leaf, value in shapes.get(collection, {}).items():
                self._add(leaf.rpartition("/")[0], **{name: math.prod(value.shape)})
        # ECA's convolution is traced as a sum of shifted products, not as a convolution.
        for path, size in self._channel_convolved:
            self._add(path, products=size * shapes["params"][f"{path}/conv/kernel"].shape[0], activations=size)
        merged: dict[tuple[str, bool], dict[str, int]] = {}
        for path, counts in self._counts.items():
            inside = self._attention_of(path)
            layer = merged.setdefault((path if inside is None else inside, inside is not None), {})
            for name, count in counts.items():
                layer[name] = layer.get(name, 0) + count
        layers = tuple(
            LayerCosts(path, type(self._modules[path]).__name__, is_attention, **counts)
            for (path, is_attention), counts in merged.items()
            if any(counts.values())
        )
        params = sum(layer.params for layer in layers)
        of_attention = [layer for layer in layers if layer.is_attention]
        return Costs(
            params=params,
            params_with_statistics=params + sum(layer.statistics for layer in layers),
            macs=sum(layer.macs for layer in layers),
            macs_paper=sum(layer.macs_paper for layer in layers),
            activations=sum(layer.activations for layer in layers),
            attention_params=sum(layer.params for layer in of_attention),
            attention_macs=sum(layer.macs for layer in of_attention),
            by_layer=layers,
        )


def products(eqn: Any) -> int:
    """Multiply-adds of a convolution or matrix product.

    Args:
      eqn: equation of a jaxpr, `conv_general_dilated` or `dot_general`.
    """
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        features = eqn.params["dimension_numbers"].rhs_spec[0]
        return _size(eqn.outvars[0]) * math.prod(kernel) // kernel[features]
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return _size(eqn.outvars[0]) * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _program(value: Any) -> Any:
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None


def _classes(given: Any) -> Iterator[type]:
    """The classes in a network's `attention` attribute."""
    for part in given if isinstance(given, tuple | list) else [given]:
        while isinstance(part, functools.partial):
            part = part.func
        if isinstance(part, type):
            yield part
