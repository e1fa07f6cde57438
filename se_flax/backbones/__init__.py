"""Network families, one file each; every file ends with its table of variants."""
