"""Convolution, batch norm and the small pieces that every backbone shares.

They differ from Linen's own where checkpoints of other frameworks demand it: symmetric padding (PyTorch) beside
TensorFlow's SAME, running variance from the unbiased estimate (PyTorch), and statistics that cannot go negative.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.convolution import convolve
from se_flax.errors import UserError
from se_flax.functional import check_map
from se_flax.native import native
from se_flax.norms import check_spread
from se_flax.pointwise import Product, affine, image_means, moments, product
from se_flax.sharding import gathered, own_dense

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
    """Convolution of images [N, H, W, C], signals [N, L, C] or volumes [N, D, H, W, C].

    Attributes:
      features: output channels.
      kernel_size: side of the kernel, the same along every spatial axis, or one number per axis: (height, width).
      strides: of all spatial axes.
      groups: input and output channels are split in so many groups.
      dilation: of all spatial axes.
      padding: `"symmetric"` pads (k - 1) / 2 * dilation on both sides, as PyTorch networks do; `"SAME"` pads as
        TensorFlow does (more at the end when the total is odd); or an explicit ((top, bottom), (left, right)).
      use_bias: adds a bias.
      kernel_init: initialiser of the kernel [kh, kw, features_in / groups, features].
      bias_init: initialiser of the bias [features].
      dtype: of the arithmetic; None takes the input's. Parameters are float32.

    Raises:
      UserError: an input of another rank.
    """

    features: int
    kernel_size: int | tuple[int, ...] = 3
    strides: int = 1
    groups: int = 1
    dilation: int = 1
    padding: str | Sequence[tuple[int, int]] = "symmetric"
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = he_normal_fan_out
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    dtype: Dtype = None

    @nn.compact
    def weights(self, channels: int, axes: int) -> tuple[Array, Array | None]:
        """The parameters for an input of so many channels and spatial axes: kernel and bias, float32."""
        size = (self.kernel_size,) * axes if isinstance(self.kernel_size, int) else self.kernel_size
        kernel = self.param("kernel", self.kernel_init, (*size, channels // self.groups, self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32) if self.use_bias else None
        return kernel, bias

    def __call__(self, x: Array, *, in_float32: bool = False) -> Array:
        """Convolves.

        Args:
          x: [N, H, W, C].
          in_float32: this call's arithmetic is in float32, whatever the module's.

        Returns:
          [N, h, w, features].
        """
        x = check_map(x, "a convolution")
        axes = x.ndim - 2
        if not isinstance(self.kernel_size, int) and len(self.kernel_size) != axes:
            raise UserError(
                f"got kernel_size={tuple(self.kernel_size)} for a map of shape {tuple(x.shape)}; give one number per "
                f"spatial axis, {axes}, or a single one for all"
            )
        kernel, bias = self.weights(x.shape[-1], axes)
        padding = self.padding
        if padding == "symmetric":
            padding = [((k - 1) // 2 * self.dilation,) * 2 for k in kernel.shape[:-2]]
        dtype = jnp.float32 if in_float32 else self.dtype or x.dtype
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        settings = (self.strides,) * axes, padding, (self.dilation,) * axes, self.groups
        # `init` runs operation by operation, and what takes long is compiling each: XLA's convolution is one.
        y = native(x, kernel, *settings) if self.is_initializing() else convolve(x, kernel, *settings)
        return y if bias is None else y + jax.lax.broadcast_to_rank(gathered(bias).astype(dtype), y.ndim)

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is 1x1 and meets every pixel: the output's mean is then the convolution of the input's."""
        return self.kernel_size in (1, (1, 1)) and self.strides == 1

    def widens(self, x: Array) -> bool:
        """Whether the output has at least twice the channels of x, so that reading x instead of it saves passes."""
        pixels = x.shape[1] * x.shape[2] if x.ndim == 4 else 0
        dense = self.is_pointwise and self.groups == 1 and not self.use_bias
        return dense and pixels > 1 and self.features >= 2 * x.shape[-1]

    def deferred(self, x: Array) -> Product:
        """The output of a convolution that `widens`, not stored on a TPU: for a training `BatchNorm` alone."""
        kernel, _ = self.weights(x.shape[-1], 2)
        dtype = self.dtype or x.dtype
        return product(x.astype(dtype), kernel[0, 0].astype(dtype))


