"""Schedules, optimizers and the moving average against NumPy, exact fractions and literal numbers from PyTorch."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from se_flax.errors import UserError
from train.config import Optim
from train.optim.optimizers import OPTIMIZERS, Updates, check, ema_update, kernels, muon_labels
from train.optim.schedules import SCHEDULES


def rates(settings, steps_per_epoch, total_steps, steps):
    return np.asarray(jax.jit(jax.vmap(Updates(settings).schedule(steps_per_epoch, total_steps)))(jnp.asarray(steps)))


# --- Schedules --------------------------------------------------------------------------------------------------------

PAPER = Optim(learning_rate=0.6, schedule="step", boundaries=(30, 60, 90), decay_factor=0.1)


def test_the_papers_schedule_is_exact():
    spe = 1251
    steps = [0, 30 * spe - 1, 30 * spe, 60 * spe - 1, 60 * spe, 90 * spe - 1, 90 * spe, 10**7]
    expected = [0.6, 0.6, 0.06, 0.06, 0.006, 0.006, 0.0006, 0.0006]
    np.testing.assert_array_equal(rates(PAPER, spe, 100 * spe, steps), np.float32(expected))


def test_boundaries_may_be_fractions_of_an_epoch_and_epochs_fractions_of_a_step():
    settings = dataclasses.replace(PAPER, boundaries=(0.5, 1.25), decay_factor=0.5, learning_rate=1.0)
    # 0.5 * 7.5 = 3.75 and 1.25 * 7.5 = 9.375: from steps 4 and 10 on
    np.testing.assert_array_equal(rates(settings, 7.5, 20, range(12)), [1.0] * 4 + [0.5] * 6 + [0.25] * 2)
    # 1.1 * 100 is 110.00000000000001 in float64: still step 110
    settings = dataclasses.replace(settings, boundaries=(1.1,))
    np.testing.assert_array_equal(rates(settings, 100, 200, [109, 110]), [1.0, 0.5])


@pytest.mark.parametrize("steps_per_epoch", [Fraction(1281167, 4096), Fraction(1251), Fraction(5)])
def test_efficientnets_schedule(steps_per_epoch):
    settings = Optim(
        learning_rate=0.256, schedule="exponential", decay_factor=0.97, decay_every_epochs=2.4, warmup_epochs=5.0
    )
    total = int(350 * steps_per_epoch)
    every, warmup = Fraction(12, 5) * steps_per_epoch, 5 * steps_per_epoch
    edges = [math.ceil(k * every) + offset for k in range(1, int(total / every) + 1) for offset in (-1, 0)]
    steps = sorted({0, 1, *edges, math.ceil(warmup) - 1, math.ceil(warmup)})

    def expected(step):  # exact arithmetic, as the TensorFlow code would have it without rounding
        if step < warmup:
            return 0.256 * float(Fraction(step) / warmup)
        return 0.256 * 0.97 ** (step // every)

    np.testing.assert_allclose(
        rates(settings, float(steps_per_epoch), total, steps), [expected(step) for step in steps], rtol=2e-7
    )


def test_cosine_ends_at_the_final_rate():
    settings = Optim(learning_rate=0.5, schedule="cosine", final_learning_rate=0.1)
    steps = np.array([0, 25, 50, 75, 100, 200])
    expected = 0.1 + 0.4 * 0.5 * (1 + np.cos(np.pi * np.minimum(steps, 100) / 100))
    np.testing.assert_allclose(rates(settings, 10, 100, steps), expected, rtol=1e-6)
    np.testing.assert_allclose(expected[[0, 2, 4, 5]], [0.5, 0.3, 0.1, 0.1])


def test_constant_after_warmup_from_zero():
    settings = Optim(learning_rate=0.4, schedule="constant", warmup_epochs=0.5)
    np.testing.assert_allclose(rates(settings, 8, 100, range(6)), [0.0, 0.1, 0.2, 0.3, 0.4, 0.4], rtol=1e-6)


def test_the_decays_clock_runs_during_the_warmup():
    settings = dataclasses.replace(PAPER, warmup_epochs=5.0)
    plain = rates(PAPER, 10, 1000, range(50, 1000))
    np.testing.assert_array_equal(rates(settings, 10, 1000, range(50, 1000)), plain)
    cosine = Optim(schedule="cosine", warmup_epochs=2.0)
    assert rates(cosine, 10, 100, [20])[0] == rates(dataclasses.replace(cosine, warmup_epochs=0), 10, 100, [20])[0]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_take_python_integers_and_return_float32_scalars(name):
    rate = Updates(Optim(schedule=name, boundaries=(1,), warmup_epochs=1.0)).schedule(2.5, 10)(3)
    assert rate.shape == ()
    assert rate.dtype == jnp.float32


def test_a_run_shorter_than_its_warmup_raises():
    Updates(Optim(warmup_epochs=2.0)).schedule(10, 20)
    text = (
        "optim.warmup_epochs is 2.0, which is 20 steps, but the run has only 19; train longer or warm up .* 1.9 epochs"
    )
    with pytest.raises(UserError, match=text):
        Updates(Optim(warmup_epochs=2.0)).schedule(10, 19)


@pytest.mark.parametrize(("per_epoch", "total"), [(0, 10), (10, 0), (float("nan"), 10)])
def test_a_run_without_steps_raises(per_epoch, total):
    with pytest.raises(UserError, match=f"the run has {total} steps of {per_epoch} an epoch; both must be positive"):
        Updates(Optim()).schedule(per_epoch, total)


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_the_defaults_and_every_optimizer_pass():
    for name in OPTIMIZERS:
        check(Optim(name=name))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": "adam"}, r"optim\.name is 'adam', which does not exist; closest: adamw"),
        ({"name": "zzz"}, r"optim\.name is 'zzz', which does not exist; allowed: adamw, lamb, muon, rmsprop, sgd"),
        ({"schedule": "cosin"}, r"optim\.schedule is 'cosin', which does not exist; closest: cosine"),
        ({"non_finite": "skipp"}, r"optim\.non_finite is 'skipp', which does not exist; closest: skip"),
        ({"learning_rate": -0.1}, r"optim\.learning_rate is -0\.1; it must be 0 or a positive number"),
        ({"learning_rate": math.inf}, r"optim\.learning_rate is inf; it must be 0 or a positive number"),
        ({"learning_rate": math.nan}, r"optim\.learning_rate is nan; it must be 0 or a positive number"),
        ({"warmup_epochs": -1.0}, r"optim\.warmup_epochs is -1\.0; it must be 0 or .* \(0 starts at the full rate\)"),
        ({"decay_factor": 0.0}, r"optim\.decay_factor is 0\.0; it must be a positive number \(the paper's is 0\.1"),
        ({"decay_every_epochs": 0.0}, r"optim\.decay_every_epochs is 0\.0; .* \(EfficientNet's is 2\.4\)"),
        ({"final_learning_rate": -1.0}, r"optim\.final_learning_rate is -1\.0; it must be 0 or a positive number"),
        ({"first_learning_rate": -1.0}, r"optim\.first_learning_rate is -1\.0; it must be 0 or a positive number"),
        ({"peak": 0.0}, r"optim\.peak is 0\.0; it must be above 0 and below 1 \(it is a share of the run"),
        ({"norm_bias_multiplier": 0.0}, r"optim\.norm_bias_multiplier is 0\.0; it must be a positive number \(64 is"),
        ({"momentum": 1.0}, r"optim\.momentum is 1\.0; it must be at least 0 and below 1 \(0\.9 is usual"),
        ({"b1": -0.1}, r"optim\.b1 is -0\.1; it must be at least 0 and below 1"),
        ({"b2": 1.0}, r"optim\.b2 is 1\.0; it must be at least 0 and below 1"),
        ({"eps": 0.0}, r"optim\.eps is 0\.0; it must be a positive number \(1e-8 is usual"),
        ({"rmsprop_decay": 2.0}, r"optim\.rmsprop_decay is 2\.0; it must be at least 0 and below 1"),
        ({"weight_decay": -1e-4}, r"optim\.weight_decay is -0\.0001; it must be 0 or .* \(0 turns it off\)"),
        ({"clip_norm": -1.0}, r"optim\.clip_norm is -1\.0; it must be 0 or .* \(0 turns clipping off\)"),
        ({"accumulate": 0}, r"optim\.accumulate is 0; it must be a whole number from 1 \(1 turns accumulation off\)"),
        ({"accumulate": 1.5}, r"optim\.accumulate is 1\.5; it must be a whole number from 1"),
        ({"accumulate": math.inf}, r"optim\.accumulate is inf; it must be a whole number from 1"),
        ({"ema_decay": 1.0}, r"optim\.ema_decay is 1\.0; it must be at least 0 and below 1 \(0\.9999 is usual"),
        ({"label_smoothing": 1.0}, r"optim\.label_smoothing is 1\.0; it must be at least 0 and below 1 \(0\.1"),
        ({"boundaries": (60, 30)}, r"optim\.boundaries is \(60, 30\); it must hold positive epochs in rising order"),
        ({"boundaries": (0, 30)}, r"optim\.boundaries is \(0, 30\); it must hold positive epochs in rising order"),
        ({"boundaries": (30, 30)}, r"optim\.boundaries is \(30, 30\); it must hold positive epochs in rising order"),
        ({"schedule": "step"}, r"optim\.schedule is 'step' but optim\.boundaries is empty; name the epochs"),
    ],
)
def test_check_says_what_is_wrong(change, text):
    settings = Optim(**change)
    for call in (check, Updates):
        with pytest.raises(UserError, match=text) as error:
            call(settings)
        assert "\n" not in str(error.value)


# --- Optimizers -------------------------------------------------------------------------------------------------------

RATES = np.array([0.1, 0.07, 0.03, 0.2, 0.05])  # changes at each step, so that its place in the formula shows


def rate_table(step):
    return jnp.asarray(RATES, jnp.float32)[step]


def small_tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "conv": {"kernel": rng.normal(size=(3, 3, 2, 4)), "bias": rng.normal(size=4)},
        "norm": {"scale": 1 + 0.1 * rng.normal(size=4), "bias": np.zeros(4)},
        "eca": {"kernel": rng.normal(size=5)},
    }


def train(settings, params, gradients):
    """Runs the project's optimizer; returns the parameters after each step."""
    optimizer = Updates(settings).optimizer(rate_table)
    params = jax.tree.map(jnp.float32, params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    seen = []
    for gradient in gradients:
        params, state = step(params, state, jax.tree.map(jnp.float32, gradient))
        seen.append(params)
    return seen


def train_numpy(rule, settings, params, gradients):
    """The same leaf by leaf in float64: `rule` is a generator that receives a gradient and yields the parameter."""

    def leaf(path, value, *gradients):
        decays = settings.decay_norm_and_bias or (path[-1].key == "kernel" and value.ndim >= 2)
        steps = rule(settings, np.array(value), settings.weight_decay if decays else 0.0, decays)
        next(steps)
        return np.stack([steps.send(gradient) for gradient in gradients])

    return jax.tree_util.tree_map_with_path(leaf, params, *gradients)


def sgd_rule(s, p, decay, _):
    buffer, rate = np.zeros_like(p), iter(RATES)
    g = yield
    while True:
        g = g + decay * p
        buffer = s.momentum * buffer + g
        p = p - next(rate) * (g + s.momentum * buffer if s.nesterov else buffer)
        g = yield p


def rmsprop_rule(s, p, decay, _):
    mean_square, momentum, rate = np.ones_like(p), np.zeros_like(p), iter(RATES)
    g = yield
    while True:
        g = g + decay * p
        mean_square = s.rmsprop_decay * mean_square + (1 - s.rmsprop_decay) * g**2
        momentum = s.momentum * momentum + next(rate) * g / np.sqrt(mean_square + s.eps)
        p = p - momentum
        g = yield p


def adam_directions(s, shape):
    m, v, t = np.zeros(shape), np.zeros(shape), 0
    g = yield
    while True:
        t += 1
        m, v = s.b1 * m + (1 - s.b1) * g, s.b2 * v + (1 - s.b2) * g**2
        g = yield m / (1 - s.b1**t) / (np.sqrt(v / (1 - s.b2**t)) + s.eps)


def adamw_rule(s, p, decay, _):
    adam, rate = adam_directions(s, p.shape), iter(RATES)
    next(adam)
    g = yield
    while True:
        p = p - next(rate) * (adam.send(g) + decay * p)
        g = yield p


def lamb_rule(s, p, decay, adapts):
    adam, rate = adam_directions(s, p.shape), iter(RATES)
    next(adam)
    g = yield
    while True:
        update = adam.send(g) + decay * p
        norms = np.linalg.norm(p), np.linalg.norm(update)
        trust = norms[0] / norms[1] if adapts and all(norms) else 1.0
        p = p - next(rate) * trust * update
        g = yield p


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        (Optim(name="sgd", nesterov=True, weight_decay=0.05), sgd_rule),
        (Optim(name="sgd", nesterov=False, momentum=0.8, weight_decay=0.05), sgd_rule),
        (Optim(name="sgd", momentum=0.0, weight_decay=0.0), sgd_rule),
        (Optim(name="rmsprop", eps=1e-3, rmsprop_decay=0.8, weight_decay=0.05), rmsprop_rule),
        (Optim(name="adamw", b2=0.99, eps=1e-6, weight_decay=0.05), adamw_rule),
        (Optim(name="lamb", b2=0.99, eps=1e-6, weight_decay=0.05), lamb_rule),
    ],
    ids=["nesterov", "momentum", "plain", "rmsprop", "adamw", "lamb"],
)
def test_optimizers_follow_their_formulas(settings, rule, everything):
    settings = dataclasses.replace(settings, decay_norm_and_bias=everything)
    params, gradients = small_tree(), [small_tree(seed) for seed in range(1, 6)]
    ours = jax.tree.map(lambda *steps: np.stack(steps), *train(settings, params, gradients))
    expected = train_numpy(rule, settings, params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-6), ours, expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # torch 2.13: torch.optim.SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05), the same with
        # nesterov=False, and AdamW(lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.05), after the three gradients
        (
            Optim(name="sgd", nesterov=True, weight_decay=0.05),
            [[0.228380308, -0.599260628], [1.133234620, 0.129220441]],
        ),
        (
            Optim(name="sgd", nesterov=False, weight_decay=0.05),
            [[0.286682457, -0.648364902], [1.341088414, 0.232517466]],
        ),
        (
            Optim(name="adamw", b2=0.99, eps=1e-6, weight_decay=0.05),
            [[0.332845122, -0.846132636], [1.745328665, 0.288827956]],
        ),
    ],
)
def test_literals_from_pytorch(settings, expected):
    gradients = ([[1.0, -2.0], [0.5, 0.0]], [[-0.5, 1.0], [3.0, -1.0]], [[0.25, 0.25], [-1.0, 2.0]])
    optimizer = Updates(settings).optimizer(optax.constant_schedule(0.1))
    params = {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.25]])}
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update({"kernel": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], expected, rtol=2e-6)


