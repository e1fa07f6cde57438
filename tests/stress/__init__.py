"""Trainings that are killed at random and at named moments, and compared with one that was not: `kills`."""
