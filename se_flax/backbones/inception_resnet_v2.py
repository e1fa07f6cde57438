"""Inception-ResNet-v2 (Szegedy et al. 2017) as its authors released it, in timm's layout; SE on every module's output.

The released network differs from the paper's figures: the stem is that of Inception-v3, and the modules repeat 10, 20
and 10 times instead of 5, 10 and 5.
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

MIXED_5B = Mixed(
    "mixed_5b",
    (
        (Unit("branch0", 96),),
        (Unit("branch1_0", 48), Unit("branch1_1", 64, 5)),
        (Unit("branch2_0", 64), Unit("branch2_1", 96, 3), Unit("branch2_2", 96, 3)),
        (partial(average_3x3, count_padding=False), Unit("branch3_1", 64)),
    ),
)
MIXED_6A = Mixed(
    "mixed_6a",
    (
        (unpadded("branch0", 384, 3, 2),),
        (Unit("branch1_0", 256), Unit("branch1_1", 256, 3), unpadded("branch1_2", 384, 3, 2)),
        (max_pool_valid,),
    ),
)
MIXED_7A = Mixed(
    "mixed_7a",
    (
        (Unit("branch0_0", 256), unpadded("branch0_1", 384, 3, 2)),
        (Unit("branch1_0", 256), unpadded("branch1_1", 288, 3, 2)),
        (Unit("branch2_0", 256), Unit("branch2_1", 288, 3), unpadded("branch2_2", 320, 3, 2)),
        (max_pool_valid,),
    ),
)


def block_35(name: str) -> Mixed:
    """Inception-ResNet-A, for maps of 35 pixels."""
    return Mixed(
        name,
        (
            (Unit("branch0", 32),),
            (Unit("branch1_0", 32), Unit("branch1_1", 32, 3)),
            (Unit("branch2_0", 32), Unit("branch2_1", 48, 3), Unit("branch2_2", 64, 3)),
        ),
        scale=0.17,
    )


def block_17(name: str) -> Mixed:
    """Inception-ResNet-B, for maps of 17 pixels."""
    return Mixed(
        name,
        (
            (Unit("branch0", 192),),
            (Unit("branch1_0", 128), Unit("branch1_1", 160, (1, 7)), Unit("branch1_2", 192, (7, 1))),
        ),
        scale=0.1,
    )


def block_8(name: str, scale: float = 0.2, activated: bool = True) -> Mixed:
    """Inception-ResNet-C, for maps of 8 pixels."""
    return Mixed(
        name,
        (
            (Unit("branch0", 192),),
            (Unit("branch1_0", 192), Unit("branch1_1", 224, (1, 3)), Unit("branch1_2", 256, (3, 1))),
        ),
        scale=scale,
        activated=activated,
    )


def layout(a: int = 10, b: int = 20, c: int = 9) -> Layout:
    """The network with so many residual modules of each kind before the last one, which is not activated."""
    return (
        (unpadded("conv2d_1a", 32, 3, 2), unpadded("conv2d_2a", 32, 3), Unit("conv2d_2b", 64, 3)),
        (max_pool_valid, Unit("conv2d_3b", 80), unpadded("conv2d_4a", 192, 3)),
        (max_pool_valid, MIXED_5B, *(block_35(f"repeat_{i}") for i in range(a))),
        (MIXED_6A, *(block_17(f"repeat__1_{i}") for i in range(b))),
        (
            MIXED_7A,
            *(block_8(f"repeat__2_{i}") for i in range(c)),
            block_8("block8", scale=1.0, activated=False),
            Unit("conv2d_7b", 1536),
        ),
    )


NETWORK = partial(
    Inception, layout=layout(), norm=partial(BatchNorm, epsilon=1e-3), smallest=75, classifier_name="classif"
)

_SZEGEDY = "Szegedy et al. 2017, figures 10 to 20, with the released model's stem and repeats; timm"
_HU = f"{_SZEGEDY}; SE as in Hu et al. 2020, section 3.3; count: timm's and the formula for SE"

VARIANTS: dict[str, Variant] = {
    "inception_resnet_v2": Variant(NETWORK, 55_843_464, 299, _SZEGEDY),
    "se_inception_resnet_v2": Variant(partial(NETWORK, attention=SqueezeExcite), 65_092_718, 299, _HU),
}
