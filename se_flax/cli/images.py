"""`se-flax predict` and `se-flax eval`: predictions and accuracy of a checkpoint."""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from se_flax.checkpoints.pretrained import Pretrained
from se_flax.cli.checkpoints import add_checkpoint, add_preprocessing, load_checkpoint
from se_flax.cli.labelled import Example, labelled_images
from se_flax.cli.layout import wrapped
from se_flax.errors import UserError
from se_flax.images.class_folders import SUFFIXES, pictures_below
from se_flax.runtime import keep_memory


def add_commands(commands: Any) -> None:
    """Adds the commands of this file to an argument parser."""
    parser = commands.add_parser(
        "predict",
        help="the most probable classes of a picture",
        description="Prints the most probable classes of each picture. A folder stands for all pictures in it.",
    )
    add_common(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="picture files or folders of them")
    parser.add_argument("--top", type=int, default=5, help="number of classes (default: 5)")
    parser.set_defaults(run=predict)
    parser = commands.add_parser(
        "eval",
        help="exact accuracy on labelled pictures",
        description="Exact top-1 and, beyond five classes, top-5 accuracy: every picture counts once. DATA holds one "
        "folder per class, named by label, WordNet id or class number (for a network without labels also all classes "
        "in sorted order); or pictures whose names begin with a WordNet id or a class number and _.",
    )
    add_common(parser)
    parser.add_argument("data", metavar="DATA", help="folder of pictures")
    parser.set_defaults(run=evaluate)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that all commands which run a checkpoint share."""
    add_checkpoint(parser)
    add_preprocessing(parser)
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per batch (default: 32)")
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def predict(options: argparse.Namespace) -> None:
    """Prints the most probable classes of each picture.

    Raises:
      UserError: there is no such checkpoint or picture.
    """
    paths = list(_pictures(options.images))
    if options.top < 1:
        raise UserError(f"got --top={options.top}; give 1 or more")
    loaded = load(options)
    results = []
    for path, logits in zip(paths, _logits(loaded, paths, options.batch_size), strict=True):
        shares = np.exp(logits - logits.max(), dtype=np.float64)
        shares /= shares.sum()
        best = [
            (float(shares[i]), int(i), loaded.labels[i] if loaded.labels else None)
            for i in np.argsort(-logits, kind="stable")[: options.top]
        ]
        rows = [{"class": i, "label": label, "probability": share} for share, i, label in best]
        results.append({"image": str(path), "top": rows})
        if not options.json:
            print(path)
            for share, i, label in best:
                print(wrapped(f"  {100 * share:5.1f} %  {label or f'class {i}'}", indent=" " * 11), flush=True)
    if options.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on a labelled data set.

    Attributes:
      count: number of pictures.
      top1: number of pictures whose class has the highest logit.
      top5: number of pictures whose class is among the five highest; None for five classes or fewer.
      seconds: run time without compilation.
    """

    count: int
    top1: int
    top5: int | None
    seconds: float = field(compare=False, default=0.0)


def evaluate(options: argparse.Namespace) -> None:
    """Prints the accuracy.

    Raises:
      UserError: there is no such checkpoint or data, or classes are ambiguous.
    """
    if not Path(options.data).is_dir():
        raise UserError(f"{options.data}: no such folder; give one of pictures in class folders")
    loaded = load(options)
    classes = getattr(loaded.model, "num_classes", 0)
    examples = labelled_images(Path(options.data), loaded.labels, classes)
    result = accuracy(loaded, examples, options.batch_size)
    ranks = {"top1": result.top1} | ({} if result.top5 is None else {"top5": result.top5})
    if options.json:
        figures = {"count": result.count} | {f"{name}_count": hits for name, hits in ranks.items()}
        shares = {name: hits / result.count for name, hits in ranks.items()}
        print(
            json.dumps({"model": loaded.name, **figures, **shares, "preprocess": loaded.preprocess.to_json()}, indent=2)
        )
        return
    p = loaded.preprocess
    settings = f"{p.image_size} px ({p.interpolation}, crop {p.crop:g} {p.crop_mode})"
    print(f"{loaded.name} at {settings}, {result.count:,} pictures")
    for name, hits in ranks.items():
        print(f"top-{name[3:]}: {100 * hits / result.count:.2f} % ({hits:,} of {result.count:,})")
    print(f"{result.seconds:.1f} s, {result.count / result.seconds:.1f} pictures/s")


