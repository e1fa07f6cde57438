"""Linen modules in NNX: the same numbers, the same bits after the way back, NNX's own tools at work on them."""

import re
from functools import partial
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from random_variables import FAMILIES, random_variables

import se_flax
from se_flax import UserError

ATTENTION = {
    "SqueezeExcite": partial(se_flax.SqueezeExcite, reduction=4),
    "EffectiveSE": se_flax.EffectiveSE,
    "ECA": se_flax.ECA,
    "CBAM": partial(se_flax.CBAM, reduction=4),
    "GlobalContext": partial(se_flax.attention.GlobalContext, reduction=4),
}


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def same_bits(ours, theirs):
    ours, theirs = (flax.traverse_util.flatten_dict(tree) for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        assert ours[path].dtype == value.dtype, path
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(value), err_msg="/".join(path))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_every_family_goes_over_and_comes_back(name):
    model = se_flax.create_model(name, num_classes=5, **FAMILIES[name])
    variables = random_variables(model, 1, 32, 32, 3)
    module = se_flax.to_nnx(model, variables)
    same_bits(se_flax.from_nnx(module), variables)
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param))) == count
    # The traced programs are the same, operation by operation, in both modes.
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    graph, state = nnx.split(module)
    ours = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, x)
    theirs = jax.make_jaxpr(model.apply)(variables, x)
    assert operations(ours) == operations(theirs)


def operations(program):
    return [(e.primitive.name, [v.aval.shape for v in e.outvars]) for e in program.eqns]


def test_numbers_and_statistics_are_those_of_linen():
    model = se_flax.create_model("seresnet20", depth=1)
    variables, x = random_variables(model, 1, 16, 16, 3), images(4, 16, 16, 3)
    module = se_flax.to_nnx(model, variables, rngs=nnx.Rngs(0))
    expected = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(module, x), expected, rtol=1e-5, atol=1e-5)
    same_bits(se_flax.from_nnx(module), variables)
    module.train()
    logits = nnx.jit(lambda m, x: m(x))(module, x)
    expected, updates = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    trained = se_flax.from_nnx(module)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), trained["batch_stats"], updates["batch_stats"]
    )
    same_bits(trained["params"], variables["params"])
    # What came back is what the rest of the package takes.
    assert se_flax.to_timm("seresnet20", trained)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_modules(name):
    model, x = ATTENTION[name](), images(2, 6, 6, 16)
    variables = random_variables(model, *x.shape)
    module = se_flax.to_nnx(model, variables)
    value, gradients = nnx.jit(nnx.value_and_grad(lambda m, x: jnp.sum(jnp.square(m(x)))))(module, x)
    rest = {key: part for key, part in variables.items() if key != "params"}
    loss = jax.value_and_grad(lambda p: jnp.sum(jnp.square(model.apply({"params": p, **rest}, x))))
    expected_value, expected = jax.jit(loss)(variables["params"])
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    ours = nnx.to_pure_dict(gradients)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, expected)
    same_bits(se_flax.from_nnx(module), variables)


