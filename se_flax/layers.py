"""Convolution, batch norm and the small pieces that every backbone shares.

They differ from Linen's own where checkpoints of other frameworks demand it: symmetric padding (PyTorch) beside
TensorFlow's SAME, running variance from the unbiased estimate (PyTorch), and statistics that cannot go negative.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.activated import gate_activated, squeeze_activated
from se_flax.bound import Function
from se_flax.convolution import convolve
from se_flax.errors import UserError
from se_flax.native import native
from se_flax.pointwise import Product, affine, image_means, moments, product

Array = jax.Array
Dtype = Any


@functools.cache
def normal_fan_out(scale: float) -> nn.initializers.Initializer:
    """Normal with variance scale / (kernel area * features): fan out, He et al. 2015, equation 14.

    The numbers of Flax's `variance_scaling(scale, "fan_out", "normal")`, drawn as a row and then given their shape: the
    random bits of four axes take XLA up to three times as long to compile, and every shape is compiled once.

    Args:
      scale: 2 for what a ReLU follows.

    Returns:
      An initialiser of kernels [kh, kw, C / groups, features], float32 where it is not told otherwise.
    """

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        row = jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)
        return row * jnp.sqrt(scale / (math.prod(shape[:-2]) * shape[-1])).astype(dtype)

    # Flax gives shapes as lists, too, which cannot be looked up.
    return lambda key, shape, dtype=jnp.float32: draw(key, tuple(shape), dtype)


# As the ResNets of torchvision and timm start.
he_normal_fan_out = normal_fan_out(2.0)
_classifier_init = nn.initializers.normal(0.01)


class Conv(nn.Module):
    """2-D convolution, NHWC.

    Attributes:
      features: output channels.
      kernel_size: side of the square kernel, or (height, width).
      strides: of both axes.
      groups: input and output channels are split in so many groups.
      dilation: of both axes.
      padding: `"symmetric"` pads (k - 1) / 2 * dilation on both sides, as PyTorch networks do; `"SAME"` pads as
        TensorFlow does (more at the end when the total is odd); or an explicit ((top, bottom), (left, right)).
      use_bias: adds a bias.
      kernel_init: initialiser of the kernel [kh, kw, features_in / groups, features].
      bias_init: initialiser of the bias [features].
      dtype: of the arithmetic; None takes the input's. Parameters are float32.
    """

    features: int
    kernel_size: int | tuple[int, int] = 3
    strides: int = 1
    groups: int = 1
    dilation: int = 1
    padding: str | Sequence[tuple[int, int]] = "symmetric"
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = he_normal_fan_out
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array, *, in_float32: bool = False, deferred: bool = False) -> Any:
        """Convolves.

        Args:
          x: [N, H, W, C].
          in_float32: this call's arithmetic is in float32, whatever the module's.
          deferred: a training `BatchNorm` alone will read the output. It can do without a 1x1 convolution's where that
            has more channels than the input, and takes a `pointwise.Product` in its place.

        Returns:
          [N, h, w, features], or the product.
        """
        x = jnp.asarray(x)
        size = (self.kernel_size, self.kernel_size) if isinstance(self.kernel_size, int) else self.kernel_size
        kernel = self.param("kernel", self.kernel_init, (*size, x.shape[-1] // self.groups, self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32) if self.use_bias else None
        padding = self.padding
        if padding == "symmetric":
            padding = [((k - 1) // 2 * self.dilation,) * 2 for k in size]
        dtype = jnp.float32 if in_float32 else self.dtype or x.dtype
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        if deferred and self._widens(x):
            return product(x, kernel[0, 0])
        settings = (self.strides, self.strides), padding, (self.dilation, self.dilation), self.groups
        # Nobody waits for the output of `init`, run operation by operation, but for its compilation: XLA's is one.
        y = native(x, kernel, *settings) if self.is_initializing() else convolve(x, kernel, *settings)
        return y if bias is None else y + bias.astype(dtype)

    def _widens(self, x: Array) -> bool:
        pointwise = self.kernel_size in (1, (1, 1)) and self.groups == self.strides == 1 and not self.use_bias
        return pointwise and self.features >= 2 * x.shape[-1] and x.shape[1] * x.shape[2] > 1


class BatchNorm(nn.Module):
    """Batch normalisation over N, H, W (Ioffe and Szegedy 2015, algorithm 1).

    Statistics are computed in float32. The running variance is updated with the unbiased estimate (n / (n - 1)), as
    PyTorch does and TensorFlow does not: a network trained there continues here with the same statistics. The
    difference matters for small batches only (n counts pixels too).

    Attributes:
      epsilon: added to the variance.
      momentum: share of the old running statistic that is kept, Flax's and TensorFlow's convention. PyTorch's 0.1 is
        0.9 here.
      axis_name: mapped device axis over which the batch statistics are averaged while training; None normalises each
        replica by its own.
      from_input: blocks leave the output of a 1x1 convolution before this norm unwritten where training on a TPU can do
        without: fewer passes over memory for more multiply-adds, see `se_flax.pointwise`. The numbers are the same.
      scale_init: initialiser of the scale.
      dtype: of the output; None takes the input's.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    axis_name: str | None = None
    from_input: bool = False
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()
    dtype: Dtype = None

    @nn.compact
    def __call__(
        self,
        x: Array | Product,
        *,
        train: bool = False,
        gate: Callable[[Array], Array] | None = None,
        act: Callable[[Array], Array] | None = None,
        squeezed: Callable[[], Array] | None = None,
    ) -> Array:
        """Normalises, and gates the normalised map where it is told how.

        With `gate` the result is that of the norm followed by an attention whose gate is a function of the channels'
        means, without its passes over the map. For the map u, mean m over H and W, and the norm a * u + b: the squeeze
        is a * m + b, and norm and gate s are one affine per image and channel, (s * a) * u + s * b. The batch's
        statistics are means over the images of m and of the mean square, which one pass gives. With an activation
        between norm and squeeze as well, see `se_flax.activated`.

        Args:
          x: [..., C]; [N, H, W, C] with a gate. Or a `Conv`'s deferred output.
          train: use and record the batch's statistics.
          gate: from the mean of the normalised map, float32 [N, 1, 1, C], to the gates, of the same shape.
          act: elementwise, of the normalised map, which is squeezed and gated after it; only with a gate.
          squeezed: gives x's means over H and W, float32 [N, 1, 1, C], without a pass over x. Only a norm that was
            folded away (`fused.FoldedNorm`) takes them there: training makes that pass anyway, and the multiply-adds of
            a network as it is are those that papers count.

        Under `nn.tabulate` a function is to be given as a `bound.Function`.

        Returns:
          The shape of x.
        """
        x = x if isinstance(x, Product) else jnp.asarray(x)
        shape = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        del squeezed
        pooled = image_means(x) if gate is not None and act is None else None
        if train:
            mean, var, count = self._batch_statistics(x, pooled)
            if not self.is_initializing():
                unbiased = var * (count / max(count - 1, 1))
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        offset = bias - mean * factor
        if gate is not None and act is not None:
            act = act.function if isinstance(act, Function) else act
            y = x.written() if isinstance(x, Product) else x
            gates = gate(squeeze_activated(y, factor, offset, act))
            return gate_activated(y, factor, offset, gates, act, self.dtype or x.dtype)
        if gate is not None and pooled is not None:
            gates = gate(pooled * factor + offset)
            factor, offset = gates * factor, gates * offset
        return affine(x, factor, offset, self.dtype or x.dtype)

    def _batch_statistics(self, x: Array | Product, pooled: Array | None) -> tuple[Array, Array, int]:
        across = self.axis_name if not self.is_initializing() else None
        count = math.prod(x.shape[:-1])
        if across is not None:
            count *= jax.lax.axis_size(across)
        if not isinstance(x, Product) and x.size == x.shape[0] * x.shape[-1]:
            # Descriptors vary little between images beside their mean: the difference of moments would cancel, and a
            # second pass over a vector per image costs nothing.
            axes, wide = tuple(range(x.ndim - 1)), x.astype(jnp.promote_types(x.dtype, jnp.float32))
            mean = _replica_mean(jnp.mean(wide, axes), across)
            return mean, _replica_mean(jnp.mean(jnp.square(wide - mean), axes), across), count
        mean, square = _replica_mean(moments(x, pooled), across)
        # Both moments in one pass over the map; rounding may leave a constant channel a hair below zero, and the
        # root of that is NaN.
        return mean, jnp.maximum(square - jnp.square(mean), 0.0), count