def accuracy(loaded: Pretrained, examples: Sequence[Example], batch_size: int = 32) -> Accuracy:
    """Counts correct predictions; among equal logits the lower class number ranks first.

    Args:
      loaded: the network.
      examples: the data set.
      batch_size: pictures per batch.

    Returns:
      The counts.
    """
    top1 = top5 = classes = 0
    apply = _compiled(loaded, min(batch_size, len(examples)))
    start = time.perf_counter()
    for example, logits in zip(examples, _logits(loaded, [e.path for e in examples], batch_size, apply), strict=True):
        rank = int(np.argsort(-logits, kind="stable").tolist().index(example.label))
        top1, top5, classes = top1 + (rank == 0), top5 + (rank < 5), len(logits)
    return Accuracy(len(examples), top1, top5 if classes > 5 else None, time.perf_counter() - start)


def load(options: argparse.Namespace) -> Pretrained:
    """Loads the checkpoint with the preprocessing that the arguments of `add_common` give.

    Raises:
      UserError: there is no such checkpoint, or the batch size is not positive.
    """
    if options.batch_size < 1:
        raise UserError(f"got --batch-size={options.batch_size}; give 1 or more")
    keep_memory()
    return load_checkpoint(options)


def _compiled(loaded: Pretrained, batch_size: int) -> Callable[..., Any]:
    """Compiles the network for a batch size, so that the compilation is not timed."""
    side, channels = loaded.preprocess.image_size, loaded.preprocess.channels
    images = jax.ShapeDtypeStruct((batch_size, side, side, channels), jnp.float32)
    return (
        jax.jit(lambda variables, images: loaded.model.apply(variables, images))
        .lower(loaded.variables, images)
        .compile()
    )


def _logits(
    loaded: Pretrained, paths: Sequence[Path], batch_size: int, apply: Callable[..., Any] | None = None
) -> Iterator[np.ndarray]:
    """The logits of each picture."""
    apply = apply or _compiled(loaded, min(batch_size, len(paths)))
    for images, count in padded_batches(loaded, paths, batch_size):
        yield from np.asarray(apply(loaded.variables, jnp.asarray(images)))[:count]


def padded_batches(
    loaded: Pretrained, paths: Sequence[Path], batch_size: int, title: str | None = None, *, bar: bool = True
) -> Iterator[tuple[np.ndarray, int]]:
    """Reads pictures in batches of the same size, so that the network is compiled once.

    Args:
      loaded: the checkpoint with the preprocessing.
      paths: the pictures.
      batch_size: pictures per batch.
      title: of the progress bar.
      bar: whether to show a progress bar, if the pictures are more than one batch.

    Yields:
      float32 [B, H, W, C] and the number of pictures in the batch; the others are zeros.
    """
    size = min(batch_size, len(paths))
    quiet = None if bar and len(paths) > size else True  # None: shown on a terminal only
    with tqdm(total=len(paths), unit=" pictures", desc=title, disable=quiet, leave=False) as shown:
        for start in range(0, len(paths), size):
            batch = loaded.preprocess(paths[start : start + size])
            count = len(batch)
            yield np.concatenate([batch, np.zeros((size - count, *batch.shape[1:]), batch.dtype)]), count
            shown.update(count)


def _pictures(names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        path = Path(name).expanduser()
        if not path.is_dir():
            if not path.exists():
                raise UserError(f"{name}: no such file or folder")
            yield path
            continue
        found = pictures_below(path)
        if not found:
            raise UserError(f"{name} holds no pictures ({', '.join(SUFFIXES)})")
        yield from (path / picture for picture in found)
