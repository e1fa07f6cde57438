"""Networks for click prediction: formulas against float64 NumPy and explicit loops, counts against published ones."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import ACTIVATIONS, double, excite

import se_flax
from se_flax import UserError
from se_flax.ctr import FIBINET_SE, FM, BilinearInteraction, FiBiNET, LogisticRegression, SqueezeExciteFields
from se_flax.ctr import functional as C

N, F, K = 4, 5, 3
X = np.random.default_rng(0).standard_normal((N, F, K)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 20, (N, F)).astype(np.int32)
PAIRS = list(itertools.combinations(range(F), 2))


def randomised(variables, seed=0):
    """Nothing at its initial value: every parameter matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.5 * rng.standard_normal(leaf.shape)).astype(np.float32), variables)


def variables_of(model, *args):
    return randomised(jax.eval_shape(model.init, jax.random.key(0), *args))


def count(model, fields):
    ids = jax.ShapeDtypeStruct((1, fields), jnp.int32)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), ids)))


def shapes(variables):
    flat = jax.tree_util.tree_leaves_with_path(variables["params"])
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in flat}


# --- Squeeze-and-excitation over fields -------------------------------------------------------------------------------


@pytest.mark.parametrize("squeeze", ["mean", "max"])
@pytest.mark.parametrize(("activation", "gate", "bias"), [("relu", "sigmoid", True), ("silu", "relu", False)])
def test_squeeze_excite_fields_is_its_formula(squeeze, activation, gate, bias):
    module = SqueezeExciteFields(squeeze=squeeze, activation=activation, gate=gate, use_bias=bias)
    variables = variables_of(module, X)
    names = ["fc1/bias"] * bias + ["fc1/kernel"] + ["fc2/bias"] * bias + ["fc2/kernel"]
    expected = {"fc1/kernel": (F, 2), "fc1/bias": (2,), "fc2/kernel": (2, F), "fc2/bias": (F,)}
    assert shapes(variables) == {name: expected[name] for name in names}
    p = variables["params"]
    layers = double(p["fc1"]["kernel"], p["fc1"].get("bias"), p["fc2"]["kernel"], p["fc2"].get("bias"))
    z = getattr(X.astype(np.float64), squeeze)(axis=2)
    gates = excite(z, *layers, activation=activation, gate=gate)
    np.testing.assert_allclose(module.apply(variables, X), X * gates[..., None], rtol=1e-5, atol=1e-6)


def test_the_gate_multiplies_whole_fields_and_sees_all_of_them():
    module = SqueezeExciteFields()
    variables = variables_of(module, X)
    ratio = np.asarray(module.apply(variables, X)) / X
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[..., :1], X.shape), rtol=1e-4)
    changed = X.copy()
    changed[:, 0] += 1
    other = np.asarray(module.apply(variables, changed)) / changed
    assert np.abs(other[:, 1:] - ratio[:, 1:]).max() > 1e-3


# Hidden widths by hand. The sigmoid form: ceil(F / 4), with biases. FiBiNET's: DeepCTR's max(1, F // 3), without.
@pytest.mark.parametrize(("fields", "sigmoid", "fibinet"), [(1, 1, 1), (2, 1, 1), (10, 3, 3), (24, 6, 8), (39, 10, 13)])
def test_widths_and_counts_of_both_forms(fields, sigmoid, fibinet):
    x = jax.ShapeDtypeStruct((2, fields, 4), jnp.float32)
    for module, width, bias in ((SqueezeExciteFields(), sigmoid, True), (FIBINET_SE(), fibinet, False)):
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        assert variables["params"]["fc1"]["kernel"].shape == (fields, width)
        total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
        assert total == 2 * fields * width + (width + fields) * bias


def test_fibinets_form_is_relu_twice():
    module = FIBINET_SE()
    variables = variables_of(module, X)
    kernels = [np.asarray(variables["params"][name]["kernel"], np.float64) for name in ("fc1", "fc2")]
    hidden = np.maximum(X.astype(np.float64).mean(2) @ kernels[0], 0)
    gates = np.maximum(hidden @ kernels[1], 0)
    assert (gates == 0).any() and (gates > 0).any()
    np.testing.assert_allclose(module.apply(variables, X), X * gates[..., None], rtol=1e-5, atol=1e-6)


def test_gates_are_float32_and_the_output_has_the_inputs_dtype():
    module = SqueezeExciteFields()
    variables = variables_of(module, X)
    x = jnp.asarray(X, jnp.bfloat16)
    y = module.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    wide = module.apply(variables, x.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=2**-7)


