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
# # Fine-tune on your own pictures
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/se-flax/se-flax/blob/main/colab/finetune.ipynb)
#
# A T4 GPU or a v5e-1 TPU takes minutes; a CPU does for the classifier alone.

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
extra = "[tpu]" if tpu else "[cuda]" if shutil.which("nvidia-smi") else ""
if importlib.util.find_spec("se_flax") is None:
    if not os.path.exists("se-flax"):
        subprocess.run(["git", "clone", "--depth=1", "https://github.com/se-flax/se-flax"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--editable", f"./se-flax{extra}"], check=True)
sys.path.insert(0, os.path.abspath("se-flax"))

# %% [markdown]
# ## Pictures
#
# One folder per class: `photos/daisy/*.jpg`, `photos/rose/*.jpg`. A tenth of each class is held out. `PHOTOS` is the
# path of such a folder, or of a `.zip` of one (on Drive: `/content/drive/MyDrive/photos.zip`, after mounting it at the
# left).
#
# Left empty, the next cell cuts 400 tiles out of two photographs, a temple and a flower. The tiles of a photograph
# overlap, so what is held out here is not new: it shows the way, not an accuracy.

# %%
PHOTOS = ""  # @param {type: "string"}

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from se_flax.images.class_folders import pictures_by_class

if PHOTOS.endswith(".zip"):
    shutil.unpack_archive(PHOTOS, "photos")
    PHOTOS = "photos"
if not PHOTOS:
    PHOTOS, side = "tiles", 96
    corners = np.random.default_rng(0)
    for name in ("china", "flower"):
        photograph = load_sample_image(f"{name}.jpg")  # uint8 [427, 640, 3]
        Path(PHOTOS, name).mkdir(parents=True, exist_ok=True)
        for i in range(200):
            y, x = corners.integers(0, 427 - side), corners.integers(0, 640 - side)
            Image.fromarray(photograph[y : y + side, x : x + side]).save(Path(PHOTOS, name, f"{i:03}.png"))
print({name: len(pictures) for name, pictures in pictures_by_class(PHOTOS).items()})

# %% [markdown]
# ## From which weights?
#
# `REF` is anything that `se_flax.load_pretrained` takes. The network, and the mean, deviation and interpolation that
# its pictures had, come with it; the classifier is drawn anew for your classes.
#
# The tests have no network: with `SE_FLAX_SMALL=1` the start is a small network with random weights, saved by
# `save_pretrained`.

# %%
REF = "seresnet50.ra2_in1k"  # @param {type: "string"}

if SMALL:
    import jax

    import se_flax

    small = se_flax.create_model("seresnet20")
    start = jax.jit(small.init)(jax.random.key(0, impl="rbg"), np.zeros((1, 16, 16, 3), np.float32))
    prepare = se_flax.Preprocess(image_size=32, crop=1.0)
    se_flax.save_pretrained("start", "seresnet20", start, preprocess=prepare, overwrite=True)
    REF = "start"

# %% [markdown]
# ## Settings
#
# `HEAD_ONLY` trains the classifier on a backbone that stays as it is: quick, and good with few pictures. Otherwise
# everything is trained, at a low rate that falls further towards the first layers (`layer_decay`).

# %%
HEAD_ONLY = True  # @param {type: "boolean"}

from configs import folder

config = folder.get_config("finetune")  # 10 epochs at 224 pixels
config.init_from, config.data.source = REF, f"folder:{PHOTOS}"
config.precision = "bfloat16" if extra else "float32"
if HEAD_ONLY:
    config.optim.train_only, config.optim.learning_rate = "head", 0.1
else:
    config.optim.layer_decay = 0.8
if SMALL:
    config.data.image_size, config.data.batch_size, config.data.train_crop = 16, 40, "resize"
    config.optim.learning_rate = 0.5
    config.epochs, config.optim.warmup_epochs, config.log_every_steps, config.compilation_cache = 3, 0, 1, ""

# %% [markdown]
# ## Train
#
# The folder of the run holds checkpoints: interrupt the cell, run it again, and it goes on. Put it on Drive, as [the
# notebook on training](https://colab.research.google.com/github/se-flax/se-flax/blob/main/colab/train_on_tpu.ipynb)
# does, and it outlives the machine.

# %%
from IPython.display import Image as Display
from IPython.display import display

from train.run.loop import run

WORKDIR = Path("runs/finetuned")
outcome = run(config, WORKDIR)
print(outcome)
assert outcome.completed, "not finished: run this cell again to go on"
display(Display(str(WORKDIR / "curves.png")))

# %% [markdown]
# ## Look at what it does
#
# The finished run is a checkpoint. Below are sixteen of the pictures that were held out, with the answers; wrong ones
# are red. Look at those before you believe a figure.

# %%
import jax
import matplotlib.pyplot as plt

import se_flax
from train.data.sources import open_data

loaded = se_flax.load_pretrained(WORKDIR)
held_out = open_data(config.data).eval
chosen = np.random.default_rng(1).permutation(len(held_out))[:16]
paths = [held_out.name(i) for i in chosen]
logits = np.asarray(jax.jit(loaded.model.apply)(loaded.variables, loaded.preprocess(paths)))

figure, axes = plt.subplots(2, 8, figsize=(12, 3.6), layout="constrained")
for ax, i, path, row in zip(axes.flat, chosen, paths, logits, strict=False):
    answer = row.argmax()
    ax.imshow(ImageOps.exif_transpose(Image.open(path)))
    ax.set_title(loaded.labels[answer], fontsize=9, color="black" if answer == held_out[i]["label"] else "red")
for ax in axes.flat:
    ax.axis("off")
figure.savefig("answers.png", dpi=110)
plt.close(figure)
display(Display("answers.png"))

# %% [markdown]
# Take it away: `loaded.save("my-model")` writes one folder with network, weights, preprocessing and names of the
# classes; `se-flax convert my-model model.safetensors` writes it for PyTorch; `se-flax predict my-model cat.jpg` uses
# it.
