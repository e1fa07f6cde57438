"""Where real weights and data lie, for tests that want them: none of it is in the repository."""

import os
from pathlib import Path

VARIABLE = "SE_FLAX_TEST_DATA"
REASON = f"real weights are not here; set {VARIABLE} to the folder that has them"


def folder(*files):
    """The folder with real data, None where it or one of the files is absent.

    Args:
      *files: names of files that must be in it.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get(VARIABLE) or beside)
    return path if path.is_dir() and all((path / file).is_file() for file in files) else None
