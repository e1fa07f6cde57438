"""Data sets prepared by TensorFlow Datasets."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from se_flax.errors import UserError, closest
from train.config import Data

EVAL_SPLITS = ("test", "validation")


@dataclass(frozen=True)
class TfdsSource:
    """A split prepared by TensorFlow Datasets as ArrayRecord, read without TensorFlow.

    Attributes:
      records: `tfds.data_source` of the split, images undecoded.
      image_key: name of the image feature.
      label_key: name of the label feature.
      num_classes: upper bound of the labels, excluded.
      title: name of the split, for messages.
    """

    records: Any
    image_key: str
    label_key: str
    num_classes: int
    title: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        label = int(record[self.label_key])
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"{self.name(index)} has the label {label}, but the data has the classes 0 ... {self.num_classes - 1}; "
                "-1 marks a split without labels: choose others with data.train_split and data.eval_split."
            )
        return {"image": record[self.image_key], "label": label}

    def name(self, index: int) -> str:
        """Data set, split and number."""
        return f"{self.title} example {index}"


class TfdsFeatures(NamedTuple):
    """A prepared data set, and what its metadata say of images and labels."""

    builder: Any
    image_key: str
    label_key: str
    class_names: tuple[str, ...]


def tfds_features(name: str, data: Data) -> TfdsFeatures:
    """Opens a prepared data set's metadata.

    Raises:
      UserError: it is not prepared, not known, or no image classification.
    """
    import tensorflow_datasets as tfds  # imported here because it takes a second and only this source needs it
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    try:
        # Reads only the files; the data set's own code may need TensorFlow or the network.
        builder = builder_from_files(name, data_dir=data.data_dir or None)
    except ValueError as error:  # includes "not found"
        raise UserError(_why_no_tfds(name, data.data_dir, tfds)) from error

    image_key, label_key = builder.info.supervised_keys or ("image", "label")
    features = dict(builder.info.features.items())
    label = features.get(label_key)
    if not isinstance(features.get(image_key), tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"tfds:{name} is not image classification: it needs an image and a class label, and has "
            f"{listed(sorted(features))}; choose another data set."
        )
    return TfdsFeatures(builder, image_key, label_key, tuple(label.names or map(str, range(label.num_classes))))


def open_tfds(name: str, data: Data) -> tuple[TfdsSource, TfdsSource, tuple[str, ...]]:
    """Opens the training and the evaluation split.

    Args:
      name: of the data set.
      data: the settings.

    Returns:
      The two, and the names of the classes.

    Raises:
      UserError: the data is not there, or not what it should be.
    """
    import tensorflow_datasets as tfds

    builder, image_key, label_key, class_names = tfds_features(name, data)
    available = list(builder.info.splits)
    train_split = data.train_split or "train"
    eval_split = data.eval_split or next((split for split in EVAL_SPLITS if split in available), "")
    if not eval_split:
        raise UserError(
            f"tfds:{name} has no test or validation split (only {', '.join(available)}); name one in "
            "data.eval_split or divide: --config.data.train_split='train[:90%]' --config.data.eval_split='train[90%:]'."
        )

    def open_split(setting: str, split: str) -> TfdsSource:
        try:
            records = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise UserError(
                f"tfds:{name} in {builder.data_dir} is stored without random access; prepare it again in another "
                f"data_dir: {_preparing(name, '<folder>')}"
            ) from error
        except ValueError as error:
            hint = closest(split, available)
            raise UserError(f"data.{setting}={split!r} is not a split of tfds:{name}; {hint}.") from error
        return TfdsSource(records, image_key, label_key, len(class_names), f"tfds:{name} {split}")

    return open_split("train_split", train_split), open_split("eval_split", eval_split), class_names


def _preparing(name: str, data_dir: str) -> str:
    where = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        "pip install 'se-flax[tfds]' && python -c \"import tensorflow_datasets as tfds; "
        f"tfds.builder({name!r}{where}, file_format='array_record').download_and_prepare()\""
    )


def _why_no_tfds(name: str, data_dir: str, tfds: Any) -> str:
    """The message for a data set that is not on disk: not prepared, or unknown."""
    where = data_dir or "the default folder of TensorFlow Datasets"
    known = set(tfds.list_builders(with_community_datasets=False))
    base = name.partition(":")[0].partition("/")[0]
    if base in known:
        return (
            f"tfds:{name} is not prepared in {where}; prepare it once (needs TensorFlow): {_preparing(name, data_dir)}"
        )
    return f"tfds:{name} is neither in {where} nor a data set of TensorFlow Datasets; {closest(base, known)}."


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names in a message, the first few of many."""
    given = list(names)
    return ", ".join(given[:most]) + (f" and {len(given) - most} more" if len(given) > most else "")
