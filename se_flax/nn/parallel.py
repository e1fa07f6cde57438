"""Sums of parallel layers of one input, which `se_flax.fuse` turns into one convolution (Ding et al. 2021: RepVGG)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax

from se_flax.nn.residual import ConvNorm

Array = jax.Array


class Branch(NamedTuple):
    """A convolution and a norm, submodules of the block; either may be missing. Without both it is the identity."""

    conv: Any = None
    norm: Any = None


class ParallelBlock(nn.Module):
    """Base class of blocks with such sums."""

    def add_branches(self, x: Array, *branches: "Branch | ConvNorm", train: bool = False) -> Array:
        """The sum of the branches.

        Args:
          x: [N, H, W, C].
          *branches: submodules of this block; the first one has a convolution, of no smaller kernel than the others.
          train: the norms use the batch's statistics.

        Returns:
          [N, H / strides, W / strides, features].
        """
        if not self.is_initializing() and not all(self._is_there(branch) for branch in branches):
            branches = branches[:1]  # `se_flax.fuse` put all others into it
        total = apply_branch(branches[0], x, train)
        for branch in branches[1:]:
            total = total + apply_branch(branch, x, train)
        return total

    @nn.nowrap
    def _is_there(self, branch: "Branch | ConvNorm") -> bool:
        first = branch if isinstance(branch, ConvNorm) else branch.conv or branch.norm
        return first is None or self.has_variable("params", str(first.name))


def apply_branch(branch: Branch | ConvNorm, x: Array, train: bool) -> Array:
    """One branch of x. Args and result as in `ParallelBlock.add_branches`."""
    if isinstance(branch, ConvNorm):
        y: Array = branch(x, train=train)
        return y
    x = x if branch.conv is None else branch.conv(x)
    return x if branch.norm is None else branch.norm(x, train=train)
