"""`python -m train.ctr`: the training program with the help of its settings for tables."""

import sys
from collections.abc import Sequence

from train import cli
from train.ctr.config import Config

USAGE = """\
Train a network for click prediction on a table. `python -m train` does the same, given a recipe for tables.

  python -m train.ctr --config=configs/ctr_frappe.py --workdir=runs/frappe \\
      --config.data.train=csv:clicks.csv

  --config=FILE[:ARGUMENT]   the recipe; its get_config() gives the settings (see configs/ctr_*.py)
  --workdir=DIR              checkpoints, metrics.jsonl and encoder.json; a run found there is resumed
  --config.A.B=VALUE         overrides one setting of the recipe; tuples in quotes: --config.model.hidden='(64,64)'
  --help                     this text

Settings, with the defaults that a recipe starts from:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; arguments and result as for `train.cli.main`."""
    return cli.main(argv, Config, USAGE)


if __name__ == "__main__":
    sys.exit(main())
