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
# # Fine-tune on your own images
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/se-flax/se-flax/blob/main/colab/finetune.ipynb)
#
# Minutes on a T4 GPU or a v5e-1 TPU. A CPU is enough to train the classifier only.

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
# ## Images
#
# One folder per class: `photos/daisy/*.jpg`, `photos/rose/*.jpg`. A tenth of each class is held out. `PHOTOS` is the
# path of the folder or of a `.zip` of it (on Drive: `/content/drive/MyDrive/photos.zip`, after mounting Drive).
#
# If it is empty, the next cell cuts 400 overlapping tiles out of two photographs. The held-out tiles are then not new
# images: the accuracy means nothing.

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
# ## Checkpoint
#
# `REF` is anything that `se_flax.load_pretrained` takes. It gives the network, mean, std and interpolation; the
# classifier is new. (With `SE_FLAX_SMALL=1`, for tests without internet, it is a small random network.)

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
# `HEAD_ONLY` trains the classifier on a frozen backbone: fast, and good for few images. Otherwise everything is
# trained, with a learning rate that decreases towards the first layers (`layer_decay`).

# %%
HEAD_ONLY = True  # @param {type: "boolean"}

from configs import folder

config = folder.get_config("finetune")  # a fitted classifier, then 4 epochs at 224 pixels
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
# If the cell is interrupted, run it again to resume. To keep the run when the machine is gone, put `WORKDIR` on Drive,
# as in [the training
# notebook](https://colab.research.google.com/github/se-flax/se-flax/blob/main/colab/train_on_tpu.ipynb).

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
# ## Predictions
#
# The finished run is a checkpoint. Below are its predictions for sixteen held-out images; wrong ones are red.

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
# `loaded.save("my-model")` writes network, weights, preprocessing and class names to a folder; `se-flax predict
# my-model cat.jpg` uses it; `se-flax convert my-model model.safetensors` converts it for PyTorch.
