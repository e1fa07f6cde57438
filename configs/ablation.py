"""The ablations of the squeeze-and-excitation paper (Hu et al. 2020, section 6), with ECA and CBAM, on any network.

Command:   python -m train.ablation --config=configs/ablation.py:reduction --workdir=runs/reduction --seeds=3
           python -m train --config=configs/ablation.py:reduction=4 --workdir=runs/one-cell
Axes:      reduction, squeeze, excitation, stages, placement, 3x3, nosqueeze, attention; `all` is every cell of these
Data:      CIFAR-10 by default: tfds:cifar10, or class folders: --config.data.source=folder:<path>

The recipe around the attention is that of configs/cifar10.py with SE-ResNet-20; `reduction@imagenet` takes that of
configs/imagenet.py, `reduction@cifar100:seresnet110` passes it an argument, and --config.<setting>= changes one setting
of every cell (--config.model.name=resnet56). Every axis has the cell `none`, the network without attention. As in the
paper's ablations, the layers of SE have no biases (--config.model.attention.bias=true puts them back).

The table that the study writes has the paper's figures beside its own: SE-ResNet-50 on ImageNet, about 300 epochs.
Other networks and data give other differences, often of another sign.

Seeds are runs of their own. Two in one program (`jax.vmap` over SE-airbench94 at half its widths, batch 512) took 4.4
times as long as one after the other on two CPU cores (medians of 5 turns, 2026-11-30, JAX 0.10.2, AMD EPYC), 3.3 times
on one core: XLA turns the convolutions into grouped ones. Two processes at once, one per core (`taskset`), did 1.3
times the steps per second of one process on both.
"""

import dataclasses
from pathlib import Path

from se_flax.errors import UserError, closest
from train.cli import load_recipe
from train.config import Attention, Config
from train.tools.ablation_table import Cell, Paper

# Errors in per cent, tables 10 to 16.
NONE = Cell("none", Attention(kind="none"), Paper(23.30, 6.55, "25.6M", 3.86))
_STANDARD = Paper(22.28, 6.03, "28.1M", 3.87)


def _se(name: str, paper: Paper, reduction: float = 16.0, **settings: str | tuple[int, ...]) -> Cell:
    return Cell(name, Attention(kind="se", bias=False, reduction=reduction, **settings), paper)  # type: ignore[arg-type]


SE = _se("se", _STANDARD)
NO_SQUEEZE = _se("nosqueeze", Paper(22.93, 6.39, "28.1M", 4.27), squeeze="none")
AFTER_3X3 = _se("3x3", Paper(22.48, 6.02, "25.8M", 3.86), placement="3x3")

AXES: dict[str, tuple[Cell, ...]] = {
    "reduction": (
        NONE,
        _se("2", Paper(22.29, 6.00, "45.7M"), 2.0),
        _se("4", Paper(22.25, 6.09, "35.7M"), 4.0),
        _se("8", Paper(22.26, 5.99, "30.7M"), 8.0),
        _se("16", _STANDARD, 16.0),
        _se("32", Paper(22.72, 6.20, "26.9M"), 32.0),
    ),
    "squeeze": (NONE, _se("max", Paper(22.57, 6.09), squeeze="max"), _se("mean", _STANDARD)),
    "excitation": (
        NONE,
        _se("relu", Paper(23.47, 6.98), gate="relu"),
        _se("tanh", Paper(23.00, 6.38), gate="tanh"),
        _se("sigmoid", _STANDARD),
    ),
    "stages": (
        NONE,
        _se("2", Paper(23.03, 6.48, "25.6M", 3.86), stages=(2,)),
        _se("3", Paper(23.04, 6.32, "25.7M", 3.86), stages=(3,)),
        _se("4", Paper(22.68, 6.22, "26.4M", 3.86), stages=(4,)),
        _se("all", _STANDARD),
    ),
    "placement": (
        NONE,
        _se("standard", _STANDARD),
        _se("pre", Paper(22.23, 6.00), placement="pre"),
        _se("post", Paper(22.78, 6.35), placement="post"),
        _se("identity", Paper(22.20, 6.15), placement="identity"),
    ),
    "3x3": (NONE, SE, AFTER_3X3),
    "nosqueeze": (NONE, SE, NO_SQUEEZE),
    # ECA, CBAM and global context are not in the paper; they keep the forms of their own papers.
    "attention": (
        NONE,
        SE,
        Cell("eca", Attention(kind="eca")),
        Cell("cbam", Attention(kind="cbam")),
        Cell("gc", Attention(kind="gc")),
    ),
}


def _every_cell() -> tuple[Cell, ...]:
    """The cells of all axes, named with their axis; those that are the same network once."""
    found = {cell.key: cell for cell in (NONE, SE)}
    for axis, cells in AXES.items():
        for cell in cells:
            name = cell.name if axis in ("3x3", "nosqueeze", "attention") else f"{axis}-{cell.name}"
            found.setdefault(cell.key, Cell(name, cell.attention, cell.paper))
    return tuple(found.values())


AXES["all"] = _every_cell()


def _split(argument: str) -> tuple[tuple[Cell, ...], str, str]:
    """Cells of the axis, the name of one cell or nothing, the recipe."""
    choice, _, recipe = argument.partition("@")
    axis, _, cell = choice.partition("=")
    if axis not in AXES:
        raise UserError(f"unknown axis ablation.py:{axis}; {closest(axis, AXES)}")
    names = [c.name for c in AXES[axis]]
    if cell and cell not in names:
        raise UserError(f"the axis {axis} has no cell {cell!r}; {closest(cell, names)}")
    return AXES[axis], cell, recipe or "cifar10"


def get_cells(argument: str = "all") -> tuple[Cell, ...]:
    """The cells of a study; `axis` or `axis@recipe`."""
    return _split(argument)[0]


def get_config(argument: str = "reduction") -> Config:
    """Settings of one cell, `axis=cell` or `axis=cell@recipe`; without a cell, those of the paper's own SE."""
    cells, name, recipe = _split(argument)
    file, *rest = recipe.split(":", 1)
    config = load_recipe(":".join([str(Path(__file__).with_name(f"{file}.py")), *rest]))
    attention = next((cell.attention for cell in cells if cell.name == name), SE.attention)
    config.model.attention = dataclasses.replace(attention)  # the command line's overrides are this run's alone
    config.checkpoint.keep_last, config.checkpoint.keep_best = 1, 0
    return config
