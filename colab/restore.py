# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#     provenance: []
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Load a pretrained checkpoint, classify an image, plot the gates
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/se-flax/se-flax/blob/main/colab/restore.ipynb)
#
# Any runtime works, a CPU too.

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

# %% [markdown]
# ## Load
#
# `REF` is a published checkpoint, a repository on the Hugging Face hub, the folder of a run, or a file
# ([formats](https://github.com/se-flax/se-flax/blob/main/docs/checkpoints.md)). PyTorch is not needed. (With
# `SE_FLAX_SMALL=1`, for tests without internet, it is a small network trained for thirty steps on digits.)

# %%
REF = "seresnet50.ra2_in1k"  # @param {type: "string"}

if SMALL:
    from configs import digits
    from train.run.loop import run

    config = digits.get_config()
    config.data.image_size, config.data.batch_size = 8, 48
    config.augment.pad, config.augment.mixup, config.optim.ema_decay, config.optim.warmup_epochs = 0, 0, 0, 0
    config.steps, config.eval_every_epochs, config.compilation_cache = 30, 100, ""
    run(config, "own")
    REF = "own"

# %%
import se_flax

loaded = se_flax.load_pretrained(REF)
print(loaded.name, loaded.provenance)
print(loaded.preprocess)

# %% [markdown]
# `loaded.preprocess` comes with the weights: resize, crop, mean and std as in training. Other preprocessing costs
# accuracy without an error.
#
# ## Classify
#
# Tick `UPLOAD` for your own images; the default is two photographs of scikit-learn.

# %%
UPLOAD = False  # @param {type: "boolean"}

import io

from PIL import Image, ImageOps
from sklearn import datasets

if UPLOAD and IN_COLAB:
    from google.colab import files

    pictures = {name: ImageOps.exif_transpose(Image.open(io.BytesIO(data))) for name, data in files.upload().items()}
elif SMALL:  # what the small network knows: a three and an eight
    grey = (datasets.load_digits().images * (255 / 16)).astype("uint8")
    pictures = {"three": Image.fromarray(grey[3]), "eight": Image.fromarray(grey[8])}
else:
    pictures = {name: Image.fromarray(datasets.load_sample_image(f"{name}.jpg")) for name in ("flower", "china")}

# %% [markdown]
# `apply_with_gates` returns the logits and the gates of every squeeze-and-excitation layer.

# %%
import jax
import numpy as np

from se_flax.analysis.gates import apply_with_gates

images = loaded.preprocess(list(pictures.values()))  # float32 [N, side, side, 3]
logits, gates = jax.jit(lambda variables, x: apply_with_gates(loaded.model, variables, x))(loaded.variables, images)

for name, probabilities in zip(pictures, jax.nn.softmax(logits), strict=True):
    print(name)
    for k in np.argsort(-probabilities)[:5]:
        print(f"  {100 * probabilities[k]:5.1f} %  {loaded.labels[k] if loaded.labels else k}")

# %% [markdown]
# ## Gates
#
# A layer multiplies each channel by a gate between 0 and 1, computed from the means of all channels. Each line below is
# one image; channels are sorted by the gates of the first. Where the lines coincide, the layer treats all images alike,
# which the paper (section 7.2) finds for early layers.

# %%
import matplotlib.pyplot as plt
from IPython.display import Image as Display
from IPython.display import display

layers = jax.tree.map(np.asarray, gates)
names = list(layers)
chosen = [names[0], names[len(names) // 2], names[-1]]
figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), sharey=True, layout="constrained")
for ax, layer in zip(axes, chosen, strict=True):
    order = np.argsort(layers[layer][0])
    for picture, gate in zip(pictures, layers[layer], strict=True):
        ax.plot(gate[order], lw=1.2, alpha=0.8, label=picture)
    ax.set(title=f"{layer}: {gate.size} channels", xlabel="channel, sorted", ylim=(0, 1))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("gate")
axes[0].legend(frameon=False)
figure.savefig("gates.png", dpi=110)
plt.close(figure)
display(Display("gates.png"))

# %% [markdown]
# All layers: the mean gate, and the standard deviation over the images.

# %%
figure, ax = plt.subplots(figsize=(10, 3), layout="constrained")
ax.plot([layers[name].mean() for name in names], "o-", ms=4, label="mean gate")
ax.plot([layers[name].std(axis=0).mean() for name in names], "s-", ms=4, label="deviation between the pictures")
ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
ax.set_ylim(0, 1)
ax.grid(alpha=0.25)
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
figure.savefig("layers.png", dpi=110)
plt.close(figure)
display(Display("layers.png"))

# %% [markdown]
# `se-flax gates REF FOLDER` analyses a data set in class folders, and the accuracy without each layer's gates.
