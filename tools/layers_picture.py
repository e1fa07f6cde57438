"""Draws docs/pictures/layers.svg: every module of the repository, each above all that it imports.

    python tools/layers_picture.py

The sources are parsed, not imported. Imports inside functions count; those for the type checker only do not.
"""

import ast
import html
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "layers.svg"
PACKAGES = ("configs", "train", "se_flax")
WIDTH, MARGIN, LABEL = 1000, 16, 150
BOX_HEIGHT, GAP, LETTER = 24, 6, 7.0
COLOURS = {"configs": "#8d6e63", "train": "#3f51b5", "se_flax": "#e65100"}
# Colours of subpackages, which share rows with others.
INNER = {"backbones": "#2e7d32", "checkpoints": "#6a1b9a", "cli": "#00838f", "ctr": "#ad1457", "cpu": "#37474f"}


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name and file of every module of the three packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: Mapping[str, Path]) -> set[str]:
    """Modules among `known` that a module imports; a package only if one of its own names is imported."""
    found = set()
    for node in _statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            found |= {const.value for const in ast.walk(node) if isinstance(const, ast.Constant)}
    return {other for other in found if other in known and other != name}


def _statements(tree: ast.AST) -> list[ast.AST]:
    """Every node outside `if TYPE_CHECKING:`."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found += [node, *_statements(node)]
    return found


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """The imports of every module."""
    known = modules(root)
    return {name: imports(name, path, known) for name, path in known.items()}


def heights(edges: Mapping[str, set[str]]) -> dict[str, int]:
    """Length of the longest chain of imports below each module.

    Raises:
      ValueError: modules import each other in a circle.
    """
    done: dict[str, int] = {}

    def height(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError("modules import each other: " + " -> ".join([*above[above.index(name) :], name]))
        if name not in done:
            done[name] = 1 + max((height(other, (*above, name)) for other in sorted(edges[name])), default=-1)
        return done[name]

    for name in sorted(edges):
        height(name)
    return done


def bands(edges: Mapping[str, set[str]]) -> list[tuple[str, list[list[str]]]]:
    """Packages from top to bottom, with the rows of modules in each; a row imports only rows below it."""
    found = []
    for package in PACKAGES:
        mine = {name: others for name, others in edges.items() if name.split(".")[0] == package}
        inside = {name: {o for o in others if o in mine} for name, others in mine.items()}
        level = heights(inside)
        rows: dict[int, list[str]] = {}
        for name in sorted(mine):
            if edges[name] or not is_package(name, edges):  # an empty __init__.py is no layer
                rows.setdefault(level[name], []).append(name)
        found.append((package, [rows[i] for i in sorted(rows, reverse=True)]))
    return found


def is_package(name: str, edges: Mapping[str, set[str]]) -> bool:
    """Whether there are modules in it."""
    return any(other.startswith(name + ".") for other in edges)


def label(name: str, package: str) -> str:
    """Text in a module's box."""
    return name if name == package else name.removeprefix(package + ".")


def first_line(path: Path) -> str:
    """First line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.split("\n")[0]


def draw(root: Path = ROOT) -> str:
    """The picture as SVG; a module's title is the first line of its docstring and its imports."""
    known, edges = modules(root), graph(root)
    parts: list[str] = []
    y = float(MARGIN)
    for package, rows in bands(edges):
        colour, top = COLOURS[package], y
        y += 12
        for row in rows:
            x = float(MARGIN + LABEL)
            for name in row:
                width = 14 + LETTER * len(label(name, package))
                if x + width > WIDTH - MARGIN - 10:
                    x, y = float(MARGIN + LABEL + 24), y + BOX_HEIGHT + GAP
                needs = ", ".join(sorted(edges[name])) or "nothing here"
                paint = INNER.get(label(name, package).split(".")[0], colour)
                title = html.escape(f"{name}: {first_line(known[name])} Imports: {needs}")
                parts.append(
                    f'<g><title>{title}</title><rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                    f'height="{BOX_HEIGHT}" rx="4" fill="{paint}" fill-opacity="0.16" stroke="{paint}" '
                    f'stroke-opacity="0.55"/><text x="{x + width / 2:.1f}" y="{y + 16:.1f}" '
                    f'text-anchor="middle">{label(name, package)}</text></g>'
                )
                x += width + GAP
            y += BOX_HEIGHT + GAP + 2
        y += 4
        parts.append(
            f'<rect x="{MARGIN}" y="{top:.1f}" width="{WIDTH - 2 * MARGIN}" height="{y - top:.1f}" rx="8" fill="none" '
            f'stroke="{colour}" stroke-width="1.5"/><text class="band" x="{MARGIN + 16}" y="{top + 30:.1f}" '
            f'fill="{colour}">{package}/</text>'
        )
        y += 14
    style = (
        "text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#222}.band{font-size:17px;font-weight:600}"
        "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" role="img" '
        f'aria-label="Modules by layer">\n<style>{style}</style>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw())
