"""A run: `loop` reads like its story. Program, step, devices, evaluation, checkpoints, report."""