def test_rmsprops_first_step_starts_from_a_mean_square_of_one():
    settings = Optim(name="rmsprop", eps=1e-3, weight_decay=0.0)
    (after,) = train(settings, {"kernel": np.ones((1, 1))}, [{"kernel": np.full((1, 1), 2.0)}])
    np.testing.assert_allclose(after["kernel"], 1 - 0.1 * 2 / np.sqrt(0.9 + 0.1 * 4 + 1e-3), rtol=1e-6)


def test_masks_on_a_network():
    params = {
        "conv": {"kernel": jnp.zeros((3, 3, 16, 32)), "bias": jnp.zeros(32)},
        "depthwise": {"kernel": jnp.zeros((3, 3, 1, 32))},
        "eca": {"kernel": jnp.zeros(5)},
        "eca_conv": {"kernel": jnp.zeros((5, 1, 1))},
        "norm": {"scale": jnp.zeros(32), "bias": jnp.zeros(32)},
        "head": {"kernel": jnp.zeros((32, 10)), "bias": jnp.zeros(10)},
        "table": {"embedding": jnp.zeros((100, 8))},
    }
    decayed = {
        "/".join(k.key for k in path) for path, yes in jax.tree_util.tree_leaves_with_path(kernels(params)) if yes
    }
    assert decayed == {"conv/kernel", "depthwise/kernel", "eca_conv/kernel", "head/kernel"}
    labels = jax.tree_util.tree_leaves_with_path(muon_labels(params))
    assert {"/".join(k.key for k in path) for path, label in labels if label == "muon"} == {
        "conv/kernel",
        "head/kernel",
    }
    assert {label for _, label in labels} == {"muon", "adamw"}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_weight_decay_leaves_norms_and_biases_alone_unless_told(name):
    params = jax.tree.map(np.ones_like, small_tree())
    zero = jax.tree.map(np.zeros_like, params)
    (kept,) = train(Optim(name=name, weight_decay=0.1), params, [zero])
    moved = jax.tree.map(lambda x: bool(np.any(x != 1)), kept)
    assert moved == {
        "conv": {"kernel": True, "bias": False},
        "norm": {"scale": False, "bias": False},
        "eca": {"kernel": False},
    }
    (kept,) = train(Optim(name=name, weight_decay=0.1, decay_norm_and_bias=True), params, [zero])
    assert all(np.all(x < 1) for x in jax.tree.leaves(kept))


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (1, 1, 32, 8), (3, 3, 2, 64), (24, 10)])
def test_muon_makes_kernel_updates_nearly_orthogonal(shape):
    gradient = np.random.default_rng(0).normal(size=shape)
    params = {"kernel": np.zeros(shape)}
    (after,) = train(Optim(name="muon", weight_decay=0.0), params, [{"kernel": gradient}])
    update = -np.asarray(after["kernel"]).reshape(-1, shape[-1]) / RATES[0]
    u, _, vt = np.linalg.svd(gradient.reshape(-1, shape[-1]), full_matrices=False)
    inner = u.T @ update @ vt.T / (0.2 * np.sqrt(max(update.shape)))  # the identity, were it exactly U V^T
    np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-4)
    assert np.all(np.diag(inner) > 0.6)
    assert np.all(np.diag(inner) < 1.3)
    assert 0.15 < np.sqrt(np.mean(update**2)) < 0.25  # whatever the shape: the size of an Adam update