class Block(nnx.Module):
    """A convolution of NNX's own before an attention module of ours."""

    def __init__(self, *, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.attention = se_flax.to_nnx(se_flax.CBAM(reduction=2), rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.mean(self.attention(self.conv(x)), (1, 2)))


def test_inside_an_nnx_module_training_lowers_the_loss():
    block = nnx.bridge.lazy_init(Block(rngs=nnx.Rngs(0)), x := images(8, 8, 8, 3))
    labels = jnp.asarray([0, 1] * 4)
    optimizer = nnx.Optimizer(block, optax.sgd(0.5), wrt=nnx.Param)
    before = se_flax.from_nnx(block.attention)

    @nnx.jit
    def step(block, optimizer, x):
        def loss(block):
            return optax.softmax_cross_entropy_with_integer_labels(block(x), labels).mean()

        value, gradients = nnx.value_and_grad(loss)(block)
        optimizer.update(block, gradients)
        return value

    block.train()
    assert block.attention.deterministic is False
    losses = [float(step(block, optimizer, x)) for _ in range(8)]
    assert losses[-1] < losses[0]
    after = se_flax.from_nnx(block.attention)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    assert all(jax.tree.leaves(moved["batch_stats"])) and any(jax.tree.leaves(moved["params"]))
    block.eval()
    forward = nnx.jit(lambda block, x: block(x))
    first = forward(block, x)
    assert block.attention.deterministic
    np.testing.assert_array_equal(forward(block, x), first)
    same_bits(se_flax.from_nnx(block.attention), after)


def test_dropout_draws_anew_while_training_and_not_in_evaluation():
    model = se_flax.create_model("resnet20", depth=1, drop_rate=0.5)
    module = se_flax.to_nnx(model, random_variables(model, 1, 8, 8, 3), rngs=nnx.Rngs(dropout=1))
    x = images(2, 8, 8, 3)
    forward = nnx.jit(lambda m, x: m(x))
    np.testing.assert_array_equal(forward(module, x), forward(module, x))
    # No random stream moves in evaluation: a plain jit may close over the module.
    np.testing.assert_allclose(jax.jit(lambda x: module(x))(x), forward(module, x), rtol=1e-5, atol=1e-5)
    training = nnx.view(module, deterministic=False)
    assert module.deterministic and not training.deterministic
    assert np.any(np.asarray(forward(training, x)) != np.asarray(forward(training, x)))
    asked = nnx.jit(lambda m, x: m(x, train=False))
    np.testing.assert_array_equal(asked(training, x), forward(module, x))


def test_an_orbax_checkpoint_of_the_state_restores_the_same_bits(tmp_path):
    model = se_flax.create_model("seresnet20", depth=1)
    variables = random_variables(model, 1, 8, 8, 3)
    module = se_flax.to_nnx(model, variables, rngs=nnx.Rngs(0))
    state = nnx.state(module, nnx.Not(nnx.RngState))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(state))
    other = se_flax.to_nnx(model, random_variables(model, 1, 8, 8, 3, seed=1), rngs=nnx.Rngs(0))
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.to_pure_dict(state))
        nnx.update(other, checkpointer.restore(tmp_path / "state", target))
    same_bits(se_flax.from_nnx(other), variables)


def test_lazy_init_makes_the_variables():
    model, x = se_flax.ECA(), images(1, 4, 4, 8)
    variables = se_flax.from_nnx(se_flax.to_nnx(model, rngs=nnx.Rngs(0)).lazy_init(x))
    expected = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)


def test_any_linen_module_goes_over():
    model, x = linen.Dense(3), images(2, 4)
    variables = model.init(jax.random.key(0), x)
    np.testing.assert_array_equal(se_flax.to_nnx(model, variables)(x), model.apply(variables, x))


class ByPosition(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        return linen.BatchNorm(not train)(x)


def test_the_mode_may_be_given_by_position():
    model, x = ByPosition(), images(4, 2)
    module = se_flax.to_nnx(model, model.init(jax.random.key(0), x))
    asked = [module(x), module(x, False), module(x, train=False)]
    for y in asked:
        np.testing.assert_allclose(y, x, rtol=1e-4)
    module.train()
    np.testing.assert_allclose(module(x, False), x, rtol=1e-4)
    module.eval()
    np.testing.assert_allclose(module(x, True).mean(0), np.zeros(2), atol=1e-6)
    assert np.any(se_flax.from_nnx(module)["batch_stats"]["BatchNorm_0"]["mean"] != 0)  # recorded


def test_refusals():
    with pytest.raises(UserError, match=r"got the class SqueezeExcite; give a Linen module, such as se_flax.create_"):
        se_flax.to_nnx(se_flax.SqueezeExcite)
    with pytest.raises(UserError, match=r"got variables that are a dict; give collections of arrays"):
        se_flax.to_nnx(se_flax.ECA(), {"kernel": jnp.ones(3)})
    with pytest.raises(UserError, match=r"got a Linear; give a module that se_flax.to_nnx made"):
        se_flax.from_nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_the_documented_example_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "nnx.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(code, "docs/nnx.md", "exec"), names)
    assert names["losses"][-1] < names["losses"][0]
    trained = se_flax.from_nnx(names["net"].backbone)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (trained, names["variables"])), strict=True))


def test_a_module_without_variables_says_what_is_missing():
    module = se_flax.to_nnx(se_flax.create_model("seresnet20", num_classes=3), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"this CifarResNet has no variables yet; call \.lazy_init\(images\) on it"):
        module(images(1, 16, 16, 3))
    assert module.lazy_init(images(1, 16, 16, 3))(images(1, 16, 16, 3)).shape == (1, 3)