def _replica_mean(tree: Any, axis_name: str | None) -> Any:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def max_pool(x: Array, size: int = 3, strides: int = 2, padding: int = 1) -> Array:
    """Maximum over size x size windows; x [N, H, W, C], `padding` pixels of -inf on every side.

    Of equal values in a window the first gets the gradient; on a CPU, where XLA's form is slow, they share it.
    """

    def native(x: Array) -> Array:
        return nn.max_pool(x, (size, size), (strides, strides), [(padding, padding)] * 2)

    def by_axis(x: Array) -> Array:
        for axis in (1, 2):
            edge = [(padding, padding) if i == axis else (0, 0) for i in range(x.ndim)]
            x = jnp.pad(x, edge, constant_values=-jnp.inf)
            end = x.shape[axis] - size + 1
            windows = [jax.lax.slice_in_dim(x, i, i + end, strides, axis) for i in range(size)]
            x = functools.reduce(jnp.maximum, windows)
        return x

    return jax.lax.platform_dependent(x, cpu=by_axis, default=native)


def avg_pool(x: Array, size: int, strides: int) -> Array:
    """Mean over size x size windows of x [N, H, W, C]; windows that hang over the end average what they hold."""
    hang = [(0, -(dim - size) % strides) for dim in x.shape[1:3]]
    return nn.avg_pool(x, (size, size), (strides, strides), hang, count_include_pad=False)


