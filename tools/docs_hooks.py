"""Hooks of `mkdocs.yml`: formulas without JavaScript, and pages for files of the repository that pages link to.

A page in `docs/` may link to `../configs/folder.py` as on a forge; the site gets a page with that file's text, so that
the strict build checks the link and it works offline. Formulas between double dollars become SVG, drawn by matplotlib
in the colour of the text, without fonts or scripts from elsewhere.
"""

import html
import io
import posixpath
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import mathtext
from matplotlib.font_manager import FontProperties
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?P<up>(?:\.\./)+)(?P<path>[\w./-]+?)(?P<anchor>#[\w-]+)?\)")
FORMULA = re.compile(r'<div class="arithmatex">\s*\\\[(?P<tex>.*?)\\\]\s*</div>', re.DOTALL)
DRAWING = {"svg.fonttype": "path", "svg.hashsalt": "formula", "mathtext.fontset": "cm", "savefig.transparent": True}
# A colour that is not used elsewhere in the drawing.
INK = "#123456"
FENCES = {".py": "python", ".json": "json", ".toml": "toml", ".yml": "yaml", ".sh": "bash"}


def outside(page: str, up: str, path: str) -> str | None:
    """The file of the repository that a page links to; None for links inside `docs/`.

    Args:
      page: the page, relative to `docs/`.
      up: the link's leading `../`.
      path: the rest of the link.
    """
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), up, path))
    return None if target.startswith(("docs/", "..")) or not (ROOT / target).is_file() else target


def on_files(files: Any, config: Any) -> Any:
    """Adds a page for every file outside `docs/` that a page links to."""
    wanted = set()
    for file in files.documentation_pages():
        for link in LINK.finditer(file.content_string):
            target = outside(file.src_uri, link["up"], link["path"])
            if target:
                wanted.add(target)
    for target in sorted(wanted):
        files.append(File.generated(config, f"source/{target}.md", content=source_page(target)))
    return files


def source_page(target: str) -> str:
    """A page with one file of the repository; Markdown is shown as source."""
    text = (ROOT / target).read_text()
    fence = "`" * max(4, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    language = FENCES.get(Path(target).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# `{target}`\n\n{fence}{language}\n{text}\n{fence}\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Changes links out of `docs/` to the pages that `on_files` added."""
    source = page.file.src_uri

    def turn(link: re.Match[str]) -> str:
        target = outside(source, link["up"], link["path"])
        if target is None:
            return link[0]
        return f"]({posixpath.relpath(f'source/{target}.md', posixpath.dirname(source) or '.')})"

    return markdown if source.startswith("source/") else LINK.sub(turn, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turns formulas into SVG."""
    return FORMULA.sub(lambda found: draw(html.unescape(found["tex"]).strip()), content)


def draw(tex: str) -> str:
    """A formula as an inline SVG in the colour of the text.

    Args:
      tex: formula in matplotlib's mathtext.
    """
    drawn = io.BytesIO()
    with matplotlib.rc_context(DRAWING):
        mathtext.math_to_image(f"${tex}$", drawn, FontProperties(size=13), format="svg", color=INK)
    svg = drawn.getvalue().decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL).replace(
        INK, "currentColor"
    )
    return f'<div class="formula" role="img" aria-label="{html.escape(tex)}">{svg}</div>'