def test_it_is_exported_and_takes_functions():
    assert se_flax.SqueezeExciteFields is SqueezeExciteFields
    module = SqueezeExciteFields(width=2, squeeze=lambda x: x[..., 0], activation=jnp.abs, gate=jnp.cos)
    assert module.apply(variables_of(module, X), X).shape == X.shape


@pytest.mark.parametrize(
    ("module", "x", "text"),
    [
        (
            SqueezeExciteFields(),
            X[0],
            r"SqueezeExciteFields got an array of shape \(5, 3\); it takes embeddings \[batch,",
        ),
        (SqueezeExciteFields(gate="sigmod"), X, r"unknown gate 'sigmod'; closest: sigmoid"),
        (SqueezeExciteFields(squeeze="none"), X, r"unknown squeeze 'none'; .*max, mean"),
        (SqueezeExciteFields(reduction=0), X, r"got reduction=0; it must be positive"),
        (BilinearInteraction("evry"), X, r"unknown bilinear interaction 'evry'; "),
        (
            BilinearInteraction(),
            X[:, :1],
            r"BilinearInteraction got an array of shape \(4, 1, 3\); .*at least 2 fields",
        ),
        (FM(20), X, r"got ids of shape \(4, 5, 3\) and dtype float32; give integers \[batch, fields\]"),
        (LogisticRegression(0), IDS, r"got num_ids=0; give the number of rows of the embedding table"),
    ],
)
def test_errors_are_one_sentence(module, x, text):
    with pytest.raises(UserError, match=text) as error:
        jax.eval_shape(module.init, jax.random.key(0), x)
    assert "\n" not in str(error.value)


# --- Interactions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "index"),
    [
        ("all", (K, K), lambda i, j, p: ()),
        ("each", (F, K, K), lambda i, j, p: i),
        ("interaction", (len(PAIRS), K, K), lambda i, j, p: p),
    ],
)
def test_bilinear_is_an_explicit_loop_over_pairs(kind, shape, index):
    module = BilinearInteraction(kind)
    variables = variables_of(module, X)
    assert shapes(variables) == {"kernel": shape}
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    expected = np.zeros((N, len(PAIRS), K))
    for n in range(N):
        for p, (i, j) in enumerate(PAIRS):
            expected[n, p] = (X[n, i].astype(np.float64) @ kernel[index(i, j, p)]) * X[n, j]
    np.testing.assert_allclose(module.apply(variables, X), expected, rtol=1e-5, atol=1e-6)


def test_hadamard_is_bilinear_with_the_identity():
    module = BilinearInteraction("hadamard")
    assert jax.eval_shape(module.init, jax.random.key(0), X) == {}
    y = module.apply({}, X)
    np.testing.assert_array_equal(y, np.stack([X[:, i] * X[:, j] for i, j in PAIRS], axis=1))
    np.testing.assert_allclose(C.bilinear_all(X, np.eye(K, dtype=np.float32)), y, rtol=1e-6)


