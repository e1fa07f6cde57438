"""Recipes, one per file; the head says the paper, the command, the expected time and accuracy."""
