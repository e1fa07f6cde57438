"""Inception-v3 (Szegedy et al. 2016, table 1) in timm's layout, without the auxiliary classifier; SE on every module.

A name with a double underscore has an underscore in torch (`branch5x5__1` is `branch5x5_1`, not the list `branch5x5`).
"""

from functools import partial

from se_flax.attention import SqueezeExcite
from se_flax.backbones.inception import Inception, Layout
from se_flax.nn.inception import Mixed, Unit, average_3x3
from se_flax.nn.norm import BatchNorm
from se_flax.nn.pooling import max_pool
from se_flax.variant import Variant

unpadded = partial(Unit, padding="VALID")
max_pool_valid = partial(max_pool, padding=0)


def wide(name: str, projection: int) -> Mixed:
    """Figure 5: 1x1, 5x5, two 3x3, pooling; `projection` features after the pooling."""
    return Mixed(
        name,
        (
            (Unit("branch1x1", 64),),
            (Unit("branch5x5__1", 48), Unit("branch5x5__2", 64, 5)),
            (Unit("branch3x3dbl__1", 64), Unit("branch3x3dbl__2", 96, 3), Unit("branch3x3dbl__3", 96, 3)),
            (average_3x3, Unit("branch_pool", projection)),
        ),
    )


def factorised(name: str, features: int) -> Mixed:
    """Figure 6: 7x7 convolutions as 1x7 and 7x1; `features` between them."""
    row, column = (1, 7), (7, 1)
    return Mixed(
        name,
        (
            (Unit("branch1x1", 192),),
            (
                Unit("branch7x7__1", features),
                Unit("branch7x7__2", features, row),
                Unit("branch7x7__3", 192, column),
            ),
            (
                Unit("branch7x7dbl__1", features),
                Unit("branch7x7dbl__2", features, column),
                Unit("branch7x7dbl__3", features, row),
                Unit("branch7x7dbl__4", features, column),
                Unit("branch7x7dbl__5", 192, row),
            ),
            (average_3x3, Unit("branch_pool", 192)),
        ),
    )


def expanded(name: str) -> Mixed:
    """Figure 7: the last convolutions are a 1x3 and a 3x1 side by side."""
    row, column = (1, 3), (3, 1)
    return Mixed(
        name,
        (
            (Unit("branch1x1", 320),),
            (Unit("branch3x3__1", 384), (Unit("branch3x3_2a", 384, row), Unit("branch3x3_2b", 384, column))),
            (
                Unit("branch3x3dbl__1", 448),
                Unit("branch3x3dbl__2", 384, 3),
                (Unit("branch3x3dbl_3a", 384, row), Unit("branch3x3dbl_3b", 384, column)),
            ),
            (average_3x3, Unit("branch_pool", 192)),
        ),
    )


REDUCTION_A = Mixed(
    "Mixed_6a",
    (
        (unpadded("branch3x3", 384, 3, 2),),
        (Unit("branch3x3dbl__1", 64), Unit("branch3x3dbl__2", 96, 3), unpadded("branch3x3dbl__3", 96, 3, 2)),
        (max_pool_valid,),
    ),
)
REDUCTION_B = Mixed(
    "Mixed_7a",
    (
        (Unit("branch3x3__1", 192), unpadded("branch3x3__2", 320, 3, 2)),
        (
            Unit("branch7x7x3__1", 192),
            Unit("branch7x7x3__2", 192, (1, 7)),
            Unit("branch7x7x3__3", 192, (7, 1)),
            unpadded("branch7x7x3__4", 192, 3, 2),
        ),
        (max_pool_valid,),
    ),
)

INCEPTION_V3: Layout = (
    (
        unpadded("Conv2d_1a_3x3", 32, 3, 2),
        unpadded("Conv2d_2a_3x3", 32, 3),
        Unit("Conv2d_2b_3x3", 64, 3),
    ),
    (max_pool_valid, Unit("Conv2d_3b_1x1", 80), unpadded("Conv2d_4a_3x3", 192, 3)),
    (max_pool_valid, wide("Mixed_5b", 32), wide("Mixed_5c", 64), wide("Mixed_5d", 64)),
    (
        REDUCTION_A,
        factorised("Mixed_6b", 128),
        factorised("Mixed_6c", 160),
        factorised("Mixed_6d", 160),
        factorised("Mixed_6e", 192),
    ),
    (REDUCTION_B, expanded("Mixed_7b"), expanded("Mixed_7c")),
)

NETWORK = partial(Inception, layout=INCEPTION_V3, norm=partial(BatchNorm, epsilon=1e-3), smallest=75)

_SZEGEDY = "Szegedy et al. 2016, table 1; timm"
_HU = "Szegedy et al. 2016, table 1, with SE as in Hu et al. 2020, section 3.3; count: timm's and the formula for SE"

VARIANTS: dict[str, Variant] = {
    "inception_v3": Variant(NETWORK, 23_834_568, 299, _SZEGEDY),
    "se_inception_v3": Variant(partial(NETWORK, attention=SqueezeExcite), 25_496_188, 299, _HU),
}