class Coefficients(NamedTuple):
    """A norm as an affine function per channel, factor * x + offset, not applied yet.

    Attributes:
      x: what the norm was called with.
      factor: float32 [C]; None for the identity (a norm that was folded into its convolution).
      offset: likewise.
      means: of factor * x + offset over the spatial axes, float32 [N, 1, 1, C], where they were asked for.
    """

    x: Array | Product
    factor: Array | None
    offset: Array | None
    means: Array | None


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
      defer_conv: training on a TPU does not store the output of a 1x1 convolution before this norm where it can do
        without: fewer passes over memory for more multiply-adds, see `se_flax.pointwise`. The numbers are the same.
      scale_init: initialiser of the scale.
      dtype: of the output; None takes the input's.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    axis_name: str | None = None
    defer_conv: bool = False
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()
    dtype: Dtype = None

    def __call__(self, x: Array | Product, *, train: bool = False) -> Array:
        """Normalises.

        Args:
          x: [..., C], or a convolution's deferred output.
          train: use and record the batch's statistics.

        Returns:
          The shape of x.

        Raises:
          UserError: training on a single value per channel: one image of one pixel, on all devices that share the
            statistics.
        """
        x, factor, offset, _ = self.coefficients(x, train=train)
        return self.affine(x, factor, offset)

    def affine(self, x: Array | Product, factor: Array | None, offset: Array | None) -> Array:
        """The function factor * x + offset in this norm's dtype; for `factor` [C], or [N, 1, 1, C] with gates in it."""
        return affine(x, factor, offset, self.dtype or x.dtype)

    @nn.compact
    def coefficients(self, x: Array | Product, *, train: bool = False, per_image: bool = False) -> Coefficients:
        """The norm of x as an affine function per channel.

        Args:
          x: [..., C]; [N, H, W, C] with `per_image`. Or a convolution's deferred output.
          train: use and record the batch's statistics.
          per_image: also give every image's means after the norm, from the same pass over x.

        Returns:
          The coefficients, with x.
        """
        x = x if isinstance(x, Product) else jnp.asarray(x)
        shape = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        means = image_means(x) if per_image else None
        if train:
            mean, var, count = self._batch_statistics(x, means)
            if not self.is_initializing():
                unbiased = var * (count / max(count - 1, 1))
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        factor = gathered(scale * jax.lax.rsqrt(var + self.epsilon))
        offset = gathered(bias - mean * factor)
        return Coefficients(x, factor, offset, None if means is None else means * factor + offset)

    def _batch_statistics(self, x: Array | Product, pooled: Array | None) -> tuple[Array, Array, int]:
        across = self.axis_name if not self.is_initializing() else None
        count = math.prod(x.shape[:-1])
        if across is not None:
            count *= jax.lax.axis_size(across)
        check_spread(
            self,
            count,
            "one value per channel (one image, one pixel)",
            "train with more images per device and micro-batch, larger images, or statistics over all devices "
            "(axis_name; in the training program parallel.batch_norm=global)",
        )
        if not isinstance(x, Product) and x.size == x.shape[0] * x.shape[-1]:
            # Descriptors vary little between images beside their mean: the difference of moments would cancel, and a
            # second pass over a vector per image costs nothing.
            axes, wide = tuple(range(x.ndim - 1)), x.astype(jnp.promote_types(x.dtype, jnp.float32))
            mean = _replica_mean(jnp.mean(wide, axes, keepdims=True), across)
            return mean.reshape(-1), _replica_mean(jnp.mean(jnp.square(wide - mean), axes), across), count
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
    # A window that starts in the padding is none, so the most that can hang over serves a side of unknown length.
    hang = [(0, -(dim - size) % strides if isinstance(dim, int) else strides - 1) for dim in x.shape[1:3]]
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
    return own_dense(classifier)(num_classes, kernel_init=kernel_init, name=name)(x) if num_classes else x


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
