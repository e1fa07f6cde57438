"""`se-flax gates`: statistics of a checkpoint's gates over a data set, as tables and figures."""

import argparse
import csv
import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from se_flax.analysis.gates import (
    EVERY_LAYER,
    UNCHANGED,
    Answers,
    GateStatistics,
    LayerGates,
    collect,
    gate_layers,
    usefulness,
)
from se_flax.checkpoints.pretrained import Pretrained
from se_flax.cli.images import add_common, load, padded_batches
from se_flax.cli.labelled import labelled_images
from se_flax.cli.layout import print_table, wrapped
from se_flax.errors import UserError, closest
from se_flax.images.class_names import ClassNames

# Hu et al. 2020, figure 6: goldfish, pug, plane, cliff.
_PAPERS = ("goldfish", "pug", "airliner", "cliff")
_MOST_DEFAULT = 4


def add_commands(commands: Any) -> None:
    """Adds the command of this file to an argument parser."""
    parser = commands.add_parser(
        "gates",
        help="statistics of the attention's gates, by class and layer",
        description="Runs a checkpoint over labelled pictures (DATA as for eval) and writes to a folder: layers.csv "
        "(one row per attention layer: spread, share of the variance between the groups of classes, closed and open "
        "gates, accuracy with the layer's gates replaced by their means), groups.csv (mean and standard deviation per "
        "group and channel), class_means/LAYER.csv (mean gate per channel and class), and the pictures groups.png, "
        "spread.png and layers.png.",
    )
    add_common(parser)
    parser.add_argument("data", metavar="DATA", help="folder of pictures")
    parser.add_argument("--output", metavar="DIR", help="a new folder (default: gates-NAME)")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that exists")
    parser.add_argument(
        "--classes",
        metavar="GROUP",
        nargs="+",
        help="curves of the pictures: a class by name, WordNet id or number; or several as NAME=CLASS,CLASS, ranges "
        "such as dogs=151-268 included (default: the paper's goldfish, pug, airliner and cliff, or four classes)",
    )
    parser.add_argument(
        "--layers", metavar="PATTERN", nargs="+", help="layers in the pictures, such as 'layer4_*' (default: all)"
    )
    parser.add_argument("--closed", type=float, default=0.1, help="gates below count as closed (default: 0.1)")
    parser.add_argument("--open", type=float, default=0.9, help="gates above count as open (default: 0.9)")
    parser.add_argument(
        "--no-usefulness",
        action="store_true",
        help="leave out the accuracy with replaced gates, which takes a pass over the pictures for each layer",
    )
    parser.set_defaults(run=gates)


def gates(options: argparse.Namespace) -> None:
    """Writes the tables and pictures, and prints the table of layers.

    Raises:
      UserError: no such checkpoint or data, no gates, groups that cannot be formed, or a folder that exists.
    """
    if not Path(options.data).is_dir():
        raise UserError(f"{options.data}: no such folder; give one of pictures in class folders")
    if not options.closed < options.open:
        raise UserError(f"got --closed={options.closed} and --open={options.open}; the first must be the lower one")
    loaded = load(options)
    target = Path(options.output or f"gates-{loaded.name}").expanduser()
    if target.exists() and not options.overwrite:
        raise UserError(f"{target} exists already; choose another --output, or pass --overwrite to write into it")
    layers = gate_layers(loaded.model, loaded.variables, loaded.preprocess.image_size)
    drawn = _chosen(list(layers), options.layers)
    examples = labelled_images(Path(options.data), loaded.labels, getattr(loaded.model, "num_classes", 0))
    labels = [example.label for example in examples]
    groups = parse_groups(options.classes, loaded, set(labels))
    statistics = GateStatistics(layers, labels, groups, closed=options.closed, open=options.open)

    paths = [example.path for example in examples]
    batches = padded_batches(loaded, paths, options.batch_size, "gates")
    found = collect(loaded.model, loaded.variables, batches, statistics)
    answers: dict[str, Answers] = {}
    if not options.no_usefulness:
        means = {name: layer.mean for name, layer in found.items()}
        batches = padded_batches(loaded, paths, options.batch_size, bar=False)
        # By far the longest part, so its progress bar counts the pictures of every pass.
        passes = len(layers) + 2
        title = f"gates replaced, {passes} passes"
        with tqdm(total=passes * len(paths), unit=" pictures", desc=title, disable=None, leave=False) as bar:
            answers = usefulness(loaded.model, loaded.variables, means, batches, labels, bar.update)

    target.mkdir(parents=True, exist_ok=True)
    rows = layer_rows(found, answers)
    sizes = {name: sum(label in members for label in labels) for name, members in groups.items()}
    _write(target / "layers.csv", list(rows[0]), [list(row.values()) for row in rows])
    _write_groups(target / "groups.csv", found, list(groups))
    _write_class_means(target / "class_means", found, statistics.classes, loaded.labels)
    if options.json:
        print(json.dumps({"model": loaded.name, "count": len(labels), "groups": sizes, "layers": rows}, indent=2))
    else:
        _print(loaded, rows, sizes, len(labels))
    try:
        from se_flax.cli.gate_plots import draw
    except ModuleNotFoundError as error:
        missing = (error.name or "matplotlib").partition(".")[0]
        raise UserError(
            f"the tables are in {target}, but the pictures need {missing}, which is not installed; install it with "
            f"pip install {missing} and repeat the command with --overwrite"
        ) from error
    draw(target, found, drawn, sizes, answers)
    if not options.json:
        print(f"\n{target}: layers.csv, groups.csv, class_means/, groups.png, spread.png, layers.png")


