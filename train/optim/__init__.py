"""Optimizers, schedules, losses, parameter groups and fine-tuning."""
