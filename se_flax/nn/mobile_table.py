"""Block tables of mobile networks, with width and depth scaling.

A network is a tuple of stages, a stage a tuple of `BlockRow`s. Width and depth scaling are functions from one such
table to another, so a variant's table can be printed and compared with the paper's.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from se_flax.functional import round_to_multiple
from se_flax.nn.mobile import ConvBlock, DepthwiseSeparable, FusedInvertedResidual, InvertedResidual, ModuleDef

Array = jax.Array


@dataclass(frozen=True)
class BlockRow:
    """A row of a network's table: one block, repeated.

    Attributes:
      block: block class, or a partial with its kernel, expansion and the like.
      features: output channels of each block.
      repeats: number of blocks.
      strides: of the first block.
      attends: the blocks have the network's attention.
      act: activation of the blocks; None for the network's.
    """

    block: ModuleDef
    features: int
    repeats: int = 1
    strides: int = 1
    attends: bool = False
    act: Callable[[Array], Array] | None = None

    @property
    def downsamples(self) -> bool:
        """Whether the first block lowers the resolution."""
        return self.strides > 1 or bool(getattr(self.block, "keywords", {}).get("space_to_depth"))


StageRows = tuple[BlockRow, ...]
NetworkTable = tuple[StageRows, ...]


def separable(features: int, repeats: int = 1, kernel: int = 3, strides: int = 1, **settings: Any) -> BlockRow:
    """`DepthwiseSeparable` blocks; `settings` are fields of `BlockRow` or attributes of the block."""
    return _blocks(DepthwiseSeparable, features, repeats, strides, kernel=kernel, **settings)


def inverted(
    features: int,
    repeats: int = 1,
    kernel: int | tuple[int, ...] = 3,
    strides: int = 1,
    expand: float = 6.0,
    **settings: Any,
) -> BlockRow:
    """`InvertedResidual` blocks; `settings` as in `separable`."""
    return _blocks(InvertedResidual, features, repeats, strides, kernel=kernel, expand=expand, **settings)


def fused(
    features: int, repeats: int = 1, kernel: int = 3, strides: int = 1, expand: float = 4.0, **settings: Any
) -> BlockRow:
    """`FusedInvertedResidual` blocks; `settings` as in `separable`."""
    return _blocks(FusedInvertedResidual, features, repeats, strides, kernel=kernel, expand=expand, **settings)


def plain(features: int, repeats: int = 1, kernel: int = 3, *, skip: bool = False) -> BlockRow:
    """`ConvBlock`s of stride 1."""
    return _blocks(ConvBlock, features, repeats, 1, kernel=kernel, skip=skip)


def _blocks(block: ModuleDef, features: int, repeats: int, strides: int, **settings: Any) -> BlockRow:
    own = {key: settings.pop(key) for key in ("attends", "act") if key in settings}
    return BlockRow(partial(block, **settings), features, repeats, strides, **own)


def change(layout: NetworkTable, **settings: Any) -> NetworkTable:
    """The table with further attributes for every block (`group_size=8`)."""
    return tuple(
        tuple(dataclasses.replace(row, block=partial(row.block, **settings)) for row in stage) for stage in layout
    )


def scale_width(layout: NetworkTable, factor: float, divisor: int = 8, limit: float = 0.9) -> NetworkTable:
    """Multiplies the output channels and rounds them (Tan and Le 2019, section 3.3: w).

    Args:
      layout: the table.
      factor: width multiplier.
      divisor: the channels are rounded to a multiple of it.
      limit: smallest allowed ratio of rounded to unrounded channels, see `functional.round_to_multiple`.

    Returns:
      The scaled table.
    """

    def scaled(row: BlockRow) -> BlockRow:
        return dataclasses.replace(row, features=round_to_multiple(row.features * factor, divisor, limit))

    return tuple(tuple(map(scaled, stage)) for stage in layout)


def scale_depth(
    layout: NetworkTable, factor: float | Sequence[float], rounding: Callable[[float], int] = math.ceil
) -> NetworkTable:
    """Multiplies the number of blocks in every stage (Tan and Le 2019, section 3.3: d).

    The total of a stage is scaled and then distributed over its rows, from the last row to the first, so that the
    strided row grows last.

    Args:
      layout: the table.
      factor: depth multiplier, or one per stage.
      rounding: of a stage's total, `math.ceil` (EfficientNet) or `round` (MixNet, TinyNet).

    Returns:
      The scaled table.
    """
    factors = [factor] * len(layout) if isinstance(factor, int | float) else factor

    def scaled(stage: StageRows, by: float) -> StageRows:
        left = sum(group.repeats for group in stage)
        wanted = max(1, rounding(left * by))
        rows = []
        for group in reversed(stage):
            repeats = max(1, round(group.repeats / left * wanted))
            rows.append(dataclasses.replace(group, repeats=repeats))
            left, wanted = left - group.repeats, wanted - repeats
        return tuple(reversed(rows))

    return tuple(scaled(stage, by) for stage, by in zip(layout, factors, strict=True))


def start_with_space_to_depth(layout: NetworkTable) -> NetworkTable:
    """Moves the second stage's stride into a space-to-depth convolution at the start of the first (EfficientNet-X).

    The first stage then has half the resolution and four times the channels, and the second a quarter of its expansion.
    """
    (first,), (second, *rest) = layout[0], layout[1]
    start = dataclasses.replace(first, block=partial(first.block, space_to_depth=True, skip=False), repeats=1)
    rows = [dataclasses.replace(row, features=4 * row.features) for row in (start, first)]
    rows[1] = dataclasses.replace(rows[1], repeats=first.repeats - 1)
    expand = second.block.keywords["expand"] / 4  # type: ignore[attr-defined]
    entry = dataclasses.replace(second, block=partial(second.block, expand=expand), strides=1, repeats=1)
    others = [dataclasses.replace(second, strides=1, repeats=second.repeats - 1)]
    stage0 = tuple(row for row in rows if row.repeats)
    stage1 = (entry, *(row for row in others if row.repeats), *rest)
    return (stage0, stage1, *layout[2:])
