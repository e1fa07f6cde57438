"""The sides of a comparison: one process each, under the interpreter that has what it needs."""
