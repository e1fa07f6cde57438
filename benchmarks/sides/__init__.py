"""The libraries of a comparison, one process each, with the interpreter that has the library."""
