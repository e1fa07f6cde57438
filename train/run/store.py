"""Where the files of a run lie."""

from pathlib import Path


class Store:
    """A folder. `train.run.bucket.BucketStore` copies what is written there to a bucket.

    Attributes:
      folder: where the run reads and writes.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def name(self, path: Path) -> str:
        """What messages call a path in the folder."""
        return str(path)

    def check(self) -> None:
        """Raises `UserError` if the run must not go on writing."""

    def add(self, checkpoint: Path) -> None:
        """Takes note of a checkpoint that is whole, with its digests. On the first host, as all that follows."""

    def remove(self, checkpoint: Path) -> None:
        """Takes note of a checkpoint that will be deleted."""

    def move(self, checkpoint: Path, place: Path) -> None:
        """Takes note of a checkpoint that will be moved."""

    def push(self) -> None:
        """Returns when all other files are where they are kept."""
