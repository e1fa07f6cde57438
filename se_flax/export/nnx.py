"""Linen networks and attention modules in NNX projects, through Flax's own bridge, weights carried over both ways."""

import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import ScopeCollectionNotFound, ScopeParamNotFoundError
from flax.nnx.bridge import variables as bridge_variables

from se_flax.errors import UserError

_OWN = ("to_nnx__", "_pytree__")


class FromLinen(nnx.bridge.ToNNX):
    """What `to_nnx` makes: the bridge's module, with NNX's two modes.

    `train()` and `eval()`, of this module or of one that holds it, choose what the wrapped module's argument `train`
    is; given in a call, it wins. Training updates the batch statistics and draws from `rngs`; evaluation does neither,
    so it may also run under plain `jax.jit`.

    Attributes:
      deterministic: evaluation mode, the name that NNX's own modules have for it; True at first, as in Linen.
    """

    def __init__(self, module: nn.Module, rngs: nnx.Rngs | jax.Array | None = None) -> None:
        """Args: the Linen module; its random streams, for dropout and stochastic depth (and `lazy_init`)."""
        super().__init__(module, rngs)
        self.to_nnx__train = False
        self.to_nnx__has_modes = "train" in inspect.signature(type(module).__call__).parameters

    @property
    def deterministic(self) -> bool:
        """Whether calls evaluate."""
        return not self.to_nnx__train

    def _setattr(self, name: str, value: Any) -> None:
        # The bridge takes every other attribute for a variable of the Linen module.
        if name == "deterministic":
            name, value = "to_nnx__train", not value
        super()._setattr(name, value)

    def set_view(self, deterministic: bool | None = None, **others: Any) -> dict[str, Any]:
        """For `nnx.view`.

        Args:
          deterministic: True evaluates, False trains, None leaves it.
          **others: meant for other modules; handed back.
        """
        if deterministic is not None:
            self.to_nnx__train = not deterministic
        return others

    def __call__(
        self,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the Linen module.

        Args:
          *args: its arguments.
          rngs: random streams of this call, instead of the module's.
          method: of the Linen module, as in the bridge.
          mutable: collections to update; None is all but the parameters while training, and none otherwise.
          **kwargs: its keywords.

        Returns:
          What the Linen module returns.

        Raises:
          UserError: it has no variables yet.
        """
        if self.to_nnx__has_modes and method is None and not self._pytree__state.initializing:
            if self._trains(args, kwargs):
                mutable = [name for name in from_nnx(self) if name != "params"] if mutable is None else mutable
            else:
                rngs = {} if rngs is None else rngs  # draws nothing: None would take from the module's streams
        before = {} if self._pytree__state.initializing or not mutable else self._own()
        try:
            result = super().__call__(*args, rngs=rngs, method=method, mutable=mutable, **kwargs)
        except (ScopeCollectionNotFound, ScopeParamNotFoundError) as error:
            if self._own():
                raise
            name = type(self.to_nnx__module).__name__
            raise UserError(
                f"this {name} has no variables yet; call .lazy_init(images) on it first, or give them: "
                "to_nnx(model, variables)"
            ) from error
        if before:
            self._update_in_place(before)
        return result

    def _trains(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call trains; the mode goes into the keywords where the arguments do not say it."""
        given = inspect.signature(type(self.to_nnx__module).__call__).bind_partial(None, *args, **kwargs).arguments
        return bool(given["train"] if "train" in given else kwargs.setdefault("train", self.to_nnx__train))

    def _own(self) -> dict[str, Any]:
        """The Linen module's variables, by attribute."""
        return {name: value for name, value in vars(self).items() if not name.startswith(_OWN)}

    def _update_in_place(self, before: dict[str, Any]) -> None:
        """Gives the variables that were there the new values: the bridge puts new variables in their place.

        Others may hold them: another view of this module (`nnx.view`), or an outer transformation.
        """
        old, new = (nnx.traversals.flatten_mapping(tree) for tree in (before, self._own()))
        if old.keys() != new.keys():  # collections that appeared in this call
            return
        for path, variable in old.items():
            if variable is not new[path]:
                variable.set_value(new[path].get_value())
        for name, value in before.items():
            setattr(self, name, nnx.data(value))


def to_nnx(
    model: nn.Module, variables: Mapping[str, Any] | None = None, *, rngs: nnx.Rngs | jax.Array | None = None
) -> FromLinen:
    """Turns a Linen module into an NNX module.

    Args:
      model: a network of `create_model`, an attention module, or any other Linen module.
      variables: its `{"params": ..., "batch_stats": ...}`; None leaves them to `.lazy_init(images)`.
      rngs: random streams, for dropout and stochastic depth; `nnx.Rngs(0)` serves all of them.

    Returns:
      An NNX module in evaluation mode. Its variables have the Linen module's names: `params` are `nnx.Param`,
      `batch_stats` are `nnx.BatchStat`.

    Raises:
      UserError: not a Linen module, or no variables of one.

    Examples:
      >>> import jax, se_flax
      >>> attention = se_flax.SqueezeExcite(reduction=4)
      >>> images = jax.numpy.ones((2, 8, 8, 16))
      >>> variables = attention.init(jax.random.key(0), images)
      >>> module = se_flax.to_nnx(attention, variables)
      >>> module(images).shape
      (2, 8, 8, 16)
      >>> list(se_flax.from_nnx(module))
      ['params']
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"got {_named(model)}; give a Linen module, such as se_flax.create_model('seresnet50') or "
            "se_flax.SqueezeExcite()"
        )
    module = FromLinen(model, rngs)
    if variables is None:
        return module
    if not isinstance(variables, Mapping) or not all(isinstance(part, Mapping) for part in variables.values()):
        raise UserError(
            f"got variables that are {_named(variables)}; give collections of arrays, {{'params': ..., "
            "'batch_stats': ...}, as model.init and load_pretrained return them"
        )
    arrays = jax.tree.map(jnp.asarray, _plain(variables))
    for name, value in bridge_variables.linen_vars_to_nnx_attrs(arrays).items():
        setattr(module, name, nnx.data(value))
    return module


def from_nnx(module: Any) -> dict[str, Any]:
    """Turns an NNX module that the bridge made back into Linen variables; the inverse of `to_nnx`.

    Args:
      module: what `to_nnx` or `nnx.bridge.ToNNX` returned, trained or restored since.

    Returns:
      `{"params": ..., "batch_stats": ...}`, the same bits: for `model.apply`, `save_pretrained`, `to_timm`.

    Raises:
      UserError: another kind of object.
    """
    if not isinstance(module, nnx.bridge.ToNNX):
        raise UserError(
            f"got {_named(module)}; give a module that se_flax.to_nnx made (of a larger NNX module, the attribute that "
            "holds it)"
        )
    return bridge_variables.nnx_attrs_to_linen_vars(
        {name: value for name, value in vars(module).items() if not name.startswith(_OWN)}
    )


def _plain(tree: Any) -> Any:
    return {name: _plain(part) for name, part in tree.items()} if isinstance(tree, Mapping) else tree


def _named(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"
