"""`python -m train.ctr`: the training program with the help of its settings for tables."""

import sys

from train.cli import main
from train.ctr.config import Config

if __name__ == "__main__":
    sys.exit(main(kind=Config))
