"""Networks for click prediction: logistic regression, a factorisation machine, FiBiNET.

All are called as `model.apply(variables, ids, train=False)` with ids int32 [batch, fields], row numbers of one
embedding table in which every field has its own range, and return logits float32 [batch].
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.ctr import functional as C
from se_flax.ctr.layers import FIBINET_SE, BilinearInteraction
from se_flax.errors import UserError

Array = jax.Array

_small = nn.initializers.normal(0.01)


def _check(ids: Array, num_ids: int) -> None:
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UserError(f"got ids of shape {ids.shape} and dtype {ids.dtype}; give integers [batch, fields]")
    if num_ids < 1:
        raise UserError(f"got num_ids={num_ids}; give the number of rows of the embedding table, at least 1")


class LogisticRegression(nn.Module):
    """One weight per id: logit = bias + sum of the weights of a row's ids.

    Parameters: `linear/embedding` [num_ids, 1], `bias` [].

    Attributes:
      num_ids: rows of the table.
      use_bias: adds the bias.

    Raises:
      UserError: the ids are not integers [batch, fields], or `num_ids` is not positive.
    """

    num_ids: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, ids: Array, *, train: bool = False) -> Array:
        """Args: ids int32 [N, F]; train: no effect. Returns: logits float32 [N]."""
        del train
        _check(ids, self.num_ids)
        weights = nn.Embed(self.num_ids, 1, embedding_init=nn.initializers.zeros_init(), name="linear")(ids)
        logits = weights[..., 0].sum(axis=-1)
        return logits + self.param("bias", nn.initializers.zeros_init(), (), jnp.float32) if self.use_bias else logits


class FM(nn.Module):
    """Factorisation machine of degree 2 (Rendle 2010, equation 1).

    Parameters: `first_order` as in `LogisticRegression`, `embedding/embedding` [num_ids, K].

    Attributes:
      num_ids: rows of the table.
      embedding_size: K.

    Raises:
      UserError: as in `LogisticRegression`.
    """

    num_ids: int
    embedding_size: int = 10

    @nn.compact
    def __call__(self, ids: Array, *, train: bool = False) -> Array:
        """Args: ids int32 [N, F]; train: no effect. Returns: logits float32 [N]."""
        del train
        logits = LogisticRegression(self.num_ids, name="first_order")(ids)
        return logits + C.factorisation(
            nn.Embed(self.num_ids, self.embedding_size, embedding_init=_small, name="embedding")(ids)
        )


class FiBiNET(nn.Module):
    """FiBiNET (Huang et al. 2019): a linear part and bilinear interactions of raw and of gated embeddings.

    With hidden layers it is the deep network (DeepSE-FM), in which all interactions go through an MLP; without, it is
    the shallow one (SE-FM), which sums them. Without attention there is no gated branch (the paper's ablation NO-SE).

    Parameters: `first_order`, `embedding/embedding` [num_ids, K], `attention`, `bilinear` (and `bilinear_gated` if not
    shared), `hidden_0` ..., `output`.

    Attributes:
      num_ids: rows of the table.
      embedding_size: K.
      hidden: widths of the MLP's hidden layers; empty for the shallow network.
      attention: attention over fields, `SqueezeExciteFields` or a partial of it; None for none.
      bilinear: kind of interaction of the raw embeddings, see `BilinearInteraction`.
      bilinear_gated: kind of interaction of the gated embeddings; None for `bilinear`.
      share_bilinear: one set of matrices for both, as in FuxiCTR; only if the kinds are the same.
      dropout: rate after each hidden layer.
      dtype: of the MLP's arithmetic; None for float32.

    Raises:
      UserError: as in `LogisticRegression`; the kind of interaction is unknown; or there are fewer than two fields.
    """

    num_ids: int
    embedding_size: int = 10
    hidden: Sequence[int] = (400, 400, 400)
    attention: Callable[..., nn.Module] | None = FIBINET_SE
    bilinear: str = "interaction"
    bilinear_gated: str | None = None
    share_bilinear: bool = True
    dropout: float = 0.0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, ids: Array, *, train: bool = False) -> Array:
        """Args: ids int32 [N, F]; train: dropout is active, with the rng `dropout`. Returns: logits float32 [N]."""
        # The MLP's output layer has a bias already.
        logits = LogisticRegression(self.num_ids, use_bias=not self.hidden, name="first_order")(ids)
        x = nn.Embed(self.num_ids, self.embedding_size, embedding_init=_small, name="embedding")(ids)
        interact = BilinearInteraction(self.bilinear, name="bilinear")
        branches = [interact(x)]
        if self.attention is not None:
            gated = self.attention(name="attention")(x, train=train)
            kind = self.bilinear_gated or self.bilinear
            if kind != self.bilinear or not self.share_bilinear:
                interact = BilinearInteraction(kind, name="bilinear_gated")
            branches.append(interact(gated))
        y = jnp.concatenate(branches, axis=1)
        y = y.reshape(y.shape[0], -1)
        if not self.hidden:
            return logits + y.sum(axis=-1)
        for i, width in enumerate(self.hidden):
            y = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"hidden_{i}")(y))
            y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return logits + nn.Dense(1, dtype=self.dtype, name="output")(y)[..., 0].astype(jnp.float32)