def test_three_fields_have_three_pairs_and_the_forms_still_differ():
    x, kernel = X[:, :3], np.random.default_rng(2).standard_normal((3, K, K)).astype(np.float32)
    each, pairwise = C.bilinear_each(x, kernel), C.bilinear_interaction(x, kernel)
    np.testing.assert_allclose(each[:, :2], np.stack([x[:, 0] @ kernel[0]] * 2, 1) * x[:, 1:], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(pairwise[:, 1], (x[:, 0] @ kernel[1]) * x[:, 2], rtol=1e-4, atol=1e-6)


def test_factorisation_is_the_sum_over_pairs():
    expected = [sum(X[n, i].astype(np.float64) @ X[n, j] for i, j in PAIRS) for n in range(N)]
    np.testing.assert_allclose(C.factorisation(X), expected, rtol=1e-5)


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_logistic_regression_and_fm_are_their_formulas():
    model = FM(20, K)
    variables = variables_of(model, IDS)
    assert shapes(variables) == {
        "first_order/linear/embedding": (20, 1),
        "first_order/bias": (),
        "embedding/embedding": (20, K),
    }
    p = variables["params"]
    weights, bias = double(p["first_order"]["linear"]["embedding"], p["first_order"]["bias"])
    linear = np.array([bias + sum(weights[i, 0] for i in row) for row in IDS])
    np.testing.assert_allclose(
        LogisticRegression(20).apply({"params": p["first_order"]}, IDS), linear, rtol=1e-5, atol=1e-6
    )
    table = double(p["embedding"]["embedding"])[0]
    pairs = [sum(table[a] @ table[b] for a, b in itertools.combinations(row, 2)) for row in IDS]
    np.testing.assert_allclose(model.apply(variables, IDS), linear + pairs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden", [(), (7, 4)])
def test_fibinet_is_its_formula(hidden):
    model = FiBiNET(20, K, hidden, bilinear="all", dropout=0.5)
    variables = variables_of(model, IDS)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    x = p["embedding"]["embedding"][IDS]
    gates = excite(x.mean(2), p["attention"]["fc1"]["kernel"], None, p["attention"]["fc2"]["kernel"], None, gate="relu")
    kernel = p["bilinear"]["kernel"]

    def interactions(v):
        return np.stack([(v[:, i] @ kernel) * v[:, j] for i, j in PAIRS], axis=1)

    y = np.concatenate([interactions(x), interactions(x * gates[..., None])], axis=1).reshape(N, -1)
    expected = p["first_order"]["linear"]["embedding"][IDS][..., 0].sum(1)
    if hidden:
        for name in ("hidden_0", "hidden_1"):
            y = ACTIVATIONS["relu"](y @ p[name]["kernel"] + p[name]["bias"])
        expected = expected + (y @ p["output"]["kernel"] + p["output"]["bias"])[:, 0]
    else:
        expected = expected + p["first_order"]["bias"] + y.sum(1)
    logits = model.apply(variables, IDS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_without_attention_the_gated_branch_is_gone():
    with_, without = FiBiNET(20, K, (6,)), FiBiNET(20, K, (6,), attention=None)
    attention = 2 * F * 1  # one hidden unit of five fields
    assert count(with_, F) - count(without, F) == attention + len(PAIRS) * K * 6
    assert not {"attention", "bilinear_gated"} & variables_of(without, IDS)["params"].keys()


def test_the_branches_may_interact_in_two_ways():
    own = variables_of(FiBiNET(20, K, (), share_bilinear=False), IDS)["params"]
    assert own["bilinear"]["kernel"].shape == own["bilinear_gated"]["kernel"].shape == (len(PAIRS), K, K)
    mixed = variables_of(FiBiNET(20, K, (), bilinear="hadamard", bilinear_gated="each"), IDS)["params"]
    assert "bilinear" not in mixed and mixed["bilinear_gated"]["kernel"].shape == (F, K, K)


def test_dropout_acts_in_training_only():
    model = FiBiNET(20, K, (32,), dropout=0.5)
    variables = variables_of(model, IDS)
    one, two = (model.apply(variables, IDS, train=True, rngs={"dropout": jax.random.key(k)}) for k in (0, 1))
    assert np.abs(np.asarray(one) - np.asarray(two)).max() > 1e-4
    np.testing.assert_array_equal(model.apply(variables, IDS), model.apply(variables, IDS, train=False))


# The BARS benchmark's logs of FuxiCTR 1.0.2 on Criteo_x4_001 (39 fields, embeddings of 16) print these numbers of
# parameters; logistic regression's is the number of ids and one bias.
@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (LogisticRegression(910_708), 910_709),
        (FM(910_708, 16), 15_482_037),
        (FiBiNET(910_708, 16, (2000, 2000, 2000), bilinear="interaction"), 71_104_747),
    ],
    ids=["lr", "fm", "fibinet"],
)
def test_counts_are_those_that_fuxictr_prints_for_criteo(model, parameters):
    assert count(model, 39) == parameters


@pytest.mark.parametrize(
    ("kind", "matrices"), [("all", 1), ("each", 39), ("interaction", 39 * 38 // 2), ("hadamard", 0)]
)
def test_bilinear_counts_are_the_papers(kind, matrices):
    # Huang et al. 2019, section 3.3: k^2, f k^2, f (f - 1) / 2 k^2.
    model = FiBiNET(100, 10, (), bilinear=kind)
    rest = 100 * 11 + 1 + 2 * 39 * 13
    assert count(model, 39) == rest + matrices * 100


def test_gradients_flow_through_every_parameter():
    model = FiBiNET(20, K, (8,), attention=SqueezeExciteFields, bilinear="interaction")
    variables = variables_of(model, IDS)
    gradients = jax.grad(lambda v: jnp.square(model.apply(v, IDS)).sum())(variables)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def test_an_id_outside_the_table_cannot_hide():
    model = LogisticRegression(20)
    logits = model.apply(variables_of(model, IDS), jnp.array([[0, 1], [0, 20]]))
    np.testing.assert_array_equal(np.isnan(logits), [False, True])


def test_it_works_under_jit_and_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        y = jax.jit(SqueezeExciteFields().apply)(variables_of(SqueezeExciteFields(), X), jnp.asarray(X, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
