"""The input pipelines of `benchmarks.loader`, each for its own process and environment."""

import contextlib
import importlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

# Only the standard library up here: the other environments have neither JAX nor this package.
ROOT = Path(__file__).resolve().parent.parent
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
OPERATIONS, MAGNITUDE = 2, 9
OURS = ("pillow", "simplejpeg", "cykooz-resizer", "numpy", "grain", "jax")  # packages that our speed depends on

Makers = dict[str, Callable[[], Any]]  # functions that return the next batch [n, ...], by the name of the row


def ours(files: list[str], batch: int, size: int) -> tuple[Makers, dict[str, str]]:
    """Our pipeline: `train.data.loader`, then the training step up to the network, compiled for the CPU."""
    import jax
    import jax.numpy as jnp

    from se_flax.runtime import keep_memory
    from train.config import Augment
    from train.data.augment import augment, example_keys

    keep_memory()  # as the training program does

    def finish(settings: Augment) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The training step's operations on images before the network."""

        @jax.jit
        def compiled(images: jax.Array, key: jax.Array) -> jax.Array:
            keys = example_keys(key, jnp.arange(len(images)))
            return (augment(images.astype(jnp.float32) / 255, keys, settings) - jnp.array(MEAN)) / jnp.array(STD)

        return compiled

    plain = finish(Augment(flip=True))
    augmented = finish(Augment(flip=True, randaugment_layers=OPERATIONS, randaugment_magnitude=MAGNITUDE))
    host = our_stream(files, batch, size)
    key = jax.random.key(0)
    makers: Makers = {
        "plain": lambda: plain(host(), key).block_until_ready(),
        "randaugment": lambda: augmented(host(), key).block_until_ready(),
        "host": host,
    }
    return makers, versions_of(*OURS)


def our_stream(files: list[str], batch: int, size: int) -> Callable[[], Any]:
    """The training program's batches (read, decode, crop, resize), made on demand."""
    from train.config import Data
    from train.data.loader import train_loader
    from train.data.sources import DataSplits, FolderSource

    # Grain's shuffle of fewer than 2**16 numbers is up to 0.2 ms slower per number, unlike that of a large data set.
    many = files * (2**16 // len(files) + 1)
    source = FolderSource("", tuple(many), (0,) * len(many))
    data = Data(image_size=size, batch_size=batch, train_crop="random_resized", crop_scale=SCALE, crop_ratio=RATIO)
    splits = DataSplits(source, source, ("",))
    batches = train_loader(splits, data, seed=0, process_index=0, process_count=1).by_number()
    numbers = itertools.count()
    return lambda: batches[next(numbers)]["image"]


def versions_of(*packages: str) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def timm(files: list[str], batch: int, size: int) -> tuple[Makers, dict[str, str]]:
    """The loader of timm without worker processes: the work of one worker, without communication."""
    import torch

    torch.set_num_threads(1)
    library = import_torchvision(torch)
    from PIL import Image
    from timm.data import create_loader

    class Files(torch.utils.data.Dataset):
        transform: Any = None

        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return self.transform(Image.open(files[index]).convert("RGB")), 0

    def forever(policy: str | None) -> Callable[[], Any]:
        loader = create_loader(
            Files(),
            (3, size, size),
            batch,
            is_training=True,
            use_prefetcher=False,  # on a CPU, timm's prefetcher (uint8 first) is slower than its plain tensors
            scale=SCALE,
            ratio=RATIO,
            hflip=0.5,
            color_jitter=None,
            auto_augment=policy,
            interpolation="bilinear",
            mean=MEAN,
            std=STD,
            num_workers=0,
            persistent_workers=False,
        )

        def stream() -> Any:
            while True:
                yield from (images for images, _ in loader)

        batches = stream()
        return lambda kept=library: next(batches)

    policy = f"rand-m{MAGNITUDE}-n{OPERATIONS}"
    makers: Makers = {"plain": forever(None), "randaugment": forever(policy)}
    return makers, versions_of("torch", "torchvision", "timm", "pillow")


def import_torchvision(torch: Any) -> Any:
    """Imports torchvision even if it was built for another PyTorch: its transforms need none of its operators.

    Returns:
      An object that must be kept as long as torchvision is used.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        return library
    return None


def tfdata(files: list[str], batch: int, size: int) -> tuple[Makers, dict[str, str]]:
    """tf.data, whose JPEG decoder reads only the crop."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    mean, std = (255 * tf.constant(values) for values in (MEAN, STD))

    def usual_window(shape: Any) -> Any:
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4]),
            min_object_covered=0.0,
            aspect_ratio_range=RATIO,
            area_range=SCALE,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.concat([begin[:2], extent[:2]], axis=0)

    def torchvisions_window(shape: Any) -> Any:
        whole = tf.cast(shape[:2], tf.float32)
        area = tf.random.uniform([10], *SCALE) * tf.reduce_prod(whole)
        aspect = tf.exp(tf.random.uniform([10], math.log(RATIO[0]), math.log(RATIO[1])))
        extents = tf.round(tf.sqrt(tf.stack([area / aspect, area * aspect], axis=1)))
        fits = tf.reduce_all(extents <= whole, axis=1)
        extent = tf.where(tf.reduce_any(fits), extents[tf.argmax(tf.cast(fits, tf.int32))], whole)
        begin = tf.floor(tf.random.uniform([2]) * (whole - extent + 1))
        return tf.cast(tf.concat([begin, extent], axis=0), tf.int32)

    def crop(path: Any, window_of: Callable[[Any], Any] = usual_window, antialias: bool = False) -> Any:
        data = tf.io.read_file(path)
        window = window_of(tf.image.extract_jpeg_shape(data))
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        return tf.image.random_flip_left_right(tf.image.resize(image, [size, size], antialias=antialias))

    def forever(image_of: Callable[[Any], Any]) -> Callable[[], Any]:
        options = tf.data.Options()
        options.threading.private_threadpool_size = 1
        options.threading.max_intra_op_parallelism = 1
        # On one core, prefetching gains nothing.
        options.experimental_optimization.inject_prefetch = False
        options.autotune.enabled = False
        data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat().map(image_of)
        batches = iter(data.batch(batch, drop_remainder=True).with_options(options))
        return lambda: next(batches)

    def normalise(images: Any) -> Any:
        return images * (1 / std) - mean / std  # the fastest of several ways to write it

    import keras

    randaugment = keras.layers.RandAugment(value_range=(0, 255), num_ops=OPERATIONS, factor=MAGNITUDE / 10)
    makers: Makers = {
        "plain": forever(lambda path: normalise(crop(path))),
        "equal work": forever(lambda path: normalise(crop(path, torchvisions_window, antialias=True))),
        "randaugment": forever(lambda path: normalise(randaugment(crop(path)))),
    }
    return makers, versions_of("tensorflow-cpu", "tensorflow", "keras")


