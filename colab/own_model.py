# ---
# jupyter:
#   colab:
#     provenance: []
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Squeeze-and-excitation in your own network
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/se-flax/se-flax/blob/main/colab/own_model.ipynb)
#
# In Linen, in NNX, and sharded over eight devices. Any runtime works: the devices are virtual CPU devices, with the
# same code as for the eight chips of a TPU v5e-8.

# %%
# @title Install se-flax { display-mode: "form" }
import glob
import importlib.util
import os
import shutil
import subprocess
import sys

SMALL = os.environ.get("SE_FLAX_SMALL") == "1"  # the tests run this notebook with small settings
IN_COLAB = "google.colab" in sys.modules

# Each accelerator needs its own JAX. A TPU shows as /dev/accel0 or /dev/vfio/0, a GPU brings nvidia-smi.
tpu = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
extra = ",tpu" if tpu else ",cuda" if shutil.which("nvidia-smi") else ""
if importlib.util.find_spec("se_flax") is None:
    if not os.path.exists("se-flax"):
        subprocess.run(["git", "clone", "--depth=1", "https://github.com/se-flax/se-flax"], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--editable", f"./se-flax[train{extra}]"], check=True
    )
sys.path.insert(0, os.path.abspath("se-flax"))

# %%
import jax

# Before JAX computes anything; the first two are left out where there are eight real devices.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_prng_impl", "rbg")  # random numbers that compile quickly, on a TPU too
print(jax.devices())

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

digits = load_digits()
images = np.float32(digits.images[..., None] / 16)  # [1797, 8, 8, 1]
labels = digits.target
train, test = slice(0, 1440), slice(1440, None)
STEPS = 60 if SMALL else 600

# %% [markdown]
# ## Linen
#
# `SqueezeExcite` maps `[N, H, W, C]` to the same shape and dtype. `ECA`, `EffectiveSE` and `CBAM` have the same
# interface, so the attention can be an attribute of your network.

# %%
from collections.abc import Callable
from functools import partial

import flax.linen as nn

import se_flax


class Network(nn.Module):
    attention: Callable | None = None

    @nn.compact
    def __call__(self, x):
        for features, strides in ((16, 1), (32, 2), (64, 2)):
            x = nn.relu(nn.Conv(features, (3, 3), strides=strides)(x))
            if self.attention is not None:
                x = self.attention()(x)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def loss_of(model, params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x), y).mean()


def batches(steps, size=32, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.integers(0, 1440, size)
        yield images[chosen], labels[chosen]


optimizer = optax.adam(1e-2)


def fit(model):
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]

    @jax.jit
    def step(params, state, x, y):
        loss, gradients = jax.value_and_grad(partial(loss_of, model))(params, x, y)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for x, y in batches(STEPS):
        params, state, loss = step(params, state, x, y)
        losses.append(float(loss))
    answers = jax.jit(model.apply)({"params": params}, images[test]).argmax(-1)
    return params, losses, float((answers == labels[test]).mean())


attentions = {"none": None, "SE, reduction 4": partial(se_flax.SqueezeExcite, reduction=4), "ECA": se_flax.ECA}
curves = {}
for name, attention in attentions.items():
    params, curves[name], accuracy = fit(Network(attention))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{name:<16} {count:>6,} parameters, {100 * accuracy:.1f} % of {len(labels[test])} digits right")

# %%
from IPython.display import Image as Display
from IPython.display import display

figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for name, losses in curves.items():
    ax.plot(np.convolve(losses, np.ones(10) / 10, mode="valid"), lw=1.4, label=name)
ax.set(xlabel="step", ylabel="loss, mean of 10 steps", ylim=(0, None))
ax.grid(alpha=0.25)
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
figure.savefig("losses.png", dpi=110)
plt.close(figure)
display(Display("losses.png"))

# %% [markdown]
# One seed of a small network on easy data shows that the modules train, not which is better.
#
# ## NNX
#
# `se_flax.to_nnx` turns a Linen module, a layer or a whole network, into an NNX module. `.lazy_init(x)` initialises it.

# %%
from flax import nnx


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.se = se_flax.to_nnx(se_flax.SqueezeExcite(reduction=4), rngs=rngs).lazy_init(jnp.zeros((1, 4, 4, 32)))
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.head(self.se(x).mean(axis=(1, 2)))


@nnx.jit
def nnx_step(model, optimizer, x, y):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


model = NnxNetwork(nnx.Rngs(0))
nnx_optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
first, *_, last = [float(nnx_step(model, nnx_optimizer, x, y)) for x, y in batches(STEPS)]
print(f"loss {first:.2f} -> {last:.2f}")

# %% [markdown]
# `from_nnx` returns the Linen variables, with the same numbers and names.

# %%
variables = se_flax.from_nnx(model.se)
x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 32)), jnp.float32)
difference = jnp.abs(jax.jit(se_flax.SqueezeExcite(reduction=4).apply)(variables, x) - model.se(x)).max()
print(jax.tree.map(jnp.shape, variables), "largest difference:", float(difference))

# %% [markdown]
# ## Eight devices
#
# The batch is sharded along the mesh axis `data`, the parameters are replicated. The step is the one from above: XLA
# reads the shardings of its arguments and adds the communication.

# %%
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec("data"))
copied = NamedSharding(mesh, PartitionSpec())

network = Network(partial(se_flax.SqueezeExcite, reduction=4))
params = jax.jit(network.init)(jax.random.key(0), images[:1])["params"]
gradient = jax.jit(jax.value_and_grad(partial(loss_of, network)))

x, y = next(batches(1))
one_loss, one_gradients = gradient(params, x, y)
x, y = jax.device_put((x, y), split)
loss, gradients = gradient(jax.device_put(params, copied), x, y)

print("on each device:", x.addressable_shards[0].data.shape, "of", x.shape)
apart = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), one_gradients, gradients)
print(f"loss on one device {one_loss:.6f}, on eight {loss:.6f}; gradients apart by {max(jax.tree.leaves(apart)):.1e}")

# %% [markdown]
# The squeeze is a mean over one image, so sharding the batch needs no communication inside the layer. The compiled
# program has all-reduces for the loss and the gradients only.


# %%
def sums_over_devices(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text().count(" all-reduce(")


on_devices = jax.device_put(params, copied)
forward = sums_over_devices(lambda params, x: network.apply({"params": params}, x), on_devices, x)
backward = sums_over_devices(jax.value_and_grad(partial(loss_of, network)), on_devices, x, y)
print("all-reduce operations: forward", forward, "- with gradients", backward)

# %% [markdown]
# Channels can be sharded too, over a second mesh axis. The two small layers of the gate mix all channels; XLA adds the
# communication.

# %%
mesh = jax.make_mesh((2, 4), ("data", "channels"), axis_types=(AxisType.Auto,) * 2)
maps = np.random.default_rng(0).normal(size=(8, 4, 4, 64)).astype(np.float32)
layer = se_flax.SqueezeExcite(reduction=4)
variables = jax.jit(layer.init)(jax.random.key(0), maps)
cut = jax.device_put(maps, NamedSharding(mesh, PartitionSpec("data", None, None, "channels")))
apply = jax.jit(layer.apply)
out = apply(variables, cut)
print("on each device:", out.addressable_shards[0].data.shape, "of", out.shape)
print("largest difference:", float(np.abs(np.asarray(out) - np.asarray(apply(variables, maps))).max()))

# %% [markdown]
# The training program shards runs over all devices and hosts by itself: [training
# notebook](https://colab.research.google.com/github/se-flax/se-flax/blob/main/colab/train_on_tpu.ipynb).
