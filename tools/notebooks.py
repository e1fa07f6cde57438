"""Writes the notebooks of `colab/` from their paired scripts.

Command:   python -m tools.notebooks            after a change of colab/<name>.py
           jupytext --to py:percent <name>.ipynb    the other way, for a notebook that was edited in Colab

A script is the notebook as text (jupytext's percent format), for reviews and changes. The notebooks have no outputs and
are byte for byte reproducible.
"""

from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).resolve().parents[1] / "colab"


def scripts() -> list[Path]:
    """The paired scripts."""
    return sorted(FOLDER.glob("*.py"))


def notebook_text(script: str) -> str:
    """The notebook of a script, as the text of its file.

    Args:
      script: text in the percent format.

    Returns:
      JSON, checked against the notebook format.
    """
    notebook = jupytext.reads(script, fmt="py:percent")
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata.pop("jupytext", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"  # drawn at random otherwise
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def main() -> None:
    """Writes all notebooks."""
    for script in scripts():
        script.with_suffix(".ipynb").write_text(notebook_text(script.read_text()))
        print(script.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
