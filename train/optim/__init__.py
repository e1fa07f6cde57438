"""Optimizers, schedules, losses, and which parameters learn how fast."""