def test_muon_leaves_everything_else_to_adamw():
    settings = Optim(name="muon", b2=0.99, weight_decay=0.05)
    params, gradients = small_tree(), [small_tree(seed) for seed in range(1, 6)]
    for tree in (params, *gradients):
        tree["depthwise"] = {"kernel": tree["conv"]["kernel"][:, :, :1]}
    ours = jax.tree.map(lambda *steps: np.stack(steps), *train(settings, params, gradients))
    expected = train_numpy(adamw_rule, settings, params, gradients)
    assert np.max(np.abs(ours["conv"].pop("kernel") - expected["conv"].pop("kernel"))) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-6), ours, expected)


def test_muon_heeds_momentum_and_nesterov():
    params, gradients = small_tree(), [small_tree(seed) for seed in range(1, 3)]
    kernels_seen = [
        train(Optim(name="muon", momentum=momentum, nesterov=nesterov), params, gradients)[-1]["conv"]["kernel"]
        for momentum, nesterov in ((0.9, True), (0.9, False), (0.5, True))
    ]
    assert not np.allclose(kernels_seen[0], kernels_seen[1])
    assert not np.allclose(kernels_seen[0], kernels_seen[2])


def test_clipping_comes_before_everything_else():
    params, gradients = small_tree(), [small_tree(seed) for seed in range(1, 6)]
    settings = Optim(name="sgd", weight_decay=0.05)

    def clipped(tree):
        norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(tree)))
        assert norm > 2.5
        return jax.tree.map(lambda x: x * 2.5 / norm, tree)

    ours = train(dataclasses.replace(settings, clip_norm=2.5), params, gradients)
    expected = train(settings, params, [clipped(gradient) for gradient in gradients])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, expected)
    small = [jax.tree.map(lambda x: 1e-3 * x, gradient) for gradient in gradients]
    ours = train(dataclasses.replace(settings, clip_norm=2.5), params, small)
    jax.tree.map(np.testing.assert_array_equal, ours, train(settings, params, small))


