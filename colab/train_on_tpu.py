# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     provenance: []
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a squeeze-and-excitation network on a TPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/se-flax/se-flax/blob/main/colab/train_on_tpu.ipynb)
#
# Choose *Runtime > Change runtime type > v5e-1 TPU* and run all cells. A GPU or CPU works too.

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
        [sys.executable, "-m", "pip", "install", "--quiet", "--editable", f"./se-flax[train,gcs{extra}]"], check=True
    )
sys.path.insert(0, os.path.abspath("se-flax"))

# %%
import jax

print(f"JAX {jax.__version__} computes on", jax.devices())
if extra and jax.default_backend() == "cpu":
    print("JAX does not see the accelerator: restart the session (menu Runtime) and run the cells again.")

# %% [markdown]
# ## Data
#
# `DATA` is one of
# - a folder with one folder of images per class: `photos/daisy/*.jpg`, `photos/rose/*.jpg`. A tenth is held out. Copy
#   it from Drive to this machine first: Drive is slow for small files.
# - `tfds:<name>`, a prepared TensorFlow data set ([how to prepare
#   one](https://github.com/se-flax/se-flax/blob/main/docs/data.md)).
# - empty: 1,797 handwritten digits, which the next cell writes into class folders.

# %%
DATA = ""  # @param {type: "string"}

if not DATA:
    import numpy as np
    from PIL import Image as Picture
    from sklearn.datasets import load_digits

    written = load_digits()
    for i, (grey, label) in enumerate(zip(written.images, written.target, strict=True)):
        os.makedirs(f"digits/{label}", exist_ok=True)
        Picture.fromarray(np.round(grey * (255 / 16)).astype(np.uint8)).save(f"digits/{label}/{i:04}.png")
    print(sorted(os.listdir("digits")), len(os.listdir("digits/0")), "pictures of a zero")

# %% [markdown]
# ## Settings
#
# `configs/digits.py` and `configs/folder.py` give the settings; change any of them before the run. With
# `precision = "bfloat16"`, parameters, gates and logits stay `float32`.

# %%
from configs import digits, folder

if DATA:
    config = folder.get_config("seresnet18")
    config.data.source = DATA if DATA.startswith("tfds:") else f"folder:{DATA}"
else:
    config = digits.get_config()  # SE-ResNet-20, 24 epochs
    config.data.source, config.data.eval_fraction = "folder:digits", 0.2
config.precision = "bfloat16" if extra else "float32"

if SMALL:  # thirty steps on 8 x 8 pixels
    config.data.image_size, config.data.batch_size = 8, 48
    config.augment.pad, config.augment.mixup, config.optim.ema_decay, config.optim.warmup_epochs = 0, 0, 0, 0
    config.steps, config.eval_every_epochs, config.checkpoint.every_steps, config.log_every_steps = 30, 0.5, 10, 2
    config.compilation_cache = ""
print(config.model, config.data, config.optim, sep="\n")

# %% [markdown]
# ## Work directory
#
# Colab ends its machines after some hours. To resume on another one, keep the work directory:
# - `drive`: on your Google Drive.
# - `bucket`: in Google Cloud Storage, which any machine reaches.
# - `here`: lost with the machine.

# %%
KEEP = "drive"  # @param ["drive", "bucket", "here"]
BUCKET = "gs://your-bucket/se-flax/run"  # @param {type: "string"}
NAME = "digits"  # @param {type: "string"}

WORKDIR = f"runs/{NAME}"
if KEEP == "drive" and IN_COLAB:
    from google.colab import drive

    drive.mount("/content/drive")
    WORKDIR = f"/content/drive/MyDrive/se-flax/{NAME}"
if KEEP == "bucket":
    WORKDIR = BUCKET
    if IN_COLAB:
        from google.colab import auth

        auth.authenticate_user()

# %% [markdown]
# ## Train
#
# The first step compiles for a minute or two. **Resume**: interrupt the cell, and the run saves a checkpoint and stops;
# run it again, and it resumes bit for bit, data order included. On a new machine, run all cells again. For a longer run
# raise `config.epochs`; for another run choose another `NAME`.

# %%
from train.run.loop import run

outcome = run(config, WORKDIR)
print(outcome)
assert outcome.completed, "not finished: run this cell again to go on"

# %% [markdown]
# ## Curves
#
# Blue: training batches, with augmentation and smoothed labels, which raise the loss. Orange: all held-out images. The
# figures are in `metrics.jsonl`, and for TensorBoard in `events/`.

# %%
from etils import epath
from IPython.display import Image, display

display(Image((epath.Path(WORKDIR) / "curves.png").read_bytes()))

# %% [markdown]
# ## Load the result
#
# A finished run is a checkpoint: network, weights, preprocessing and class names.

# %%
import se_flax

loaded = se_flax.load_pretrained(WORKDIR)
print(loaded.name, loaded.labels, loaded.provenance["evaluation"])
if not DATA:
    logits = jax.jit(loaded.model.apply)(loaded.variables, loaded.preprocess("digits/0/0000.png"))
    print("a zero is taken for a", loaded.labels[int(logits.argmax())])

# %% [markdown]
# Next: [plot its gates](https://colab.research.google.com/github/se-flax/se-flax/blob/main/colab/restore.ipynb).
