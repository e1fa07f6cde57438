"""Fixtures and how a network of ours is held against one; see README.md beside this file."""

import contextlib
import functools
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import se_flax
from parity import synthetic
from se_flax.checkpoints.convert import variable_shapes
from se_flax.checkpoints.torch import torch_key, torch_shape

HERE = Path(__file__).parent
FIXTURES, SPECS = (
    sorted(path.name.removesuffix(".json.gz") for path in (HERE / folder).glob("*.json.gz"))
    for folder in ("fixtures", "specs")
)


@functools.cache
def fixture(name):
    """The numbers of a network, or its names and shapes only (`specs`)."""
    path = HERE / "fixtures" / f"{name}.json.gz"
    with gzip.open(path if path.exists() else HERE / "specs" / path.name, "rt") as file:
        return json.load(file)


def state_dict(name):
    return synthetic.state_dict(fixture(name)["entries"], fixture(name)["norm_scales"])


def nhwc(shape):
    """The reference images in our layout."""
    return synthetic.images(shape).transpose(0, 2, 3, 1)


def check_names(name):
    """timm's entries are exactly ours (`from_timm` is strict) and come back bit for bit."""
    given = state_dict(name)
    variables = se_flax.from_timm(name, given)
    back = se_flax.to_timm(name, variables)
    assert back.keys() == given.keys()
    for key, value in given.items():
        assert back[key].dtype == value.dtype, key
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    return variables


def check_layout(name, shapes=None):
    """Names and shapes are timm's, without computing a weight (`from_timm` needs nothing else).

    Args:
      name: the network.
      shapes: of its variables; None to trace it.
    """
    reference = fixture(name)
    if shapes is None:
        size = reference["input_shape"][-1] if "input_shape" in reference else 64
        shapes = variable_shapes(se_flax.create_model(name), size)
    else:
        shapes = flatten_dict(shapes)
    ours = {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in shapes.items()}
    theirs = {key: tuple(shape) for key, shape in reference["entries"] if not key.endswith("num_batches_tracked")}
    assert ours == theirs


def compiled(function, *arguments):
    """Calls a function compiled without the optimisations that take long and win nothing for a single call.

    In float64 they do win, whatever the other tests do: XLA has its own, slow loops for such convolutions.
    """
    double = any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(arguments))
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = {"xla_backend_optimization_level": 3} if double else quick
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)(*arguments)


def features(name):
    """The reference's feature maps; of several at one resolution the last, as networks of ours return."""
    found = fixture(name)["features"]
    after = [each["shape"][2:] for each in found[1:]] + [None]
    return [each for each, following in zip(found, after, strict=True) if each["shape"][2:] != following]


def check_evaluation(name, variables, tolerance=1e-4):
    """Logits and sampled stage features within `tolerance` of the reference's largest value."""
    reference = fixture(name)
    images = nhwc(reference["input_shape"])
    logits, maps = compiled(
        functools.partial(se_flax.create_model(name).apply, return_features=True), variables, images
    )
    expected = np.asarray(reference["logits"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert len(maps) == len(features(name))
    for i, (x, feature) in enumerate(zip(maps, features(name), strict=True)):
        x = np.asarray(x, np.float64).transpose(0, 3, 1, 2)
        assert list(x.shape) == feature["shape"]
        sample = np.asarray(feature["sample"])
        picked = x.ravel()[synthetic.sample_index(x.size)]
        np.testing.assert_allclose(picked, sample, rtol=0, atol=tolerance * np.abs(sample).max(), err_msg=f"map {i}")
        np.testing.assert_allclose(x.mean(), feature["mean"], rtol=0, atol=tolerance * feature["std"])
        np.testing.assert_allclose(x.std(ddof=1), feature["std"], rtol=tolerance)


def train_step(name, variables, dtype):
    """Loss, gradients and new batch statistics of the fixture's step, computed in `dtype`.

    Args:
      name: the network.
      variables: float32 variables.
      dtype: float32 or float64 (with `double_precision` around the call).

    Returns:
      Loss, gradients and statistics by torch's keys, float64 on the host.
    """
    reference = fixture(name)["train"]
    assert reference["labels"] == "arange(8)"
    images, labels = nhwc(reference["batch_shape"]).astype(dtype), np.arange(8)
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), variables)
    model = se_flax.create_model(name)

    def loss(params):
        logits, new = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        assert logits.dtype == dtype
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        return -chosen.mean(), new.get("batch_stats", {})  # absent without batch norms

    (value, stats), grads = compiled(jax.value_and_grad(loss, has_aux=True), variables["params"])
    grads, stats = (
        {key: np.asarray(leaf, np.float64) for key, leaf in se_flax.to_timm(name, {kind: tree}).items()}
        for kind, tree in (("params", grads), ("batch_stats", stats))
    )
    return float(value), grads, stats


