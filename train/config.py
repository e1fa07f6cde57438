"""The settings of a training run: plain typed data, validated once, before anything is compiled.

A recipe (`configs/<name>.py`) builds a `Config` in `get_config()`; the command line overrides single fields
(`--config.optim.learning_rate=0.1`). What puts a run together takes the whole of it: the modules of `train` itself,
`train.optim.finetune`, and in `train.run` `loop`, `setup`, `trainer`, `program`, `length` and `save_model`. Every other
module takes one section, or plain values; a test keeps it so.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from se_flax.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATION = "bilinear"
NETWORK = "seresnet18"
CHECKPOINT = "<checkpoint>"  # stands in `init_from` of a recipe that makes no sense without one


@dataclass
class Attention:
    """Which attention the network carries, and where. `kind="default"` keeps what the architecture's name says."""

    kind: str = "default"  # default | none | se | eca | cbam | ese | scse | gc
    placement: str = "standard"  # standard | pre | post | identity | 3x3
    stages: tuple[int, ...] = ()  # the paper's numbers (2 = conv2_x ...); empty: every stage
    reduction: float = 16.0  # se, cbam, scse: hidden width = channels / reduction
    squeeze: str = "mean"  # se: mean | max | none
    gate: str = "sigmoid"  # se: sigmoid | tanh | relu | hard_sigmoid
    bias: bool = True  # se: biases in both layers
    kernel_size: int = 0  # eca: 0 takes the paper's rule


@dataclass
class Model:
    """The network."""

    name: str = ""  # empty: the network of init_from, or seresnet18
    num_classes: int = 0  # 0: as many as the data has
    drop_rate: float = 0.0  # dropout before the classifier; 0: the network's own (VGG 0.5, SENet-154 0.2)
    drop_path_rate: float = 0.0  # stochastic depth of the last block; earlier blocks proportionally less
    attention: Attention = field(default_factory=Attention)


@dataclass
class Data:
    """Where images come from and how the host prepares them (uint8; the rest happens on the accelerator)."""

    source: str = "digits"  # digits | folder:<path> | tfds:<name>
    data_dir: str = ""  # tfds: where the prepared data sets lie (a bucket works); empty: TFDS's default
    train_split: str = ""  # empty: the source's own ("train")
    eval_split: str = ""  # empty: the source's own ("test", "validation" or "val")
    eval_fraction: float = 0.1  # one folder without a train/val pair: this share is held out ...
    split_seed: int = 0  # ... by this seed
    bad_images: str = "error"  # error | skip (an unreadable image is replaced, counted and named at the end)
    image_size: int = 32
    train_crop: str = "resize"  # resize | random_resized (Inception's crop) | center
    crop_scale: tuple[float, ...] = (0.08, 1.0)  # random_resized: share of the area
    crop_ratio: tuple[float, ...] = (0.75, 4.0 / 3.0)  # random_resized: aspect
    eval_crop_fraction: float = (
        1.0  # centre crop of image_size out of a short side image_size / fraction; 1: plain resize
    )
    interpolation: str = ""  # bilinear | bicubic; empty: that of init_from, or bilinear
    exif_orientation: bool = True  # turn images as their EXIF data say; False: as they are stored (torchvision, timm)
    batch_size: int = 128  # global: over all devices and hosts
    eval_batch_size: int = 0  # 0: batch_size
    workers: int = 0  # processes that decode; 0: in this process, with threads
    place: str = "auto"  # host | device (decoded once, kept there) | auto: an accelerator, if they fit
    mean: tuple[float, ...] = ()  # of images in [0, 1], red, green, blue; empty: that of init_from, or ImageNet's
    std: tuple[float, ...] = ()  # likewise


@dataclass
class Augment:
    """Augmentation inside the jitted step; everything off by default."""

    flip: bool = False  # horizontal, half of the images
    alternate_flip: bool = False  # with flip: every image in every other epoch, from a random start, not by chance
    pad: int = 0  # pad by this many pixels and crop back at random
    pad_mode: str = "constant"  # constant (data.mean) | reflect
    brightness: float = 0.0  # colour jitter: factor uniform in [1 - b, 1 + b]
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # shift uniform in [-h, h] turns
    randaugment_layers: int = 0  # operations per image; 0: off
    randaugment_magnitude: float = 9.0  # 0 ... 10
    erase: float = 0.0  # random erasing: probability
    cutout: int = 0  # side of a zeroed square in pixels; 0: off
    mixup: float = 0.0  # alpha of the Beta distribution; 0: off
    cutmix: float = 0.0  # alpha; with both, each pair of images draws one of the two


