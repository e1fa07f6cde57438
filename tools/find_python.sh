#!/bin/sh
# Prints an interpreter of Python >= 3.$1, or nothing. For 11 the oldest one that fits is taken (the supported floor is
# what most people test with), for anything else the newest.
floor=$1
names="3.11 3.12 3.13 3.14 3.15"
[ "$floor" -gt 11 ] && names="3.15 3.14 3.13 3.12"
fits() { "$1" -c "import sys; sys.exit(sys.version_info < (3, $floor))" 2>/dev/null && "$1" -c "import venv" 2>/dev/null; }
for version in $names; do
  for candidate in "python$version" "$HOME"/.pyenv/versions/"$version".*/bin/python; do
    if command -v "$candidate" >/dev/null 2>&1 && fits "$candidate"; then echo "$candidate"; exit 0; fi
  done
done
if fits python3; then echo python3; fi
exit 0
