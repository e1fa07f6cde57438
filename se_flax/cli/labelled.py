"""Which class each picture of a folder belongs to."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from se_flax.errors import UserError
from se_flax.labels import imagenet_labels

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class Example:
    """A picture and the number of its class."""

    path: Path
    label: int


def labelled_images(root: Path, labels: Sequence[str] | None, num_classes: int) -> list[Example]:
    """Pictures under a folder with their classes.

    Args:
      root: one folder per class; or pictures whose names begin with a WordNet id or a class number and `_`.
      labels: the network's class names, if known.
      num_classes: of the network.

    Returns:
      Every picture once, sorted by path.

    Raises:
      UserError: no pictures, or a folder or file whose class is not one of the network's.
    """
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not paths:
        raise UserError(f"{root} holds no pictures ({', '.join(EXTENSIONS)})")
    known = known_classes(labels, num_classes)
    flat = [path for path in paths if path.parent == root]
    if flat and len(flat) < len(paths):
        raise UserError(f"{root} holds pictures beside class folders, such as {flat[0].name}; move them away")
    if flat:
        return [Example(path, _by_file_name(path, known, num_classes)) for path in paths]
    folders = sorted({path.relative_to(root).parts[0] for path in paths})
    unknown = [folder for folder in folders if normal_name(folder) not in known]
    if unknown and len(folders) == num_classes:
        known = {normal_name(folder): i for i, folder in enumerate(folders)}
    elif unknown:
        raise UserError(
            f"the folder {unknown[0]!r} of {root} names none of the network's {num_classes} classes "
            f"({len(unknown)} of {len(folders)} folders do not); name folders by class name, WordNet id or class number"
        )
    return [Example(path, known[normal_name(path.relative_to(root).parts[0])]) for path in paths]


def known_classes(labels: Sequence[str] | None, num_classes: int) -> dict[str, int]:
    """Class numbers by every name that a folder may have."""
    known = {str(i): i for i in range(num_classes)}
    for i, label in enumerate(labels or ()):
        for name in (label, label.split(",")[0]):
            known.setdefault(normal_name(name), i)
    if labels is not None and tuple(labels) == tuple(label.name for label in imagenet_labels()):
        known |= {label.wordnet_id: i for i, label in enumerate(imagenet_labels())}
    return known


def normal_name(name: str) -> str:
    """A class's name as it is compared: lower case, words joined by _, numbers without leading zeros."""
    text = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return str(int(text)) if text.isdigit() else text


def _by_file_name(path: Path, known: dict[str, int], num_classes: int) -> int:
    number = re.match(r"(\d+)_", path.name)
    wordnet = re.search(r"n\d{8}", path.name)
    for text in (wordnet and wordnet.group(), number and str(int(number.group(1)))):
        if text and text in known:
            return known[text]
    raise UserError(
        f"{path} says no class: without class folders a picture's name begins with a WordNet id or with the number of "
        f"its class, 0 to {num_classes - 1}, and _"
    )