@dataclass
class Optim:
    """Optimizer, schedule and what surrounds the update."""

    name: str = "sgd"  # sgd | adamw | lamb | rmsprop | muon
    learning_rate: float = 0.1  # at batch_size, not rescaled
    schedule: str = "cosine"  # constant | step | cosine | exponential | triangular
    warmup_epochs: float = 0.0  # linear, from zero
    boundaries: tuple[float, ...] = ()  # step: epochs at which the rate is multiplied by decay_factor
    decay_factor: float = 0.1  # step, exponential
    decay_every_epochs: float = 2.4  # exponential: one factor per this many epochs, in a staircase
    first_learning_rate: float = 0.0  # triangular: where it starts
    peak: float = 0.25  # triangular: share of the run at which it reaches learning_rate
    final_learning_rate: float = 0.0  # cosine, triangular: where it ends
    momentum: float = 0.9  # sgd, rmsprop, muon
    nesterov: bool = True  # sgd, muon
    b1: float = 0.9  # adamw, lamb
    b2: float = 0.999  # adamw, lamb
    eps: float = 1e-8  # adamw, lamb, rmsprop (rmsprop: inside the root, as TensorFlow has it)
    rmsprop_decay: float = 0.9
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool = False  # False: kernels only
    clip_norm: float = 0.0  # global norm of the gradient; 0: off
    non_finite: str = "stop"  # loss or gradient: stop | skip (the update) | rollback (to a checkpoint, with new data)
    accumulate: int = 1  # micro-batches per update
    ema_decay: float = 0.0  # moving average of parameters and batch statistics; 0: off
    label_smoothing: float = 0.0
    fit_head: bool = False  # with init_from: the classifier starts fitted to the features of the training images
    train_only: str = ""  # head: the classifier alone, on a backbone in evaluation mode; empty: every parameter
    freeze_batch_norm: bool = False  # keep statistics, scale and bias of the batch norms
    layer_decay: float = 1.0  # rate of a layer = learning_rate * layer_decay ** (blocks above it, the head's included)
    backbone_multiplier: float = 1.0  # times the rate of everything below the head
    norm_bias_multiplier: float = 1.0  # times the rate of the biases of batch norms
    whiten_stem: bool = False  # the first convolution whitens patches of training images, and is not trained


@dataclass
class Loss:
    """What training minimises; `arcface` and `cosface` give the network a classifier of scaled cosines."""

    name: str = "cross_entropy"  # cross_entropy | arcface | cosface
    margin: float = -1.0  # arcface: radians; cosface: of the cosine; below 0: 0.5 and 0.4
    scale: float = 64.0  # arcface, cosface: what the cosines are multiplied by


@dataclass
class Parallel:
    """How the per-replica step is spread over devices."""

    backend: str = "shard_map"  # shard_map | pmap
    batch_norm: str = "replica"  # replica | global: whose statistics normalise a batch
    devices: int = 0  # 0: all
    distributed: bool = False  # several hosts: jax.distributed.initialize() before anything else
    heartbeat_seconds: int = 30  # several hosts: one that is silent for this long is lost, and the others end


@dataclass
class Checkpoint:
    """When state is written and what is kept."""

    every_epochs: float = 1.0
    every_steps: int = 0  # overrides every_epochs when > 0
    keep_last: int = 2  # newest ones; two are kept at least
    keep_best: int = 1  # by evaluation top-1


class Settings:
    """Base of what a recipe may return; `train.cli` reads from it which program to start."""

    program: ClassVar[str]
    """After `python -m`, the program whose `--help` lists the settings."""
    loop: ClassVar[str]
    """The module with `run(config, workdir)`."""


@dataclass
class Config(Settings):
    """A whole run."""

    program = "train"
    loop = "train.run.loop"

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    loss: Loss = field(default_factory=Loss)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    init_from: str = ""  # weights a new run starts from: what se_flax.load_pretrained takes; empty: random ones
    epochs: float = 10.0
    steps: int = 0  # overrides epochs when > 0
    eval_every_epochs: float = 1.0
    eval_tta: str = "none"  # none | flip | flip_shift: evaluate the mean of the logits over views of an image
    log_every_steps: int = 10
    precision: str = "float32"  # float32 | bfloat16: of the network's arithmetic; parameters stay float32
    lean: bool = False  # TPU: leave a bottleneck's widest map unwritten; less memory, more arithmetic
    seed: int = 0
    profile: bool = False  # write a profiler trace of a few steps to <workdir>/profile
    compilation_cache: str = "~/.cache/se-flax/xla"  # empty: off


# What may differ between two runs that compute the same: where and how fast they run, and what is recorded.
SAME_NUMBERS = (
    "eval_every_epochs",
    "log_every_steps",
    "profile",
    "compilation_cache",
    "checkpoint.",
    "parallel.backend",
    "parallel.devices",
    "parallel.distributed",
    "parallel.heartbeat_seconds",
    "data.workers",
    "data.eval_batch_size",
    "data.data_dir",
    "data.place",
)
# What may differ when a run is resumed: how long it lasts, too, and what follows when it diverges.
RESUMABLE = ("epochs", "steps", "optim.non_finite", *SAME_NUMBERS)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration as one level: `{"optim.learning_rate": 0.1, ...}`; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items() if not isinstance(config, dict) else config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def changed_settings(
    saved: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...] = RESUMABLE, kind: type = Config
) -> list[str]:
    """Settings that make two runs different ones, in words.

    Args:
      saved: flattened settings of a run. Settings that were added to the program later have their defaults.
      now: flattened settings of another run.
      free: settings, or beginnings of their names, that may differ.
      kind: class of the settings.
    """
    defaults = flatten(kind())
    saved, now = {**defaults, **saved}, {**defaults, **now}
    return [
        f"{key}={saved.get(key)!r} there and {now.get(key)!r} here"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and not key.startswith(free)
    ]


def check_same_run(saved: dict[str, Any], config: Any, workdir: str) -> None:
    """Refuses to continue a run under settings that make it another one.

    Args:
      saved: flattened settings of the checkpoint.
      config: the settings now, a dataclass.
      workdir: where the checkpoint lies, for the message.

    Raises:
      UserError: they differ in more than `RESUMABLE`.
    """
    changed = changed_settings(saved, flatten(config), kind=type(config))
    if changed:
        shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
        raise UserError(
            f"{workdir} holds the checkpoint of another run ({shown}); "
            "use another --workdir, or the settings of that run"
        )
