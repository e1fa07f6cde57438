"""Writes the fixtures of `tests/keras`; needs Keras.

    python -m venv keras3 && keras3/bin/pip install keras 'jax[cpu]' h5py && keras3/bin/python tools/keras_layouts.py
    python -m venv keras2 && keras2/bin/pip install tensorflow-cpu==2.15.1 && keras2/bin/python tools/keras_layouts.py

With Keras 3 the fixtures are every network's variables and their names in files, and for small networks the logits of
synthetic weights; with Keras 2 the names in its files, which published weights have. Nothing is downloaded.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import h5py
import keras
import keras_reference as reference
import numpy as np

NETWORKS = {
    **{f"tf_efficientnet_b{i}": (f"EfficientNetB{i}", {}) for i in range(8)},
    **{f"tf_efficientnetv2_{s}": (f"EfficientNetV2{s.upper()}", {}) for s in ("b0", "b1", "b2", "b3", "s", "m", "l")},
    "tf_mobilenetv3_small_100": ("MobileNetV3Small", {}),
    "tf_mobilenetv3_small_075": ("MobileNetV3Small", {"alpha": 0.75}),
    "tf_mobilenetv3_small_minimal_100": ("MobileNetV3Small", {"minimalistic": True}),
    "tf_mobilenetv3_large_100": ("MobileNetV3Large", {}),
    "tf_mobilenetv3_large_075": ("MobileNetV3Large", {"alpha": 0.75}),
    "tf_mobilenetv3_large_minimal_100": ("MobileNetV3Large", {"minimalistic": True}),
}
LOGITS = (
    "tf_efficientnet_b0",
    "tf_efficientnetv2_b0",
    "tf_mobilenetv3_small_100",
    "tf_mobilenetv3_small_minimal_100",
    "tf_mobilenetv3_large_100",
)
LEGACY = LOGITS[:4]
OLDER = keras.__version__.startswith("2")


def build(name):
    """The network with random weights, and with logits instead of probabilities."""
    keras.backend.clear_session()
    application, arguments = NETWORKS[name]
    if not application.startswith("EfficientNetB"):  # these have no such argument
        arguments = {**arguments, "include_preprocessing": False}
    shape = (reference.SIZE, reference.SIZE, 3)
    build = getattr(keras.applications, application)
    return build(weights=None, classifier_activation=None, input_shape=shape, **arguments)


def variables(model):
    """Every variable by `<layer>/<weight>`, in the order of the model."""
    return {f"{x.name}/{re.sub(':0$', '', v.name.split('/')[-1])}": v for x in model.layers for v in x.weights}


def places(model, named, save):
    """Names of the variables in a file, found by saving their numbers as values."""
    for number, variable in enumerate(named.values()):
        variable.assign(np.full(variable.shape, number, "float32"))
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder))
        found = {}
        with h5py.File(path) as file:
            file.visititems(
                lambda name, item: found.update({int(item[()].flat[0]): name}) if hasattr(item, "shape") else None
            )
    assert sorted(found) == list(range(len(named)))
    return [found[number] for number in range(len(named))]


def numbered(model, folder):
    """Saves in Keras 3's format."""
    model.save_weights(folder / "model.weights.h5")
    return folder / "model.weights.h5"


def legacy(model, folder):
    """Saves in the older format by layer: weights with Keras 2; a model with Keras 3, which supports only that."""
    path = folder / "model.h5"
    if OLDER:
        model.save_weights(path)
    else:
        model.save(path)
    return path


def reference_logits(model, named, entries, images):
    """Logits of the synthetic weights, and the mean square before every batch norm, which the weights depend on."""
    for key, value in reference.weights(entries, {}).items():
        named[key].assign(value)
    scales = {}
    original = keras.layers.BatchNormalization.call

    def call(layer, inputs, **settings):
        scales[layer.name] = float(f"{np.mean(np.square(inputs)):.3g}")
        for variable in ("moving_mean", "moving_variance"):
            key = f"{layer.name}/{variable}"
            named[key].assign(reference.tensor(key, named[key].shape, scales[layer.name]))
        return original(layer, inputs, **settings)

    keras.layers.BatchNormalization.call = call
    try:
        return np.asarray(model(images, training=False)), scales
    finally:
        keras.layers.BatchNormalization.call = original


def fixture(name):
    """The content of a network's fixture, see `tests/keras_reference.py`."""
    application, arguments = NETWORKS[name]
    listed = ", ".join(f"{key}={value}" for key, value in arguments.items())
    model = build(name)
    named = variables(model)
    keys = [re.sub(r"^normalization_\d+/", "normalization/", key) for key in named]
    paths = places(model, named, numbered)
    content = {
        "application": f"{application}({listed})" if listed else application,
        "keras": keras.__version__,
        "entries": [[k, list(v.shape), p] for k, v, p in zip(keys, named.values(), paths, strict=True)],
    }
    if name in LEGACY:
        content["legacy"] = places(model, named, legacy)
    if name in LOGITS and not OLDER:
        images = reference.images()
        for key, variable in named.items():
            if key.startswith("normalization"):  # the preprocessing is only a division by 255
                images = 255 * reference.images()
                variable.assign(np.full(variable.shape, float(key.endswith("variance"))))
        logits, content["norm_scales"] = reference_logits(model, named, content["entries"], images)
        content["logits"] = [[float(f"{x:.7g}") for x in row] for row in logits[:, :: reference.STEP]]
        sensitivity = np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits)
        print(f"{name}: logits up to {np.abs(logits).max():.3g}, differ by {sensitivity:.2g} between the images")
    return content


def main():
    """Writes the fixtures of the names on the command line, or all."""
    for name in sys.argv[1:] or (LEGACY if OLDER else NETWORKS):
        content = fixture(name)
        reference.write(f"{name}.keras2" if OLDER else name, content)
        print(name, len(content["entries"]), "variables", flush=True)


if __name__ == "__main__":
    main()
