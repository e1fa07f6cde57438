"""A network's entries against a fixture's: names, shapes and count, without computing anything."""

import math

from parity import compare
from se_flax.weights.torch import torch_key, variable_shapes
from se_flax.zoo import create_model, get_variant

# From our kernels' axes to torch's, by rank.
AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}


def check_layout(name):
    reference = compare.fixture(name)
    ours, count = {}, 0
    for path, leaf in variable_shapes(create_model(name), 64).items():
        axes = AXES.get(len(leaf.shape), (0,)) if path[-1] == "kernel" else range(len(leaf.shape))
        ours[torch_key(path)] = [leaf.shape[axis] for axis in axes]
        count += math.prod(leaf.shape) if path[0] == "params" else 0
    expected = {key: shape for key, shape in reference["entries"] if not key.endswith("num_batches_tracked")}
    assert ours == expected
    assert count == reference["num_params"] == get_variant(name).num_params


def check_input_size(name):
    """The size that the variant was designed for is that of its first published checkpoint."""
    sizes = [checkpoint["input_size"][1] for checkpoint in compare.fixture(name)["checkpoints"]]
    assert get_variant(name).input_size == (sizes[0] if sizes else 224)


def known(name):
    """Whether a fixture of this network is here."""
    return any((compare.HERE / kind / f"{name}.json.gz").exists() for kind in ("fixtures", "specs"))
