"""What the commands beside training use: compilation for devices that are not there, tables."""
