"""Alternating flips: an image is mirrored in every other epoch instead of by chance (Jordan 2024, section 3.6).

In any two epochs in a row the network then sees an image both ways, where chance shows one of them twice to half of the
images.
"""

import jax
import jax.numpy as jnp

from se_flax.arrays import check_array

Array = jax.Array


def mirrored(images: Array, key: Array, epoch: Array) -> Array:
    """Which images are mirrored in an epoch.

    The direction in epoch 0 is drawn from the run's key and the sum of the image's values, so that no index has to
    travel with it. It belongs to the image if the image is the same in every epoch; after a random crop on the host
    (`data.train_crop=random_resized`) the flips are by chance again.

    Args:
      images: uint8 [N, H, W, C], before augmentation.
      key: the same in every step of a run.
      epoch: integers [N], the epoch of each image.

    Returns:
      bool [N]; in the next epoch each is the opposite.

    Raises:
      UserError: an array of another shape or dtype.
    """
    images = check_array(images, "the images of mirrored", "[N, H, W, C]", kind="integer")
    epoch = check_array(epoch, "the epochs of mirrored", f"[{images.shape[0]}]", kind="integer")
    marks = jnp.sum(images, axis=(1, 2, 3), dtype=jnp.uint32)
    first = jax.vmap(lambda mark: jax.random.bernoulli(jax.random.fold_in(key, mark)))(marks)
    return first ^ (epoch % 2 == 1)


def epochs(step: Array, index: Array, batch: int, examples: int) -> Array:
    """Epoch of each image of a batch, as the loader reads one endless stream.

    Args:
      step: int32 scalar, updates done.
      index: int32 [n], of the images in the global batch.
      batch: images of an update.
      examples: training images.

    Returns:
      uint32 [n]; right up to 2**32 images of a run.
    """
    position = jnp.asarray(step, jnp.uint32) * jnp.uint32(batch) + jnp.asarray(index, jnp.uint32)
    return position // jnp.uint32(examples)
