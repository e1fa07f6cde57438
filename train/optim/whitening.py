"""A first convolution that whitens patches of the training images (Page 2019; Jordan 2024, section 3.1)."""

import numpy as np

from se_flax.errors import UserError

EPSILON = 5e-4  # Jordan's, added to the variances of normalised images
IMAGES = 2000


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuses a kernel that has more filters than patches have principal axes, or an axis with one sign only.

    Args:
      shape: (kh, kw, C, features).

    Raises:
      UserError: `features` is odd, or more than twice the values of a patch.
    """
    height, width, channels, features = shape
    most = 2 * height * width * channels
    if features % 2 or features > most:
        raise UserError(
            f"optim.whiten_stem needs an even number of at most {most} filters in a first convolution of {height} x "
            f"{width} pixels, and this network has {features}; leave it out, or choose another network"
        )


def whitening_kernel(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Filters along the principal axes of the patches, of the largest variance first, scaled to variance 1.

    Args:
      images: float [N, H, W, C], normalised.
      shape: of the kernel, (kh, kw, C, features).

    Returns:
      float32 kernel; the second half of the filters is the first half with the other sign.

    Raises:
      UserError: as `check_shape`.
    """
    check_shape(shape)
    height, width, channels, features = shape
    total, count = np.zeros((height * width * channels,) * 2), 0
    for image in images:  # all patches at once would not fit into memory for large images
        patches = np.lib.stride_tricks.sliding_window_view(image, (height, width), axis=(0, 1))
        rows = patches.transpose(0, 1, 3, 4, 2).reshape(-1, height * width * channels).astype(np.float64)
        total += rows.T @ rows
        count += len(rows)
    variances, axes = np.linalg.eigh(total / count)
    chosen = slice(None, -features // 2 - 1, -1)
    filters = axes[:, chosen] / np.sqrt(variances[chosen] + EPSILON)
    return np.concatenate([filters, -filters], axis=1).reshape(shape).astype(np.float32)
