"""The smallest trainings that have everything, for `--config=tests/stress/recipes.py:KIND` (`get_config`)."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import train.ctr.config
from train.config import Augment, Checkpoint, Config, Data, Model, Optim, Parallel

# Saves, evaluations and records fall on the same steps and on different ones.
STEPS = 24
SAVE_EVERY = 4
ROWS = 1500
HEARTBEAT_SECONDS = 10


def images(workers: int) -> Config:
    """A VGG-like network with squeeze-and-excitation, batch norm, dropout and a moving average on digits at 16 px."""
    return Config(
        model=Model(name="se_airbench94_050", drop_rate=0.1),
        data=Data(source="digits", image_size=16, batch_size=16, eval_batch_size=90, workers=workers),
        augment=Augment(flip=True, pad=1),
        optim=Optim(learning_rate=0.05, schedule="cosine", ema_decay=0.9, label_smoothing=0.1),
        parallel=Parallel(devices=1),
        checkpoint=Checkpoint(every_steps=SAVE_EVERY, keep_last=2, keep_best=1),
        steps=STEPS,
        eval_every_epochs=6 * 16 / 1437,  # of the bundled digits' training images
        log_every_steps=3,
    )


def tables() -> train.ctr.config.Config:
    """FiBiNET with dropout on a small table (`write_table`); 24 steps in four epochs."""
    return train.ctr.config.Config(
        model=train.ctr.config.Model(name="fibinet", embedding_size=2, hidden=(4,), dropout=0.3),
        data=train.ctr.config.Data(
            numeric="I1",
            categorical="C1-C3",
            quantiles=4,
            eval_fraction=0.2,
            test_fraction=0.1,
            chunk_rows=128,
            shuffle_rows=500,
            batch_size=192,
        ),
        optim=train.ctr.config.Optim(learning_rate=0.02, patience=0),
        checkpoint=train.ctr.config.Checkpoint(every_steps=SAVE_EVERY, keep_last=2, keep_best=1),
        epochs=4,
        log_every_steps=3,
    )


def write_table(path) -> None:
    """1500 rows in which two fields that agree make a click likely."""
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 6, (3, ROWS))
    clicked = rng.random(ROWS) < np.where(a % 2 == b % 2, 0.9, 0.1)
    numbers = np.round(rng.exponential(5, ROWS), 2)
    rows = "".join(f"{int(clicked[i])},{numbers[i]},a{a[i]},b{b[i]},c{c[i]}\n" for i in range(ROWS))
    path.write_text("label,I1,C1,C2,C3\n" + rows)


def hosts() -> Config:
    """The image run over all devices of all hosts: the same figures however many there are, so without dropout."""
    config = images(workers=0)
    return dataclasses.replace(
        config,
        model=Model(name="se_airbench94_050"),
        data=dataclasses.replace(config.data, eval_batch_size=40, bad_images="skip"),
        parallel=Parallel(batch_norm="global", distributed=True, heartbeat_seconds=HEARTBEAT_SECONDS),
        compilation_cache="",
        steps=12,
        eval_every_epochs=0.5,
        log_every_steps=1,
    )


HOSTS_IMAGES = 192  # of training, twelve batches; and a third as many of evaluation
BAD = {"train": (17, 100), "val": (5,)}


def write_images(folder: Path) -> list[str]:
    """Digits as class folders, three of them damaged; names of these."""
    digits = load_digits()
    count, damaged = 0, []
    for split, size in (("train", HOSTS_IMAGES), ("val", HOSTS_IMAGES // 3)):
        for index in range(size):
            path = folder / split / str(digits.target[count]) / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[count] * 15).astype(np.uint8)).save(path)
            if index in BAD[split]:
                path.write_bytes(path.read_bytes()[:40])
                damaged.append(path.name)
            count += 1
    return damaged


def get_config(kind: str):
    """The settings of a kind of run: images, workers (the same with a data worker), hosts or tables."""
    if kind == "hosts":
        return hosts()
    return tables() if kind == "tables" else images(workers=int(kind == "workers"))
