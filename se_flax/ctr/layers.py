"""Attention over fields and bilinear interaction as Linen modules over `se_flax.ctr.functional`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax import functional as F
from se_flax.ctr import functional as C
from se_flax.errors import UserError, closest
from se_flax.nn.attention_base import Initializer, he_normal

Array = jax.Array

glorot_normal = nn.initializers.glorot_normal()


def check_embeddings(x: Array, what: str, fields: int = 1) -> None:
    """Refuses arrays that are not embeddings [batch, fields, size] of at least `fields` fields.

    Raises:
      UserError: x has another rank, or fewer fields.
    """
    if x.ndim != 3 or x.shape[1] < fields:
        least = f" with at least {fields} fields" if fields > 1 else ""
        raise UserError(f"{what} got an array of shape {x.shape}; it takes embeddings [batch, fields, size]{least}")


class _Layer(nn.Module):
    """Kernel [inputs, outputs] and bias [outputs] of a dense layer."""

    features: int
    use_bias: bool
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Array, Array | None]:
        kernel = self.param("kernel", self.kernel_init, (inputs, self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32) if self.use_bias else None
        return kernel, bias


class SqueezeExciteFields(nn.Module):
    """Squeeze-and-excitation over the fields of a table: each embedding times a gate computed from all embeddings.

    The default is the sigmoid form; `FIBINET_SE` is the form of FiBiNET (Huang et al. 2019, section 3.2). Parameters:
    `<names[0]>/kernel` [F, M], `<names[1]>/kernel` [M, F], and their biases.

    Attributes:
      reduction: hidden width M = F / reduction, the r of the papers. Ignored when `width` is given.
      width: M itself.
      rounding: of M, see `se_flax.functional.reduced_width`; M is at least 1.
      squeeze: `mean` or `max` over an embedding, or a function from [N, F, K] to [N, F].
      activation: between the layers, by name or as a function.
      gate: `sigmoid`, `relu`, `tanh`, `hard_sigmoid` or a function.
      use_bias: biases in both layers.
      kernel_init: initialiser of both kernels.
      bias_init: initialiser of both biases.
      names: of the two layers.
      dtype: accepted for uniformity; the gates are always float32 and the output has the input's dtype.

    Raises:
      UserError: the input is not [batch, fields, embedding]; squeeze, activation, gate or rounding is unknown; or the
        reduction is not positive.
    """

    reduction: float = 4.0
    width: int | None = None
    rounding: str | Callable[[float], int] = "ceil"
    squeeze: str | F.Elementwise = "mean"
    activation: str | F.Elementwise = "relu"
    gate: str | F.Elementwise = "sigmoid"
    use_bias: bool = True
    kernel_init: Initializer = he_normal
    bias_init: Initializer = nn.initializers.zeros_init()
    names: tuple[str, str] = ("fc1", "fc2")
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Gates embeddings.

        Args:
          x: [N, F, K].
          train: no effect; part of the uniform call.

        Returns:
          [N, F, K] of x's dtype.
        """
        del train
        check_embeddings(x, "SqueezeExciteFields")
        fields = x.shape[1]
        hidden = self.width
        if hidden is None:
            hidden = F.reduced_width(fields, reduction=self.reduction, rounding=self.rounding)
        layer = (self.use_bias, self.kernel_init, self.bias_init)
        reduce_ = _Layer(hidden, *layer, name=self.names[0])(fields)
        expand = _Layer(fields, *layer, name=self.names[1])(hidden)
        return C.squeeze_excite_fields(
            x, *reduce_, *expand, squeeze=self.squeeze, activation=self.activation, gate=self.gate
        )


# The paper has F / 3 and does not define the rounding; DeepCTR and FuxiCTR round down.
FIBINET_SE = partial(
    SqueezeExciteFields, reduction=3, rounding="floor", gate="relu", use_bias=False, kernel_init=glorot_normal
)
"""FiBiNET's form: ReLU after both layers, r = 3, no biases (Huang et al. 2019, equation 2)."""


class _Form(NamedTuple):
    """A bilinear form: its formula, and the leading axes of its kernel for F fields."""

    formula: Callable[[Array, Array], Array]
    matrices: Callable[[int], tuple[int, ...]]


FORMS: Mapping[str, _Form | None] = {
    "all": _Form(C.bilinear_all, lambda fields: ()),
    "each": _Form(C.bilinear_each, lambda fields: (fields,)),
    "interaction": _Form(C.bilinear_interaction, lambda fields: (fields * (fields - 1) // 2,)),
    "hadamard": None,
}
"""Forms of `BilinearInteraction`."""


def _init_matrices(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Glorot's normal initialiser, for a stack of square matrices."""
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5


class BilinearInteraction(nn.Module):
    """Interactions (v_i W) * v_j of all pairs of fields i < j (Huang et al. 2019, section 3.3).

    Parameter: `kernel`, [K, K], [F, K, K] or [F (F - 1) / 2, K, K].

    Attributes:
      kind: `all` (one matrix), `each` (one per field), `interaction` (one per pair), or `hadamard` (none: v_i * v_j,
        the paper's ablation).
      kernel_init: initialiser of the matrices.

    Raises:
      UserError: the kind is unknown, or the input is not [batch, fields, embedding] with at least two fields.
    """

    kind: str = "interaction"
    kernel_init: Initializer = _init_matrices

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Args: x [N, F, K]. Returns: [N, F (F - 1) / 2, K] of x's dtype, pairs in the order (0, 1), (0, 2), ..."""
        if self.kind not in FORMS:
            raise UserError(f"unknown bilinear interaction {self.kind!r}; {closest(str(self.kind), FORMS)}")
        check_embeddings(x, "BilinearInteraction", fields=2)
        form = FORMS[self.kind]
        if form is None:
            return C.hadamard(x)
        shape = (*form.matrices(x.shape[1]), x.shape[2], x.shape[2])
        return form.formula(x, self.param("kernel", self.kernel_init, shape, jnp.float32))
