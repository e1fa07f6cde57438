"""Losses and top-k counts against float64 NumPy, literal numbers from PyTorch, and properties."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_flax import UserError
from train.optim.losses import cross_entropy, one_hot_smoothed, topk_correct

SHAPES = st.sampled_from([(4, 3), (3, 7), (2, 1)])  # few, since each compiles anew
EXAMPLES = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


LOGITS = st.floats(-30, 30, width=32)


@st.composite
def batches(draw, elements=LOGITS):
    shape = draw(SHAPES)
    logits = draw(hnp.arrays(np.float32, shape, elements=elements))
    return logits, draw(hnp.arrays(np.int32, shape[0], elements=st.integers(0, shape[1] - 1)))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@EXAMPLES
@hypothesis.given(batches())
def test_cross_entropy_is_the_negative_log_softmax_of_the_label(batch):
    logits, labels = batch
    loss = cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    assert loss.shape == labels.shape
    assert loss.dtype == jnp.float32
    assert np.all(np.asarray(loss) >= 0)
    np.testing.assert_allclose(loss, -log_softmax(logits)[np.arange(len(labels)), labels], rtol=2e-6, atol=2e-6)


@EXAMPLES
@hypothesis.given(batches(), st.sampled_from([0.0, 0.1, 0.5]))
def test_label_smoothing_mixes_in_the_mean_over_all_classes(batch, smoothing):
    logits, labels = batch
    log_p = log_softmax(logits)
    expected = -(1 - smoothing) * log_p[np.arange(len(labels)), labels] - smoothing * log_p.mean(-1)
    loss = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
    np.testing.assert_allclose(loss, expected, rtol=3e-6, atol=3e-6)


def test_literals_from_pytorch():
    # torch 2.13, torch.nn.functional.cross_entropy(logits, ..., reduction="none", label_smoothing=...)
    logits = jnp.array([[1.5, -0.5, 0.25], [0.0, 3.0, -2.0]])
    labels = jnp.array([2, 1])
    soft = jnp.array([[0.2, 0.3, 0.5], [0.0, 0.6, 0.4]])
    np.testing.assert_allclose(cross_entropy(logits, labels), [1.6019519567, 0.0549852140], rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(logits, labels, 0.1), [1.5852853060, 0.3216518760], rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(logits, soft, 0.1), [1.5627852678, 2.1216516495], rtol=1e-6)


def test_integer_labels_and_their_one_hot_distributions_agree():
    logits = jax.random.normal(jax.random.key(0), (5, 4))
    labels = jnp.array([0, 3, 1, 1, 2], jnp.uint8)
    hard = cross_entropy(logits, labels, 0.1)
    np.testing.assert_array_equal(hard, cross_entropy(logits, jax.nn.one_hot(labels, 4), 0.1))


def test_one_hot_smoothed():
    expected = [[0.1, 0.1, 0.7, 0.1], [0.7, 0.1, 0.1, 0.1]]
    rows = one_hot_smoothed(jnp.array([2, 0]), 4, 0.4)
    assert rows.dtype == jnp.float32
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    np.testing.assert_array_equal(one_hot_smoothed(jnp.array([1], jnp.uint8), 300)[0, :3], [0, 1, 0])


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_cannot_hide(label):
    logits, labels = jnp.zeros((2, 3)), jnp.array([0, label])
    np.testing.assert_array_equal(np.isnan(cross_entropy(logits, labels)), [False, True])
    np.testing.assert_array_equal(topk_correct(logits, labels, 5), [True, False])


def test_bfloat16_logits_are_computed_in_float32():
    logits = jnp.array([[100.0, 99.0, 0.5]], jnp.bfloat16)
    loss = cross_entropy(logits, jnp.array([1]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [1.31326169], rtol=1e-6)  # log(1 + e)


def test_extreme_logits_stay_finite():
    loss = cross_entropy(jnp.array([[1e38, -1e38], [-1e4, 1e4]]), jnp.array([0, 0]))
    np.testing.assert_array_equal(loss, [0.0, 2e4])


def test_masked_examples_have_no_loss_and_no_gradient():
    logits = jnp.array([[1.0, 2.0, 0.0], [jnp.nan, 0.0, jnp.inf], [0.5, 0.0, 0.0]])
    labels, mask = jnp.array([0, -1, 2]), jnp.array([True, False, True])
    loss = cross_entropy(logits, labels, 0.1, mask)
    kept = jnp.array([0, 2])
    np.testing.assert_array_equal(loss[kept], cross_entropy(logits[kept], labels[kept], 0.1))
    assert loss[1] == 0
    gradient = jax.grad(lambda x: cross_entropy(x, labels, 0.1, mask).sum())(logits)
    np.testing.assert_array_equal(gradient[1], 0)
    assert np.all(np.isfinite(gradient))


def test_gradient_is_softmax_minus_target():
    logits = jax.random.normal(jax.random.key(1), (3, 5))
    labels = jnp.array([4, 0, 2])
    gradient = jax.grad(lambda x: cross_entropy(x, labels, 0.2).sum())(logits)
    target = 0.8 * np.eye(5)[np.asarray(labels)] + 0.2 / 5
    np.testing.assert_allclose(gradient, np.exp(log_softmax(logits)) - target, atol=1e-6)


@EXAMPLES
@hypothesis.given(batches(st.integers(-2, 2).map(float)), st.integers(1, 8))
def test_topk_equals_a_stable_sort_also_with_ties(batch, k):
    logits, labels = batch
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    expected = [label in row for label, row in zip(labels, order, strict=True)]
    for dtype in (jnp.float32, jnp.bfloat16):
        correct = topk_correct(jnp.asarray(logits, dtype), jnp.asarray(labels), k)
        assert correct.dtype == bool
        np.testing.assert_array_equal(correct, expected)
    if k == 1:
        np.testing.assert_array_equal(expected, np.argmax(logits, -1) == labels)


def test_a_constant_network_is_right_once_per_class():
    labels = jnp.arange(10)
    assert topk_correct(jnp.zeros((10, 10)), labels, 1).sum() == 1
    assert topk_correct(jnp.zeros((10, 10)), labels, 5).sum() == 5


def test_nan_is_wrong_and_infinity_ranks():
    nan, inf = jnp.nan, jnp.inf
    logits = jnp.array([[nan, 0.0, 1.0], [0.0, nan, 1.0], [nan, nan, nan], [-inf, 0.0, inf], [-inf, 0.0, inf]])
    labels = jnp.array([0, 2, 1, 2, 0], jnp.uint8)
    np.testing.assert_array_equal(topk_correct(logits, labels, 1), [False, False, False, True, False])
    np.testing.assert_array_equal(topk_correct(logits, labels, 5), [False, False, False, True, True])


def test_works_under_jit_and_strict_promotion():
    logits, labels = jnp.array([[0.0, 1.0]], jnp.bfloat16), jnp.array([1], jnp.uint8)
    with jax.numpy_dtype_promotion("strict"):
        loss = jax.jit(cross_entropy)(logits, labels, jnp.float32(0.1), jnp.array([True]))
        correct = jax.jit(topk_correct, static_argnums=2)(logits, labels, 1)
    assert loss.dtype == jnp.float32
    assert bool(correct[0])


def test_shapes_that_do_not_fit_are_refused():
    logits, labels = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(
        UserError, match=r"shape \(3,\) and .* for the logits of cross_entropy; give float \[n, classes\]"
    ):
        cross_entropy(jnp.zeros(3), labels)
    with pytest.raises(UserError, match=r"shape \(3,\) and .* for the labels of cross_entropy; give integer \[2\]"):
        cross_entropy(logits, jnp.zeros(3, jnp.int32))
    with pytest.raises(UserError, match=r"got k=0 for topk_correct; give 1 or more"):
        topk_correct(logits, labels, 0)
    with pytest.raises(
        UserError, match=r"shape \(2, 3\) and dtype float32 for the labels of topk_correct; give integer"
    ):
        topk_correct(logits, logits, 1)
