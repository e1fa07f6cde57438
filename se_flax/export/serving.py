"""Networks for serving without this package: StableHLO, ONNX and SavedModel, each with its preprocessing beside it."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from se_flax.checkpoints.atomic_folder import atomic_folder, refuse_overwrite
from se_flax.checkpoints.pretrained import Pretrained
from se_flax.errors import UserError, closest
from se_flax.export.folding import fuse as fold_norms
from se_flax.version import __version__

Array = jax.Array
Function = Callable[[Array], Array]

PLATFORMS = ("cpu", "cuda", "tpu")
DESCRIPTION = "serving.json"
TOLERANCE = 1e-4
"""Largest difference from JAX, as a share of the largest logit, with which an ONNX graph is handed out."""


def export_pretrained(
    folder: str | os.PathLike[str],
    loaded: Pretrained,
    *,
    format: str = "stablehlo",
    fuse: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a trained network for serving: float32 images `[batch, H, W, C]` in, logits `[batch, classes]` out.

    The folder holds the network with its weights and `serving.json`: names, shapes and types of input and output, the
    preprocessing, the classes' names, architecture and provenance. The batch size is free; the images' side is that of
    the preprocessing. The folder appears as a whole or not at all.

    | format | file | runs on | needs, to export |
    |---|---|---|---|
    | `stablehlo` | `model.stablehlo` | JAX on CPU, CUDA and TPU, from one file (`jax.export`) | flatbuffers |
    | `onnx` | `model.onnx`, opset 18 | ONNX Runtime and others | onnx |
    | `savedmodel` | TensorFlow's own files | TensorFlow on CPU, CUDA and TPU, TF Serving | tensorflow |

    Args:
      folder: where to; a new folder.
      loaded: what `load_pretrained` returned.
      format: one of the table's.
      fuse: fold the batch norms into the convolutions first, where there are any (`se_flax.fuse`).
      overwrite: replace an earlier export that is there already.

    Returns:
      The content of `serving.json`. For `onnx`, `difference` is how far ONNX Runtime is from JAX on two random images,
      as a share of the largest logit; None where ONNX Runtime is not installed.

    Raises:
      UserError: unknown format, folder taken, a package that is missing, or a network without an ONNX form.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; {closest(str(format), FORMATS)}")
    folder = Path(folder).expanduser()
    refuse_overwrite(folder, overwrite, sign=DESCRIPTION, what="an exported network")
    model, variables, fused = loaded.model, loaded.variables, False
    if fuse:
        try:
            model, variables = fold_norms(model, variables)
            fused = True
        except UserError:  # no batch norms: nothing to fold, nothing lost
            pass
    prepare = loaded.preprocess
    shape = (prepare.image_size, prepare.image_size, prepare.channels)
    classes = getattr(model, "num_classes", 0)
    outputs = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    description = {
        "format": format,
        "architecture": loaded.name,
        "input": {"name": "images", "dtype": "float32", "shape": ["batch", *shape], "layout": "NHWC"},
        "output": {
            "name": "logits" if classes else "features",
            "dtype": str(outputs.dtype),
            "shape": ["batch", *outputs.shape[1:]],
        },
        "preprocess": prepare.to_json(),
        "num_classes": classes,
        "labels": list(loaded.labels) if loaded.labels is not None else None,
        "fused": fused,
        "provenance": dict(loaded.provenance),
        "versions": {"se-flax": __version__, "jax": jax.__version__},
    }
    with atomic_folder(folder) as building:
        description |= FORMATS[format](building, model, jax.tree.map(jnp.asarray, dict(variables)), description)
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        (building / DESCRIPTION).write_text(text)
    return json.loads(text)


def _write_stablehlo(folder: Path, model: Any, variables: Any, description: Mapping[str, Any]) -> dict[str, Any]:
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *description["input"]["shape"][1:]), jnp.float32)
    exported = jax.export.export(jax.jit(_function(model, variables)), platforms=PLATFORMS)(images)
    try:
        data = exported.serialize()
    except ImportError as error:  # JAX does not install it by itself
        raise UserError("the format stablehlo needs the package flatbuffers: pip install flatbuffers") from error
    (folder / "model.stablehlo").write_bytes(data)
    return {"file": "model.stablehlo", "platforms": list(PLATFORMS)}


def _write_onnx(folder: Path, model: Any, variables: Any, description: Mapping[str, Any]) -> dict[str, Any]:
    try:
        import onnx

        from se_flax.export import onnx_program
    except ImportError as error:
        raise UserError(f'the format onnx needs the package {error.name}: pip install "se-flax[onnx]"') from error
    function = _function(_in_float32(model), variables)
    shape = tuple(description["input"]["shape"][1:])
    notes = {key: value for key, value in description.items() if key not in ("input", "output")}
    program = onnx_program.to_onnx(function, shape, outputs=description["output"]["name"], metadata=notes)
    onnx.save_model(program, folder / "model.onnx")
    difference = _onnx_difference(folder / "model.onnx", function, shape)
    if difference is not None and not difference <= TOLERANCE:
        raise UserError(
            f"ONNX Runtime's logits differ from JAX's by {difference:.1g} of the largest, more than {TOLERANCE:g}; "
            "export as stablehlo or savedmodel, and please report the network"
        )
    return {"file": "model.onnx", "opset": onnx_program.OPSET, "difference": difference}


def _onnx_difference(path: Path, function: Function, shape: tuple[int, ...]) -> float | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    images = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (ours,) = session.run(None, {"images": images})
    theirs = np.asarray(jax.jit(function)(images))
    return float(np.max(np.abs(ours - theirs)) / max(np.max(np.abs(theirs)), 1e-6))


def _write_savedmodel(folder: Path, model: Any, variables: Any, description: Mapping[str, Any]) -> dict[str, Any]:
    try:
        import tensorflow as tf
        from jax.experimental import jax2tf
    except ImportError as error:
        raise UserError(
            f"the format savedmodel needs TensorFlow ({error.name} is missing): pip install tensorflow"
        ) from error
    output = description["output"]["name"]
    apply = jax2tf.convert(
        lambda weights, images: {output: model.apply(weights, images)},
        polymorphic_shapes=[None, "(batch, ...)"],
        native_serialization_platforms=PLATFORMS,
        with_gradient=False,
    )
    module = tf.Module()
    module.weights = tf.nest.map_structure(lambda x: tf.Variable(np.asarray(x), trainable=False), variables)
    images = tf.TensorSpec([None, *description["input"]["shape"][1:]], tf.float32, "images")
    module.serve = tf.function(lambda images: apply(module.weights, images), input_signature=[images], autograph=False)
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    return {"platforms": list(PLATFORMS), "versions": {**description["versions"], "tensorflow": tf.__version__}}


def _function(model: Any, variables: Any) -> Function:
    return lambda images: model.apply(variables, images)


def _in_float32(model: Any) -> Any:
    """The network with float32 arithmetic: few ONNX runtimes have bfloat16 convolutions."""
    return model.clone(dtype=jnp.float32) if getattr(model, "dtype", None) is not None else model


FORMATS: Mapping[str, Callable[[Path, Any, Any, Mapping[str, Any]], dict[str, Any]]] = {
    "stablehlo": _write_stablehlo,
    "onnx": _write_onnx,
    "savedmodel": _write_savedmodel,
}
