"""Arrays to put into files, and what reading a file must do: for the tests of all formats."""

import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from se_flax import UserError
from se_flax.checkpoints.files import open_arrays

RNG = np.random.default_rng(0)
ARRAYS = {
    "conv1.weight": RNG.standard_normal((2, 3)).astype(np.float32),
    "half": RNG.standard_normal(5).astype(np.float16),
    "double": RNG.standard_normal((3, 1)),
    "counter": np.asarray(7, np.int64),
    "mask": np.asarray([True, False]),
    "none": np.zeros((0, 4), np.float32),
    "columns": np.asfortranarray(RNG.standard_normal((3, 4)).astype(np.float32)),
}
BFLOAT16 = np.asarray([1.5, -2, 1e30], ml_dtypes.bfloat16)
HUGE = 10**12  # a shape that no memory holds


def read(path):
    with open_arrays(path) as arrays:
        return {name: np.asarray(value) for name, value in arrays.items()}


def refuses(path, match):
    """Opening or reading fails, in one line that names the path."""
    with pytest.raises(UserError, match=match) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def save_safetensors(path, arrays, metadata=None):
    safetensors.numpy.save_file({k: np.asarray(v, order="C") for k, v in arrays.items()}, path, metadata)


def save_h5(path, arrays, **options):
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file.create_dataset(name, data=value, **(options if value.size > 9 else {}))


SAVE = {
    "safetensors": save_safetensors,
    "npz": lambda path, arrays: np.savez(path, **arrays),
    "h5": save_h5,
    "packed.npz": lambda path, arrays: np.savez_compressed(path, **arrays),
    "packed.hdf5": lambda path, arrays: save_h5(path, arrays, chunks=(2, 2), compression="gzip", shuffle=True),
}