def parse_groups(specs: Sequence[str] | None, loaded: Pretrained, present: set[int]) -> dict[str, tuple[int, ...]]:
    """The groups of classes, one per curve.

    Args:
      specs: values of `--classes`; None takes the paper's four classes if the data has them, else four of the data's
        classes, evenly spread.
      loaded: the network, for the names of its classes.
      present: the classes in the data.

    Returns:
      Class numbers by the group's name.

    Raises:
      UserError: a class is unknown or in two groups, or a group has no pictures.
    """
    names = ClassNames(loaded.labels, getattr(loaded.model, "num_classes", 0))
    if specs is None:
        papers = [number for name in _PAPERS for number in names.named(name)]
        several = sorted(present)
        spread = np.unique(np.linspace(0, len(several) - 1, _MOST_DEFAULT).round().astype(int))
        fitting = len(papers) == len(_PAPERS) and present.issuperset(papers)
        chosen = papers if fitting else [several[i] for i in spread]
        return {_class_name(number, loaded.labels): (number,) for number in chosen}
    groups: dict[str, tuple[int, ...]] = {}
    owner: dict[int, str] = {}
    for spec in specs:
        name, equals, members = ("", "", spec) if spec in (loaded.labels or ()) else spec.rpartition("=")
        numbers = list(dict.fromkeys(_numbers(members, names)))
        name = name if equals else _class_name(numbers[0], loaded.labels) if len(numbers) == 1 else members
        if not present.intersection(numbers):
            raise UserError(f"got --classes {spec}, of which the data has no picture; name classes that it has")
        if name in groups:
            raise UserError(f"got two groups {name!r} in --classes; give each a name of its own")
        for number in numbers:
            if owner.setdefault(number, name) != name:
                raise UserError(
                    f"class {number} is in the groups {owner[number]!r} and {name!r} of --classes; a class may be in "
                    "one group only"
                )
        groups[name] = tuple(numbers)
    return groups


def _numbers(members: str, names: ClassNames) -> Iterable[int]:
    """The classes of a group: a single label, or names, numbers and ranges separated by commas."""
    if members in (names.labels or ()):
        yield names.one(members)
        return
    for text in members.split(","):
        span = re.fullmatch(r"\s*([0-9]{1,9})\s*-\s*([0-9]{1,9})\s*", text)
        if span is None or names.named(text.strip()):
            yield names.one(text)
            continue
        first, last = int(span.group(1)), int(span.group(2))
        if first > last or (names.numbers and last >= names.num_classes):
            raise UserError(
                f"got the classes {text.strip()}; a range goes up and ends at {names.num_classes - 1} at most"
            )
        yield from (names.one(str(number)) for number in range(first, last + 1))


def _class_name(number: int, labels: Sequence[str] | None) -> str:
    """Name of a class in tables and figures; unique, if need be by its number."""
    if not labels:
        return f"class {number}"
    name = _first_name(labels[number])
    several = sum(_first_name(label) == name for label in labels) > 1
    return f"{name} ({number})" if several else name


def _first_name(label: str) -> str:
    return label.split(", ")[0]


