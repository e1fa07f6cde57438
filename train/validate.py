"""Checks a whole configuration before anything is read or compiled."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from se_flax.errors import UserError
from se_flax.images.class_folders import canonical
from se_flax.images.preprocess import Preprocess
from train.build import build_model
from train.config import CHECKPOINT, IMAGENET_MEAN, IMAGENET_STD, NETWORK, Config
from train.data import augment
from train.data.sources import ImageData
from train.optim.optimizers import Updates
from train.run import tta
from train.run.init import TracedNetwork, trace
from train.run.parallel import Replicas


@dataclass(frozen=True)
class Checked:
    """What checking a run's settings made, for the run to go on with: nothing is checked, built or traced again.

    Attributes:
      images: the data.
      updates: the optimizer and its schedule.
      network: the network, traced; None where `init_from` has yet to name it.
      name: of the network.
      num_classes: that it was traced with.
    """

    images: ImageData
    updates: Updates
    network: TracedNetwork | None
    name: str
    num_classes: int

    def network_of(self, name: str, num_classes: int) -> TracedNetwork | None:
        """The network, if it is this one: a run that is continued may have another name, and data other classes."""
        return self.network if (self.name, self.num_classes) == (name, num_classes) else None


def check_settings_of_run(config: Config, count: Callable[[ImageData], int] | None = None) -> Checked:
    """Checks what can be checked without data or devices.

    Args:
      config: the settings.
      count: how many classes the data has, where the settings leave that open; 0 or None traces the network with one.

    Returns:
      What the checks made.

    Raises:
      UserError: the first thing that is wrong.
    """
    for name in ("epochs", "eval_every_epochs"):
        value = getattr(config, name)
        may_be_zero = name == "epochs" and config.optim.fit_head
        if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
            zero = ", or 0 with optim.fit_head, whose classifier is then all that is trained"
            raise UserError(f"got {name}={value}; it must be positive{zero if name == 'epochs' else ''}")
    positive = {
        "data.batch_size": config.data.batch_size,
        "log_every_steps": config.log_every_steps,
        "checkpoint.keep_last": config.checkpoint.keep_last,
    }
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"got {name}={value}; it must be at least 1")
    not_negative = {
        "steps": config.steps,
        "model.num_classes": config.model.num_classes,
        "data.eval_batch_size": config.data.eval_batch_size,
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.every_epochs": config.checkpoint.every_epochs,
    }
    for name, value in not_negative.items():
        if value < 0:
            raise UserError(f"got {name}={value}; it must not be negative")
    for name, pixel in {"mean": config.data.mean, "std": config.data.std}.items():
        if pixel and (len(pixel) != 3 or (name == "std" and min(pixel) <= 0)):
            raise UserError(f"got data.{name}={pixel}; three numbers (red, green, blue) are expected, std positive")
    try:  # what a finished run is saved with must be good before it begins
        Preprocess(mean=config.data.mean or IMAGENET_MEAN, std=config.data.std or IMAGENET_STD)
    except UserError as error:
        raise UserError(f"data.mean and data.std cannot be used: {error}") from error
    for name, value in {"drop_rate": config.model.drop_rate, "drop_path_rate": config.model.drop_path_rate}.items():
        if not 0.0 <= value < 1.0:
            raise UserError(f"got model.{name}={value}; a probability below 1 is allowed")
    updates = Updates(config.optim)
    augment.check(config.augment, config.data.image_size)
    images = ImageData(config.data)
    tta.check(config.eval_tta)
    _check_frozen(config)
    name = config.model.name or ("" if config.init_from else NETWORK)
    if not name:
        return Checked(images, updates, None, name, 0)
    # Tracing asks every module whether its attributes make sense, and takes no more than a second.
    named = dataclasses.replace(config, model=dataclasses.replace(config.model, name=name))
    classes = config.model.num_classes or (count(images) if count else 0) or 1
    network = trace(build_model(named, classes), config.data.image_size)
    return Checked(images, updates, network, name, classes)


def check_start(config: Config) -> None:
    """Checks that a recipe for going on from a checkpoint was given one.

    Raises:
      UserError: it was not; training would start from random weights, at a rate that is made for trained ones.
    """
    if config.init_from == CHECKPOINT:
        raise UserError(
            "this recipe goes on from a checkpoint, and none is named; give one, such as "
            "--config.init_from=seresnet50.ra2_in1k or the path of a folder or file"
        )


def _check_frozen(config: Config) -> None:
    frozen = {"train_only": bool(config.optim.train_only), "freeze_batch_norm": config.optim.freeze_batch_norm}
    for name, given in frozen.items():
        if given and not config.init_from:
            raise UserError(
                f"got optim.{name}={getattr(config.optim, name)!r} without init_from, which would freeze random "
                "weights; name a checkpoint to start from, or train everything"
            )
    if config.optim.fit_head and not config.init_from:
        raise UserError(
            "got optim.fit_head=True without init_from, which would fit the classifier to features of random weights; "
            "name a checkpoint to start from, or leave it out"
        )
    if config.optim.fit_head and config.loss.name != "cross_entropy":
        raise UserError(
            f"got optim.fit_head=True with loss.name={config.loss.name!r}, whose classifier takes cosines; it fits "
            "classifiers for cross_entropy only: leave one of the two out"
        )
    if config.optim.whiten_stem and config.init_from:
        raise UserError(
            f"got optim.whiten_stem=True with init_from={config.init_from!r}, whose first convolution it would "
            "replace; leave one of the two out"
        )


def check_classes(config: Config, class_names: tuple[str, ...], source: str) -> int:
    """The number of classes of a run.

    Args:
      config: the settings.
      class_names: of the data.
      source: of the data, for the message.

    Returns:
      The number of classes.

    Raises:
      UserError: the settings contradict the data.
    """
    asked, found = config.model.num_classes, len(class_names)
    if asked and asked != found:
        raise UserError(
            f"got model.num_classes={asked}, but {source} has {found} classes; "
            f"set it to {found}, or to 0 to take the data's"
        )
    return found


def check_same_classes(saved: Sequence[str], class_names: Sequence[str], workdir: str) -> None:
    """Refuses to continue a run on data whose classes have other names or another order.

    Args:
      saved: names of the checkpoint's classes.
      class_names: of the data now.
      workdir: where the checkpoint lies, for the message.

    Raises:
      UserError: they differ, so that the network's answers would mean other classes than it learned.
    """
    there, here = [canonical(name) for name in saved], [canonical(name) for name in class_names]
    if there != here:
        first = next((i for i, pair in enumerate(zip(there, here, strict=False)) if pair[0] != pair[1]), None)
        if first is None:
            text = f"{len(there)} classes there and {len(here)} here"
        else:
            text = f"class {first} is {there[first]!r} there and {here[first]!r} here"
        raise UserError(
            f"{workdir} holds the checkpoint of a run on other classes ({text}); use another --workdir, or the class "
            "folders of that run"
        )


def check_batch(config: Config, replicas: Replicas) -> None:
    """Checks that the batch can be spread over the devices.

    Raises:
      UserError: it does not divide into equal micro-batches, or mixing would need an even number.
    """
    parts = replicas.count * config.optim.accumulate
    size = config.data.batch_size
    if size % parts:
        raise UserError(
            f"data.batch_size={size} does not divide into {parts} equal parts ({replicas.count} devices x "
            f"optim.accumulate={config.optim.accumulate}); choose a multiple of {parts}"
        )
    augment.check_pairs(config.augment, size // parts)