def decoders(files: list[str], batch: int, size: int) -> tuple[Makers, dict[str, str]]:
    """Our pipeline with one decoder, resizer or optimisation exchanged at a time."""
    import types

    import numpy as np

    from train.data import images

    fast = {"simplejpeg": images.simplejpeg, "cykooz_resizer": images.cykooz_resizer}
    ways: dict[str, dict[str, Any]] = {
        "Pillow": {"simplejpeg": None, "cykooz_resizer": None},
        "Pillow, cykooz_resizer": {"simplejpeg": None},
        "simplejpeg, Pillow": {"cykooz_resizer": None},
        "simplejpeg, cykooz_resizer": {},
        "the same, all rows": {"_CONTEXT_ROWS": 2**16},
        "the same, never shrunk": {"_shrink_factor": lambda *_: 1},
    }
    try:
        import cv2

        def decode(jpeg: bytearray, *_: Any, **__: Any) -> np.ndarray:
            return cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)

        cv2.setNumThreads(1)
        ways["OpenCV, cykooz_resizer"] = {"simplejpeg": types.SimpleNamespace(decode_jpeg=decode)}
    except ImportError:
        pass
    usual = {name: getattr(images, name) for way in ways.values() for name in way}
    stream = our_stream(files, batch, size)

    def maker(way: dict[str, Any]) -> Callable[[], Any]:
        def make() -> Any:
            for name, value in (usual | way).items():
                setattr(images, name, value)
            return stream()

        return make

    missing = {name for name, module in fast.items() if module is None}
    kept = {name: way for name, way in ways.items() if not any(word in name for word in missing)}
    return {name: maker(way) for name, way in kept.items()}, versions_of(*OURS, "opencv-python-headless")


SIDES = {"ours": ours, "timm": timm, "tf.data": tfdata, "decoders": decoders}


def serve(task: dict[str, Any]) -> None:
    """Reads the names of files, prints rows and versions, then runs a round of each row that it reads (JSON lines)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    sys.path[0] = str(ROOT)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the libraries goes to standard error
    files = json.loads(sys.stdin.readline())
    makers, versions = SIDES[task["side"]](files, task["batch"], task["size"])
    for make in makers.values():
        make()
    _settle()
    print(json.dumps({"rows": list(makers), "versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        make, cpu, wall = makers[json.loads(line)], time.process_time(), time.perf_counter()
        for _ in range(task["batches"]):
            make()
        wall, busy = time.perf_counter() - wall, time.process_time() - cpu
        _settle()
        result = {"cpu": time.process_time() - cpu, "busy": busy / wall}
        print(json.dumps(result), file=answers, flush=True)


def _settle(tick: float = 0.05, most: float = 10.0) -> None:
    """Waits until this process is idle.

    Reading ahead after a round (tf.data) counts, since the round started with a batch that was read ahead; and it must
    not take the core from the next process.
    """
    for _ in range(round(most / tick)):
        before = time.process_time()
        time.sleep(tick)
        if time.process_time() - before < tick / 20:
            return


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