@contextlib.contextmanager
def double_precision(monkeypatch):
    """Within it our networks compute in float64: what they compute "in float32" too.

    A patch: float32 for gates, statistics and logits is what every layer and network promises, written where it is
    done, and a setting for it would be in all of them, for this test alone. What is traced here is not used outside,
    since `enable_x64` is part of the key of JAX's caches.
    """
    with jax.enable_x64(True), monkeypatch.context() as patch:
        patch.setattr(jnp, "float32", jnp.float64)
        yield


# Relative tolerance of loss and statistics where many layers, or maps that are not normalised, add up the rounding of
# both references, which are float32: most networks differ by less than 2e-6.
DEEP = {"regnetv_040": 2e-5, "repvit_m2_3": 5e-5}


def check_loss_and_statistics(name, value, stats):
    reference, tolerance = fixture(name)["train"], DEEP.get(name, 1e-5)
    np.testing.assert_allclose(value, reference["loss"], rtol=tolerance)
    for key, projection in reference["stats"].items():
        given = stats[key]
        error = abs(np.vdot(synthetic.probe(key, given.shape), given) - projection)
        assert error <= tolerance * np.linalg.norm(given), f"{key}: {error}"


def gradient_errors(name, grads, reference=None):
    """Relative errors of every gradient's norm and projection (both in units of the norm), by torch's key."""
    errors = {}
    for key, (norm, projection) in (reference or fixture(name)["train"]["grads"]).items():
        given = grads[key]
        errors[key] = (
            abs(np.linalg.norm(given) - norm) / norm,
            abs(np.vdot(synthetic.probe(key, given.shape), given) - projection) / norm,
        )
    assert errors.keys() == grads.keys()
    return errors


@functools.cache
def double_reference(name):
    """timm's loss and gradients of the fixture's step in float64 (`tools/double_gradients.py`), or None."""
    path = HERE / "double" / f"{name}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes())) if path.exists() else None


def check_gradients(name, grads, tolerance=1e-3, reference=None):
    """Norms and projections within `tolerance` of the gradient's norm.

    A gradient that is zero in exact arithmetic (a bias in front of a batch norm) is rounding noise in both networks: it
    is held against the norm of all gradients together, a thousand times more strictly.

    Args:
      name: the network.
      grads: ours, by torch's keys.
      tolerance: relative.
      reference: norm and projection by torch's keys; None for the fixture's.
    """
    reference = reference or fixture(name)["train"]["grads"]
    total = np.sqrt(sum(norm**2 for norm, _ in reference.values()))
    for key, errors in gradient_errors(name, grads, reference).items():
        norm = reference[key][0]
        assert max(errors) * norm <= tolerance * (norm + 1e-3 * total), f"{key}: {errors}, norm {norm} of {total}"


def check_training_step(name, monkeypatch):
    """One training step against timm's: loss, statistics and every gradient.

    Of the millions of units of a network with ReLU a few lie closer to zero than float32 can tell, and one on the wrong
    side moves every earlier gradient by up to some hundredths, in PyTorch as in JAX. Where that happens the gradients
    are compared in float64, with those that timm gives in float64.
    """
    reference = double_reference(name)
    variables = se_flax.from_timm(name, state_dict(name))
    if reference is None:
        value, grads, stats = train_step(name, variables, np.float32)
        check_gradients(name, grads)
    else:
        with double_precision(monkeypatch):
            value, grads, stats = train_step(name, variables, np.float64)
        # PyTorch's derivative of the hard sigmoid is a sixth rounded to float32 even in float64: not twelve digits.
        np.testing.assert_allclose(value, reference["loss"], rtol=1e-6)
        check_gradients(name, grads, 1e-6, reference["grads"])
    check_loss_and_statistics(name, value, stats)
