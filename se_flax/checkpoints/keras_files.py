"""Weight files of keras.applications: network and preprocessing by file name."""

import re
from dataclasses import replace

from se_flax.images.preprocess import Preprocess
from se_flax.variant import published_weights

_IMAGENET = Preprocess()
_HALF = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
# (x - 128) / 128 of a byte x: keras/src/applications/efficientnet_v2.py, `Rescaling(scale=1 / 128, offset=-1)`.
_AROUND_128 = Preprocess(mean=(128 / 255,) * 3, std=(128 / 255,) * 3)

# Our name, first part of the names of Keras's files, image size and normalisation in Keras. keras.applications puts the
# normalisation into the network (`include_preprocessing=True`); here it is part of `Preprocess`.
_NETWORKS: tuple[tuple[str, str, int, Preprocess], ...] = (
    *(
        (f"tf_efficientnet_b{i}", f"efficientnetb{i}", side, _IMAGENET)
        for i, side in enumerate((224, 240, 260, 300, 380, 456, 528, 600))
    ),
    *(
        (f"tf_efficientnetv2_b{i}", f"efficientnetv2b{i}", side, _IMAGENET)
        for i, side in enumerate((224, 240, 260, 300))
    ),
    ("tf_efficientnetv2_s", "efficientnetv2s", 384, _AROUND_128),
    ("tf_efficientnetv2_m", "efficientnetv2m", 480, _AROUND_128),
    ("tf_efficientnetv2_l", "efficientnetv2l", 480, _AROUND_128),
    *(
        (f"tf_mobilenetv3_{size}_{ours}", f"weightsmobilenetv3{size}{theirs}float", 224, _HALF)
        for size in ("small", "large")
        for ours, theirs in (("100", "22410"), ("075", "224075"), ("minimal_100", "minimalistic22410"))
    ),
)
NETWORKS = frozenset(ours for ours, *_ in _NETWORKS)
SUFFIXES = (".npz", ".h5", ".hdf5")
"""Suffixes of files that may have Keras's names."""


def network(words: str, *, whole: bool = False) -> str | None:
    """Our name of the network that a Keras name means; None for other names.

    Args:
      words: such as `efficientnetv2-b0.h5`, `efficientnetb3_notop.h5`, `weights_mobilenet_v3_large_224_1.0_float.h5`.
      whole: whether `words` must be the name alone; otherwise more may follow it.
    """
    stem = re.sub(r"[^a-z0-9]", "", words.lower().partition(".weights.h5")[0].removesuffix(".h5"))
    fitting = [
        (prefix, name) for name, prefix, _, _ in _NETWORKS if stem == prefix or (stem.startswith(prefix) and not whole)
    ]
    return max(fitting, key=lambda pair: len(pair[0]))[1] if fitting else None


def preprocess(name: str) -> Preprocess:
    """Preprocessing of a network with weights of keras.applications.

    Image size and normalisation are Keras's. Keras does not define resize and crop; they are those of the network's
    first published checkpoint, timm's for the same weights.

    Args:
      name: a network that `network` returned.
    """
    side, base = next((side, base) for ours, _, side, base in _NETWORKS if ours == name)
    timm = next((Preprocess.of(weights) for weights in published_weights().get(name, ())), base)
    return replace(base, image_size=side, crop=timm.crop, crop_mode=timm.crop_mode, interpolation=timm.interpolation)
