"""Deterministic synthetic weights and images for checkpoint-parity fixtures (NumPy only).

The same rule fills a PyTorch model when a fixture is written and a converted
model when it is checked, so a fixture needs to hold only names, shapes, a few
scales and the reference outputs.
"""

import zlib

import numpy as np

ONE_CENTRED = ("gain", "gamma", "ls", "layer_scale", "lambda")


def _rng(label: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(label.encode()))


def tensor(name: str, shape, norm_scale=None) -> np.ndarray:
    """Value of one state-dict entry.

    Args:
      name: the entry's key in the PyTorch state dict.
      shape: its shape, in PyTorch's layout (OIHW for convolutions).
      norm_scale: for the running statistics of a batch norm, the scalar that the
        fixture stores for that layer; None for every other entry.

    Returns:
      float32 array of `shape` (int64 zero for `num_batches_tracked`).
    """
    shape = tuple(shape)
    leaf = name.rsplit(".", 1)[-1]
    rng = _rng(name)
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_mean":
        return (0.1 * np.sqrt(norm_scale) * rng.standard_normal(shape)).astype(np.float32)
    if leaf == "running_var":
        return (norm_scale * rng.uniform(0.8, 1.2, shape)).astype(np.float32)
    if leaf.startswith(ONE_CENTRED) or (len(shape) < 2 and leaf != "bias" and not leaf.endswith("bias")):
        return rng.uniform(0.8, 1.2, shape).astype(np.float32)
    if len(shape) < 2:
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    return (rng.standard_normal(shape) * np.sqrt(2.0 / fan_in)).astype(np.float32)


def state_dict(entries, norm_scales) -> dict:
    """All entries of a fixture: `entries` is [[name, shape], ...], `norm_scales` {norm layer: scalar}."""
    return {n: tensor(n, s, norm_scales.get(n.rsplit(".", 1)[0])) for n, s in entries}


def images(shape) -> np.ndarray:
    """Reference input: float32, PyTorch's NCHW layout, already normalised; smooth plus noise."""
    n, c, h, w = shape
    rng = _rng("images")
    yy, xx = np.meshgrid(np.linspace(0, 1, h), np.linspace(0, 1, w), indexing="ij")
    f = rng.uniform(1, 6, (n, c, 2))
    p = rng.uniform(0, 2 * np.pi, (n, c, 2))
    rows = np.sin(2 * np.pi * f[..., :1, None] * yy + p[..., :1, None])
    columns = np.cos(2 * np.pi * f[..., 1:, None] * xx + p[..., 1:, None])
    smooth = rows + columns
    return (smooth + 0.5 * rng.standard_normal(shape)).astype(np.float32)


def probe(name: str, shape) -> np.ndarray:
    """Unit-variance float64 vector on which a gradient or a statistic is projected."""
    return _rng("probe:" + name).standard_normal(tuple(shape))


def sample_index(size: int, count: int = 64) -> np.ndarray:
    """Flat positions (in NCHW order) at which a feature map's values are stored."""
    return _rng(f"sample:{size}").integers(0, size, count)
