"""The classifier of `optim.fit_head`: a linear probe of the network that a run starts from.

The features are computed once, from the training images as they are prepared for evaluation. Every host computes all of
them for itself, on one device.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from se_flax.errors import UserError
from se_flax.nn.network import Network
from train.config import Data
from train.data.loader import eval_batches
from train.data.sources import DataSplits, Source
from train.optim.linear_probe import LinearProbe, fit
from train.optim.param_groups import Path

IMAGES = 20_000  # enough for a linear classifier; more would only be read
_PROGRESS = 20.0  # seconds between two lines

PyTree = Any


@dataclass(frozen=True)
class _Part:
    """Every k-th example of a source, as class folders are in the order of the classes."""

    source: Source
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.source))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self._at(index)]

    def name(self, index: int) -> str:
        return self.source.name(self._at(index))

    def _at(self, index: int) -> int:
        return index * len(self.source) // len(self)


def fitted_head(
    model: Network, variables: Mapping[str, PyTree], splits: DataSplits, data: Data, say: Callable[[str], None]
) -> dict[Path, np.ndarray]:
    """Fits the classifier to the features of the training images.

    Args:
      model: the network, with a dense classifier.
      variables: of the network.
      splits: the data.
      data: the settings.
      say: takes lines for a person to read.

    Returns:
      Kernel and bias of the classifier, by path.

    Raises:
      UserError: an image could not be read and `data.bad_images` is `error`; the network's head is more than one dense
        layer.
    """
    if (*model.head_path, "kernel") not in flax.traverse_util.flatten_dict(dict(variables["params"])):
        raise UserError(
            f"optim.fit_head fits one dense classifier, but the head of {type(model).__name__} has several layers; "
            "leave optim.fit_head out"
        )
    features, labels = _features(model, variables, splits, data, say)
    probe = fit(features, labels, len(splits.class_names))
    say(_described(probe, len(features)))
    return {(*model.head_path, "kernel"): probe.kernel, (*model.head_path, "bias"): probe.bias}


def _described(probe: LinearProbe, count: int) -> str:
    share = 100 * probe.right / probe.held_out
    return (
        f"classifier fitted to the features of {count:,} images (L2 penalty {probe.penalty:g}: {share:.1f} % of "
        f"{probe.held_out:,} held out of them)"
    )


def _features(
    model: Network, variables: Mapping[str, PyTree], splits: DataSplits, data: Data, say: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray]:
    part = _Part(splits.train, IMAGES)
    batches = eval_batches(replace(splits, eval=part), data, process_index=0, process_count=1)
    apply = jax.jit(lambda variables, images: classifier_input(model, variables, images))
    mean, std = (np.asarray(values, np.float32) for values in (data.mean, data.std))
    features, labels, done = [], [], 0
    said = time.monotonic()
    say(f"computing the features of {len(part):,} training images ...")
    for batch in batches:
        mask = batch["mask"]
        images = (batch["image"].astype(np.float32) / 255 - mean) / std
        features.append(np.asarray(apply(variables, images))[mask])
        labels.append(batch["label"][mask])
        done += len(mask)
        if time.monotonic() - said > _PROGRESS:
            say(f"{min(done, len(part)):,} of {len(part):,}")
            said = time.monotonic()
    return np.concatenate(features), np.concatenate(labels)


def classifier_input(model: Network, variables: Mapping[str, PyTree], images: jax.Array) -> jax.Array:
    """What a network's classifier is called with.

    Args:
      model: the network.
      variables: of the network.
      images: float [N, H, W, C], normalised.

    Returns:
      float32 [N, F].
    """
    seen: list[jax.Array] = []

    def call(method: Any, args: Any, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        if context.module.path == model.head_path and context.method_name == "__call__":
            seen.append(jnp.asarray(args[0], jnp.float32))
        return method(*args, **kwargs)

    with nn.intercept_methods(call):
        model.apply(variables, images)
    return seen[-1]
