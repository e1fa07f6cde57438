"""`python -m se_flax` is `se-flax`."""

import sys

from se_flax.cli import main

sys.exit(main())