def _chosen(layers: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    for pattern in patterns or ():
        if not any(fnmatch.fnmatch(layer, pattern) for layer in layers):
            raise UserError(f"no layer matches {pattern!r}; {closest(pattern, layers)}")
    return [x for x in layers if patterns is None or any(fnmatch.fnmatch(x, pattern) for pattern in patterns)]


def layer_rows(found: Mapping[str, LayerGates], answers: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """The table of layers.

    Args:
      found: statistics by layer.
      answers: from `analysis.usefulness`; may be empty.

    Returns:
      One row per layer; with answers, two more rows: all gates replaced, and none. Values are plain, None if undefined.
    """
    rows = []
    for name, layer in found.items():
        figures = {
            "layer": name,
            "channels": len(layer.mean),
            "mean": layer.mean.mean(),
            "std_between_channels": layer.mean.std(),
            "std_over_images": np.sqrt(np.square(layer.std).mean()),
            "closed": layer.closed,
            "open": layer.open,
            "dead_channels": layer.dead,
            "saturated_channels": layer.saturated,
            "between_groups": layer.between,
            "between_groups_chance": layer.chance,
            "between_groups_permuted_max": layer.permuted.max(),
        }
        rows.append({**figures, **_answer_figures(answers.get(name))})
    if answers:
        for case in (EVERY_LAYER, UNCHANGED):
            rows.append({**dict.fromkeys(rows[0]), "layer": case, **_answer_figures(answers[case])})
    return [{key: _plain(value) for key, value in row.items()} for row in rows]


def _answer_figures(answers: Answers | None) -> dict[str, Any]:
    """Accuracy for the table; None in all cells without answers."""
    names = ("count", "top1", "lost", "gained", "changed", "loss")
    return {name: None if answers is None else getattr(answers, name) for name in names}


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows([_cell(value) for value in row] for row in rows)


def _write_groups(path: Path, found: Mapping[str, LayerGates], groups: Sequence[str]) -> None:
    def rows() -> Iterable[Sequence[Any]]:
        for name, layer in found.items():
            means = np.concatenate([layer.mean[None], layer.group_means])
            stds = np.concatenate([layer.std[None], layer.group_std])
            for label, mean, std in zip(("all", *groups), means.tolist(), stds.tolist(), strict=True):
                for channel, pair in enumerate(zip(mean, std, strict=True)):
                    yield name, label, channel, *pair

    _write(path, ["layer", "group", "channel", "mean", "std"], rows())


def _write_class_means(
    folder: Path, found: Mapping[str, LayerGates], classes: np.ndarray, labels: Sequence[str] | None
) -> None:
    folder.mkdir(exist_ok=True)
    head = ["channel", *(f"{number} {_class_name(number, labels)}" if labels else str(number) for number in classes)]
    for name, layer in found.items():
        rows = ([channel, *means] for channel, means in enumerate(layer.class_means.T.tolist()))
        _write(folder / f"{name.replace('/', '.')}.csv", head, rows)


def _print(loaded: Pretrained, rows: Sequence[Mapping[str, Any]], groups: Mapping[str, int], pictures: int) -> None:
    """Prints the table."""
    p = loaded.preprocess
    print(f"{loaded.name} at {p.image_size} px, {pictures:,} pictures")
    print(wrapped("groups: " + ", ".join(f"{name} ({count})" for name, count in groups.items())) + "\n")
    head = ["layer", "channels", "mean", "std", "between", "chance", "closed %", "open %", "dead %", "saturated %"]
    answered = rows[-1]["top1"] is not None
    table = [tuple(head + (["top-1", "lost", "gained", "loss"] if answered else []))]
    for row in rows:
        shown = [_fixed(row[key], 3) for key in ("mean", "std_over_images", "between_groups", "between_groups_chance")]
        shown += [_fixed(row[key], 1, 100) for key in ("closed", "open", "dead_channels", "saturated_channels")]
        cells = [row["layer"], "" if row["channels"] is None else str(row["channels"]), *shown]
        if answered:
            cells += [str(row["top1"]), str(row["lost"]), str(row["gained"]), _fixed(row["loss"], 4)]
        table.append(tuple(cells))
    print_table(table, right=tuple(range(1, len(table[0]))))


def _fixed(value: float | None, digits: int, times: float = 1) -> str:
    return "" if value is None else f"{times * value:.{digits}f}"
