"""What a run needs before its first step: checked settings, data, devices, network, weights and earlier checkpoints."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from train.build import training_loss
from train.config import Config, check_same_run, flatten
from train.data.examples import sample_images
from train.data.loader import BadImages, TrainLoader, eval_batches, steps_per_epoch, train_loader
from train.data.sources import DataSplits, ImageData
from train.optim import finetune
from train.optim.param_groups import Path as ParameterPath
from train.optim.param_groups import declared, split, stem_kernel
from train.optim.whitening import IMAGES, whitening_kernel
from train.run.checkpoint import Checkpoints, Restored
from train.run.evaluate import Result, evaluate, padded_size
from train.run.feed import Feed, lives_on_devices, make_feed
from train.run.fitted_head import fitted_head
from train.run.length import length_change, total_steps
from train.run.parallel import Replicas, make_replicas
from train.run.program import Program, make_program
from train.run.progress import Progress
from train.run.report import Report, say
from train.run.stopping import Stop
from train.run.store import Store
from train.run.trainer import Trainer
from train.run.workdir import opened
from train.validate import check_batch, check_classes, check_same_classes, check_settings_of_run, check_start


@dataclass(frozen=True)
class Setup:
    """The parts of a run, before training.

    Attributes:
      config: the settings, completed.
      store: where checkpoints and figures go.
      splits: the data.
      replicas: the devices.
      checkpoints: of the work directory.
      per_epoch: updates per epoch.
      total: updates of the run.
      program: network, optimizer and steps.
      loaded: what a new run starts from (`train.optim.finetune.load`), or None.
      continued: whether the work directory has a checkpoint to go on from.
      bad: the images that could not be read.
      loader: the training batches, or their indices where the data lives on the devices.
    """

    config: Config
    store: Store
    splits: DataSplits
    replicas: Replicas
    checkpoints: Checkpoints
    per_epoch: float
    total: int
    program: Program
    loaded: Any
    continued: bool
    bad: BadImages
    loader: TrainLoader


def prepare(given: Config, workdir: str | Path, held: ExitStack) -> Setup:
    """Checks the settings and opens, reads and builds what they name.

    Args:
      given: the settings; what they leave open is taken from the checkpoint that the run goes on or starts from.
      workdir: where checkpoints and figures go.
      held: gets the work directory's lock; the caller closes it when the run is over.

    Returns:
      The parts of the run.

    Raises:
      UserError: settings, data or work directory are not usable, or another run uses the work directory.
    """
    checked = check_settings_of_run(given, ImageData.count_classes)
    check_start(given)
    store = held.enter_context(opened(workdir))
    splits = checked.images.open()
    num_classes = check_classes(given, splits.class_names, given.data.source)
    replicas = make_replicas(given.parallel.backend, given.parallel.devices)
    check_batch(given, replicas)

    checkpoints = Checkpoints(store, keep_last=given.checkpoint.keep_last, keep_best=given.checkpoint.keep_best)
    saved = checkpoints.newest_run()
    # A run that is continued has its weights in the checkpoint: what it once started from need not be there any more.
    loaded = finetune.load(given, num_classes) if given.init_from and saved is None else None
    config = finetune.complete(given, saved["config"] if saved else None, loaded)
    if saved is not None:
        check_same_run(saved["config"], config, str(workdir))
        check_same_classes(saved["class_names"], splits.class_names, str(workdir))

    per_epoch = steps_per_epoch(len(splits.train), config.data.batch_size)
    total = total_steps(config.steps, config.epochs, per_epoch)
    network = checked.network_of(config.model.name, num_classes)
    program = make_program(config, num_classes, per_epoch, total, updates=checked.updates, network=network)
    if loaded is not None:
        finetune.check_fit(config, program.network.model, program.network.shapes, loaded)
    bad = BadImages(splits, config.data)
    on_devices = lives_on_devices(config.data, splits, replicas, total / per_epoch)
    loader = train_loader(splits, config.data, seed=config.seed, bad=bad, indices=on_devices)
    continued = saved is not None
    return Setup(
        config, store, splits, replicas, checkpoints, per_epoch, total, program, loaded, continued, bad, loader
    )


def make_trainer(setup: Setup) -> tuple[Trainer, Restored | None]:
    """Puts the state on the devices, that of the newest whole checkpoint if there is one, and starts the report.

    Args:
      setup: from `prepare`.

    Returns:
      The trainer, and the checkpoint that it goes on from.

    Raises:
      UserError: there are checkpoints, and none is whole, or the data is not that of the run.
    """
    config, program, replicas, checkpoints = setup.config, setup.program, setup.replicas, setup.checkpoints
    state = replicas.replicate(program.init(variables=_variables(setup), given=_whitened(setup) | _fitted(setup)))
    restored = checkpoints.restore(state)
    if restored is not None:
        state = restored.state
        setup.loader.set_state(restored.data)
    step, run = (restored.step, restored.run) if restored else (0, {})
    progress = Progress.of(run)
    report = Report(
        setup.store.folder,
        setup.total,
        config.data.batch_size,
        step,
        # A new run may find figures of one that was killed before its first checkpoint.
        unrecorded=progress.unrecorded() if restored else ["epoch"],
        training_loss=training_loss(config),
        primary=jax.process_index() == 0,
    )
    feed = Feed(setup.loader)
    if setup.loader.indices and step < setup.total:  # a finished run is only evaluated
        report.say(f"reading {len(setup.splits.train):,} images, which stay on the device ...")
        feed = make_feed(setup.loader, setup.splits, config.data, replicas, setup.bad)
    trainer = Trainer(
        config=config,
        workdir=setup.store.folder,
        replicas=replicas,
        feed=feed,
        train_step=feed.spread(program.train_step, replicas, config.data.image_size),
        evaluation=partial(_evaluate, setup, replicas.spread(program.eval_step), []),
        checkpoints=checkpoints,
        report=report,
        run_info={"config": flatten(config), "class_names": list(setup.splits.class_names)},
        total=setup.total,
        per_epoch=setup.per_epoch,
        state=state,
        step=step,
        progress=progress,
        saved=(step, progress.due) if restored else None,
    )
    return trainer, restored


def _variables(setup: Setup) -> Any:
    """What the state is made with: None draws them."""
    if setup.continued:  # a checkpoint fills them in
        return setup.program.network.zeros()
    return None if setup.loaded is None else finetune.as_arrays(setup.loaded.variables)


def _whitened(setup: Setup) -> dict[ParameterPath, np.ndarray]:
    """The kernel that `optim.whiten_stem` makes from training images, by its path."""
    data, network = setup.config.data, setup.program.network
    if setup.continued or not setup.config.optim.whiten_stem:
        return {}
    images = sample_images(setup.splits.train, data, IMAGES) / np.float32(255)
    path = stem_kernel(network.model)
    shape = flatten_dict(network.shapes["params"])[path].shape
    return {path: whitening_kernel((images - np.asarray(data.mean)) / np.asarray(data.std), shape)}


def _fitted(setup: Setup) -> dict[ParameterPath, np.ndarray]:
    """The classifier that `optim.fit_head` makes from training images, by its paths."""
    if setup.continued or not setup.config.optim.fit_head:
        return {}
    model = declared(setup.program.network.model, "optim.fit_head")
    variables = finetune.as_arrays(setup.loaded.variables)
    quiet = jax.process_index() != 0
    return fitted_head(model, variables, setup.splits, setup.config.data, (lambda text: None) if quiet else say)


def _evaluate(setup: Setup, step: Any, kept: list[Any], variables: Any, stop: Stop) -> Result:
    """Evaluates variables on the whole held-out split, which stays in `kept` where the data lives on the devices."""
    data = setup.config.data
    size = padded_size(data.eval_batch_size or data.batch_size, setup.replicas.count)
    batches = kept or map(setup.replicas.shard, eval_batches(setup.splits, data, batch_size=size, bad=setup.bad))
    if setup.loader.indices:
        with stop.waiting():
            batches = kept[:] = list(batches)
    return evaluate(step, variables, batches, len(setup.splits.class_names), stop)


def introduction(setup: Setup) -> Iterator[str]:
    """What a person wants to know before anything is computed."""
    config, replicas, splits, loaded = setup.config, setup.replicas, setup.splits, setup.loaded
    shapes = setup.program.network.shapes["params"]
    params = sum(x.size for x in jax.tree.leaves(shapes))
    sizes = f"{len(splits.train):,} + {len(splits.eval):,} images"
    yield f"{config.model.name}: {params:,} parameters; {config.data.source}: {sizes}"
    kind = replicas.devices[0].device_kind
    yield (
        f"{setup.total:,} steps of {config.data.batch_size} images on {replicas.count} x {kind} "
        f"({replicas.backend}, {config.precision})"
    )
    if (hosts := jax.process_count()) > 1:
        seconds = config.parallel.heartbeat_seconds
        yield (
            f"{hosts} hosts; if one is lost, the others end within {seconds} s (JAX says that a task died), and the "
            "same command on all hosts resumes from the last checkpoint"
        )
    if frozen := setup.program.frozen.params:
        trained = sum(x.size for x in jax.tree.leaves(split(shapes, frozen)[0]))
        yield f"training {trained:,} of the {params:,} parameters"
    if loaded is not None:
        yield from finetune.describe(config, loaded)
        yield from finetune.describe_classes(loaded, splits.class_names)


def continuation(setup: Setup, restored: Restored) -> Iterator[str]:
    """What a person wants to know of the checkpoint that a run goes on from."""
    yield from restored.lines()
    before, updates = restored.run["config"], setup.program.updates
    if change := length_change(before, setup.config, updates, setup.per_epoch, restored.step):
        yield change
