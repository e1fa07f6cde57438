"""Other JAX networks in a comparison: `python -m benchmarks.sides.peers flax|keras MODEL TASK BATCH IMAGE_SIZE`.

flax: ResNet-50 of Flax's ImageNet example. keras: keras.applications on Keras's JAX backend, compiled.
"""

import sys
from typing import Any

import jax
import numpy as np

from benchmarks.sides.pace import serve


def flax(task: str, batch: int, side: int) -> tuple[Any, dict[str, str]]:
    """A function that makes one call of Flax's network, and versions."""
    from importlib.metadata import version

    from benchmarks.plain_resnet import PlainResNet50
    from benchmarks.sides import ours

    model = PlainResNet50(dtype=jax.numpy.float32)
    work = ours.train_step(model, batch, side) if task == "train" else ours.inference(model, batch, side, False)
    return work, {"flax": version("flax")}


def keras(task: str, batch: int, side: int) -> tuple[Any, dict[str, str]]:
    """A function that makes one call of Keras's network, and versions."""
    import keras

    model = keras.applications.EfficientNetB0(weights=None, input_shape=(side, side, 3))
    images = np.random.default_rng(0).uniform(0, 255, (batch, side, side, 3)).astype(np.float32)
    labels = np.arange(batch) % 1000
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "sparse_categorical_crossentropy", jit_compile=True)
    if task == "train":
        return lambda: model.train_on_batch(images, labels), {"keras": keras.__version__}
    return lambda: model.predict_on_batch(images), {"keras": keras.__version__}


def main() -> None:
    """Serves one comparison."""
    which, _, task, batch, side = sys.argv[1:]
    work, versions = {"flax": flax, "keras": keras}[which](task, int(batch), int(side))
    serve(work, jax=jax.__version__, **versions)


if __name__ == "__main__":
    main()