# --- Moving average ---------------------------------------------------------------------------------------------------


def test_moving_average_of_a_constant_has_a_closed_form():
    # From 0 towards 1: what is left of the start is the product of the decays, (1 + t) / (10 + t) at first.
    tree, left = {"params": {"kernel": jnp.zeros((2, 2))}}, 1.0
    one = jax.tree.map(jnp.ones_like, tree)
    update = jax.jit(ema_update, static_argnums=2)
    for step in range(120):
        tree = update(tree, one, 0.9, step)
        left *= min(0.9, (1 + step) / (10 + step))
        np.testing.assert_allclose(tree["params"]["kernel"], 1 - left, rtol=1e-6)
    assert (1 + 80) / (10 + 80) == 0.9  # the warm-up ended within the test


def test_moving_average_copies_counters_and_keeps_dtypes():
    old = {"mean": jnp.ones(2, jnp.bfloat16), "count": jnp.array(3), "empty": {}}
    new = {"mean": jnp.zeros(2, jnp.float32), "count": jnp.array(7), "empty": {}}
    out = ema_update(old, new, 0.5, 0)
    assert out["count"] == 7
    assert out["mean"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out["mean"], np.float32), 0.1, rtol=4e-3)
    assert out["empty"] == {}


def test_moving_average_of_an_unchanged_value_is_the_value():
    tree = {"kernel": jax.random.normal(jax.random.key(0), (7,))}
    np.testing.assert_array_equal(ema_update(tree, tree, 0.9999, 12345)["kernel"], tree["kernel"])
