"""Tools of the commands beside training: compilation for absent devices, tables."""
