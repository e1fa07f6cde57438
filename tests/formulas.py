"""The layers of the papers in float64 NumPy, written without a look at ours: what the tests compare with."""

import math

import jax
import jax.numpy as jnp
import numpy as np

GATES = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "relu": lambda x: np.where(x > 0, x, 0),
    "hard_sigmoid": lambda x: np.where(x < -3, 0, np.where(x > 3, 1, (x + 3) / 6)),
}
ACTIVATIONS = {
    "relu": GATES["relu"],
    "silu": lambda x: x / (1 + np.exp(-x)),
    "hard_swish": lambda x: x * GATES["hard_sigmoid"](x),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "identity": lambda x: x,
}
relu = GATES["relu"]


def double(*arrays):
    return [None if a is None else np.asarray(a, np.float64) for a in arrays]


def excite(z, w1, b1, w2, b2, activation="relu", gate="sigmoid"):
    hidden = ACTIVATIONS[activation](z @ w1 + (0 if b1 is None else b1))
    return GATES[gate](hidden @ w2 + (0 if b2 is None else b2))


def conv(x, kernel, strides=1, padding=None, dilation=1, groups=1):
    """Correlation of x [N, H, W, C] with kernel [kh, kw, C / groups, F]; padding ((top, bottom), (left, right))."""
    x, kernel = double(x, kernel)
    kh, kw, _, features = kernel.shape
    if padding is None:
        padding = [(k // 2 * dilation,) * 2 for k in (kh, kw)]
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    height, width = ((x.shape[i + 1] - (k - 1) * dilation - 1) // strides + 1 for i, k in enumerate((kh, kw)))
    out = np.zeros((x.shape[0], height, width, features))
    inputs, outputs = x.shape[-1] // groups, features // groups
    for g in range(groups):
        ours = slice(g * outputs, (g + 1) * outputs)
        for i in range(kh):
            for j in range(kw):
                top, left = i * dilation, j * dilation
                tap = x[:, top : top + height * strides : strides, left : left + width * strides : strides]
                tap = tap[:, :height, :width, g * inputs : (g + 1) * inputs]
                out[..., ours] += tap @ kernel[i, j, :, ours]
    return out


def batch_norm(x, params, stats, epsilon=1e-5):
    mean, var, scale, bias = double(stats["mean"], stats["var"], params["scale"], params["bias"])
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def squeeze_excite(x, params, **kwargs):
    """SE with its parameters' tree; `kwargs` of `excite`."""
    reduce_, expand = params["fc1"], params["fc2"]
    layers = double(*(a for p in (reduce_, expand) for a in (p["kernel"][0, 0], p.get("bias"))))
    return x * excite(x.mean((1, 2), keepdims=True), *layers, **kwargs)


def squeeze_after_act(u, factor, offset, act):
    """Means over the pixels of act(factor * u + offset); u [N, H, W, C], factor and offset [C]."""
    return ACTIVATIONS[act](u * factor + offset).mean((1, 2), keepdims=True)


def gate_after_act(u, factor, offset, gates, act):
    """gates * act(factor * u + offset); gates [N, 1, 1, C]."""
    return gates * ACTIVATIONS[act](u * factor + offset)


def gradients(function, *arrays, step=1e-5):
    """Gradients of a function to a number by central differences: one array for each of `arrays`, in float64."""
    arrays = double(*arrays)

    def slope(which, index):
        ends = []
        for sign in (1, -1):
            moved = arrays[which].copy()
            moved[index] += sign * step
            ends.append(function(*arrays[:which], moved, *arrays[which + 1 :]))
        return (ends[0] - ends[1]) / (2 * step)

    return [
        np.array([slope(which, index) for index in np.ndindex(x.shape)]).reshape(x.shape)
        for which, x in enumerate(arrays)
    ]


def random_variables(model, *args, seed=0):
    """Variables of a module with nothing at its initial value: every scale, bias and statistic matters."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            value = rng.standard_normal(leaf.shape) * math.sqrt(2 / max(1, math.prod(leaf.shape[:-1])))
        elif name in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            value = 0.3 * rng.standard_normal(leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(model.init, jax.random.key(0), *args))
