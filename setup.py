"""Everything is in pyproject.toml but the long description: PyPI shows the README without the files beside it."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def long_description() -> str:
    """The README with links to files of the repository made absolute."""
    raw = REPOSITORY.replace("https://github.com/", "https://raw.githubusercontent.com/")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r'(!\[[^]]*\]\(|<img src=")(?!https://)', rf"\g<1>{raw}/main/", text)
    return re.sub(r"(\]\()(?!https://|#)", rf"\g<1>{REPOSITORY}/blob/main/", text)


if __name__ == "__main__":
    setup(long_description=long_description(), long_description_content_type="text/markdown")
