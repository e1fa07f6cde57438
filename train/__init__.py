"""The training program: `python -m train --help`."""

import importlib.util
import sys

_NEEDED = {
    "absl": "absl-py",
    "grain": "grain",
    "matplotlib": "matplotlib",
    "ml_collections": "ml_collections",
    "optax": "optax",
    "sklearn": "scikit-learn",
    "tensorboardX": "tensorboardX",
    "tensorflow_datasets": "tensorflow-datasets",
}
"""Packages of the extra `train`, by the name that is imported."""


def missing_packages() -> list[str]:
    """Those that are not installed; nothing is imported."""
    return [package for name, package in _NEEDED.items() if importlib.util.find_spec(name) is None]


def _refuse(missing: list[str]) -> None:
    text = (
        f"the training program needs {', '.join(missing)}, which se_flax alone does not; in the repository: "
        "pip install -e '.[train]'"
    )
    if sys.argv[0] == "-m":  # python -m train ...
        sys.exit(f"error: {text}")
    raise ModuleNotFoundError(text)


if _missing := missing_packages():
    _refuse(_missing)