def blur_pool(x: Array) -> Array:
    """Halves the resolution behind a binomial low-pass filter (Zhang 2019, section 3.2: BlurPool, triangle 3).

    Args:
      x: [N, H, W, C].

    Returns:
      [N, ceil(H / 2), ceil(W / 2), C]; one pixel of zeros is assumed around the map.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        x = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)])
        before, here, after = (jax.lax.slice_in_dim(x, i, i + size, 2, axis) for i in range(3))
        x = (before + 2 * here + after) * 0.25
    return x


def drop_path(x: Array, rate: float, key: Array) -> Array:
    """Stochastic depth (Huang et al. 2016): zeroes a residual branch for whole images, rescales the rest.

    Args:
      x: branch [N, ...].
      rate: probability of dropping, below 1.
      key: PRNG key.

    Returns:
      Array like x, with the expectation of x.
    """
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def classify(
    x: Array,
    classifier: Callable[..., Any],
    num_classes: int,
    *,
    name: str,
    kernel_init: nn.initializers.Initializer = _classifier_init,
    drop_rate: float = 0.0,
    train: bool = False,
) -> Array:
    """Dropout and the last layer of a network; to be called where the network makes its submodules.

    Args:
      x: features [N, C].
      classifier: class or partial, called as `classifier(num_classes, kernel_init=..., name=...)`.
      num_classes: its width; 0 leaves it out.
      name: of the submodule.
      kernel_init: of its weights.
      drop_rate: of the dropout.
      train: the dropout is active.

    Returns:
      Logits [N, num_classes], or the features.
    """
    x = nn.Dropout(drop_rate, deterministic=not train)(x)
    return classifier(num_classes, kernel_init=kernel_init, name=name)(x) if num_classes else x


def check_images(images: Array, channels: int) -> Array:
    """Refuses anything but float NHWC images.

    Args:
      images: what the network was called with.
      channels: how many channels it expects.

    Returns:
      The images as an array of JAX's: NumPy's float64 is its float32, unless `jax_enable_x64` is set.

    Raises:
      UserError: wrong rank, channel count or dtype.
    """
    if images.ndim != 4:
        raise UserError(
            f"got images of shape {tuple(images.shape)}; a network takes [N, H, W, {channels}] "
            "(add the batch axis to a single image: images[None])"
        )
    if images.shape[-1] != channels:
        hint = (
            "; the channels come last, transpose from NCHW with images.transpose(0, 2, 3, 1)"
            if images.shape[1] == channels
            else f"; pass {channels} channels, or create the model with in_channels={images.shape[-1]}"
        )
        raise UserError(
            f"got images of shape {tuple(images.shape)} with {images.shape[-1]} channels; this network takes "
            f"[N, H, W, {channels}]{hint}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"got images of dtype {images.dtype}; a network takes normalised floats: divide by 255, subtract the "
            "mean and divide by the standard deviation of its checkpoint"
        )
    return jnp.asarray(images)
