"""The training program: `python -m train --config=configs/<recipe>.py --workdir=<dir>`."""
