"""What Keras itself says of its networks: fixtures that `tools/keras_layouts.py` wrote, and the weights behind them.

`tests/keras/<our name>.json.gz` was written by Keras 3 (`<our name>.keras2.json.gz` by Keras 2):

| key | meaning |
|---|---|
| `application`, `keras` | how keras.applications calls the network; the version |
| `entries` | `[[layer/weight, shape, path in a .weights.h5 file], ...]`: all variables in the order of the model |
| `legacy` | paths in an `.h5` file, in the same order, for some |
| `norm_scales` | for some: mean square in front of every batch norm, the second argument of `weights` |
| `logits` | for these: every fifth logit of `images()` with those weights |

NumPy alone: the weights are not stored, `weights` derives them from names and shapes.
"""

import functools
import gzip
import json
from pathlib import Path

from parity import synthetic

FOLDER = Path(__file__).parent / "keras"
SIZE = 64
STEP = 5

_TORCH = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


@functools.cache
def fixture(name):
    with gzip.open(FOLDER / f"{name}.json.gz", "rt") as file:
        return json.load(file)


def write(name, content):
    with gzip.GzipFile(FOLDER / f"{name}.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(content, separators=(",", ":")).encode())


def tensor(key, shape, norm_scale):
    """One variable in Keras's layout."""
    layer, _, weight = key.rpartition("/")
    axes = range(len(shape))
    if weight.endswith("kernel"):  # from torch's OIHW, where a depthwise kernel has I = 1
        axes = (
            (1, 0) if len(shape) == 2 else (2, 3, 0, 1) if "dwconv" in layer or "depthwise" in layer else (2, 3, 1, 0)
        )
    torch_shape = [0] * len(shape)
    for ours, theirs in enumerate(axes):
        torch_shape[theirs] = shape[ours]
    name = f"{layer}.{_TORCH.get(weight, 'weight' if weight.endswith('kernel') else weight)}"
    return synthetic.tensor(name, torch_shape, norm_scale).transpose(axes)


def weights(entries, norm_scales):
    """All variables but those of the preprocessing, by `<layer>/<weight>`.

    Args:
      entries: `[[key, shape, ...], ...]`.
      norm_scales: by layer; 1 where there is none.
    """
    return {
        key: tensor(key, shape, norm_scales.get(key.rpartition("/")[0], 1.0))
        for key, shape, *_ in entries
        if not key.startswith("normalization")
    }


def images():
    """float32 [2, 64, 64, 3], normalised."""
    return synthetic.images((2, 3, SIZE, SIZE)).transpose(0, 2, 3, 1)
