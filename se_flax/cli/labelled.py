"""Labelled pictures: class folders matched with a network's classes."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from se_flax.errors import UserError
from se_flax.images.class_folders import (
    SUFFIXES,
    are_splits,
    pictures_below,
    pictures_beside_folders,
    pictures_by_class,
)
from se_flax.images.class_names import ClassNames


@dataclass(frozen=True)
class Example:
    """A picture and the number of its class."""

    path: Path
    label: int


def labelled_images(root: Path, labels: Sequence[str] | None, num_classes: int) -> list[Example]:
    """Pictures under a folder with their classes.

    Pictures and class folders are found as in training (`se_flax.images.class_folders`). Folders that the network was
    trained on have the same classes again, since their names are its labels. For a network without labels, folders are
    named by class number, or there is one folder per class in sorted order; then a line on standard error says so.

    Args:
      root: one folder per class; or pictures whose names begin with a WordNet id or a class number and `_`.
      labels: the network's class names, if known.
      num_classes: of the network.

    Returns:
      All pictures, by folder and path.

    Raises:
      UserError: there are no pictures, or the class of a folder or file is unknown or ambiguous.
    """
    if num_classes < 1:
        raise UserError("this network has no classifier (num_classes=0), so its answers have no classes; give another")
    names = ClassNames(labels, num_classes)
    beside, folders = pictures_beside_folders(root), pictures_by_class(root)
    if not beside and not any(folders.values()):
        raise UserError(f"{root} holds no pictures ({', '.join(SUFFIXES)})")
    if beside and any(folders.values()):
        raise UserError(
            f"{root} holds pictures beside class folders, such as {beside[0]}; move them away or into a class folder"
        )
    if beside:
        return _by_file_name(root, names)
    classes = _classes_of_folders(root, list(folders), names)
    return [Example(root / name / path, classes[name]) for name, paths in folders.items() for path in paths]


def _classes_of_folders(root: Path, folders: Sequence[str], names: ClassNames) -> dict[str, int]:
    """The class of every folder; a class with two folders is refused."""

    def describe(name: str) -> str:
        return f"the folder {name!r} of {root}"

    if are_splits(folders) and not any(map(names.named, folders)):
        one = next((name for name in folders if name != "train"), folders[0])
        raise UserError(
            f"{root} holds splits ({', '.join(folders)}) and no classes; give one of them, such as {root / one}"
        )
    classes = _without_labels(root, folders, names) if names.labels is None else names.classes(folders, describe)
    owner: dict[int, str] = {}
    for name, number in classes.items():
        if owner.setdefault(number, name) != name:
            raise UserError(
                f"the folders {owner[number]!r} and {name!r} of {root} are both {names.described(number)}; "
                "leave one folder per class"
            )
    return classes


def _without_labels(root: Path, folders: Sequence[str], names: ClassNames) -> dict[str, int]:
    """The class of every folder for a network without labels, by class number or by position."""
    by_number = {name: number for name in folders if (number := names.number(name)) is not None}
    by_order = {name: i for i, name in enumerate(folders)}
    if len(by_number) == len(folders):
        other = next((name for name in folders if by_number[name] != by_order[name]), None)
        if len(folders) == names.num_classes and other is not None:
            width = len(str(names.num_classes - 1))
            raise UserError(
                f"the network has no labels, and the folder {other!r} of {root} is class {by_number[other]} by its "
                f"number and class {by_order[other]} in sorted order; give the numbers {width} digits ({1:0{width}}), "
                "so that both agree"
            )
        return by_number
    if len(folders) != names.num_classes:
        raise UserError(
            f"the network has no labels and {names.num_classes} classes, and {root} has {len(folders)} folders; name "
            f"folders by class number, 0 to {names.num_classes - 1}, or give one for every class, in the order of the "
            "classes"
        )
    shown = [f"{name} = {i}" for name, i in by_order.items()]
    shown = shown if len(shown) <= 6 else [*shown[:3], "...", shown[-1]]
    print(
        f"the network has no labels; the folders are its classes in sorted order: {', '.join(shown)}", file=sys.stderr
    )
    return by_order


def _by_file_name(root: Path, names: ClassNames) -> list[Example]:
    """Classes from the names of the pictures."""
    said: dict[str, str] = {}
    for file in pictures_below(root):
        wordnet, number = re.search(r"n[0-9]{8}", file), re.match(r"([0-9]+)_", file)
        if wordnet and names.named(wordnet.group()):
            said[file] = wordnet.group()
        elif number:
            said[file] = number.group(1)
        else:
            raise UserError(
                f"{root / file} names no class; without class folders a picture's name must begin with a WordNet id or "
                f"with the number of its class, 0 to {names.num_classes - 1}, and _"
            )
    classes = names.classes(said.values(), lambda name: f"the name {name!r} of pictures in {root}")
    return [Example(root / file, classes[name]) for file, name in said.items()]
