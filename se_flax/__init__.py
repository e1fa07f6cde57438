"""Squeeze-and-excitation networks in JAX and Flax."""

from se_flax.version import __version__

__all__ = ["__version__"]
