"""Draws the figures of docs/attention.md: the path from a map to its gate, and the placements in a residual block.

python tools/attention_pictures.py
"""

import html
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
MAP, VECTOR, STEP, GATE = "map", "vector", "step", "gate"
STYLE = """
text{font:14px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:#263238;text-anchor:middle}
.small{font-size:12px;fill:#607d8b}
.map{fill:#bbdefb;stroke:#1976d2}.vector{fill:#ffe0b2;stroke:#ef6c00}.step{fill:#eceff1;stroke:#90a4ae}
.gate{fill:#ffab91;stroke:#d84315}.line{fill:none;stroke:#607d8b;stroke-width:1.6}.head{fill:#607d8b}
@media(prefers-color-scheme:dark){text{fill:#eceff1}.small{fill:#b0bec5}.map{fill:#0d47a1;stroke:#64b5f6}
.vector{fill:#7f4a06;stroke:#ffb74d}.step{fill:#37474f;stroke:#90a4ae}.gate{fill:#8c2f10;stroke:#ff8a65}
.line{stroke:#b0bec5}.head{fill:#b0bec5}}
"""
Step = tuple[str, str, str]
"""Kind of box, operation, output shape."""


def box(kind: str, x: float, y: float, width: float, text: str, below: str = "", height: float = 38) -> str:
    """A rounded box with its text, and a shape below it; a feature map is a stack of three boxes."""
    shift = [8, 4, 0] if kind == MAP else [0]
    rects = "".join(
        f'<rect class="{kind}" x="{x + d:.1f}" y="{y - d:.1f}" width="{width:.1f}" height="{height}" rx="5"/>'
        for d in shift
    )
    words = f'<text x="{x + width / 2:.1f}" y="{y + height / 2 + 5:.1f}">{html.escape(text)}</text>'
    if below:
        words += f'<text class="small" x="{x + width / 2:.1f}" y="{y + height + 16:.1f}">{html.escape(below)}</text>'
    return rects + words


def arrow(*points: tuple[float, float]) -> str:
    """A line through points with an arrowhead at its end."""
    (x0, y0), (x1, y1) = points[-2:]
    length = max(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5, 1e-9)
    ux, uy = (x1 - x0) / length, (y1 - y0) / length
    base = (x1 - 8 * ux, y1 - 8 * uy)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*points[:-1], base])
    head = (
        f"{x1:.1f},{y1:.1f} {base[0] - 4 * uy:.1f},{base[1] + 4 * ux:.1f} {base[0] + 4 * uy:.1f},{base[1] - 4 * ux:.1f}"
    )
    return f'<polyline class="line" points="{line}"/><polygon class="head" points="{head}"/>'


def circle(x: float, y: float, sign: str) -> str:
    """A circle with the sign of a product or a sum."""
    return f'<circle class="step" cx="{x:.1f}" cy="{y:.1f}" r="13"/><text x="{x:.1f}" y="{y + 5:.1f}">{sign}</text>'


def picture(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """A whole SVG file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'role="img" aria-label="{html.escape(title)}">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def gated(x: float, steps: Sequence[Step], entry: str | None) -> tuple[list[str], float]:
    """A feature map on the lower line, with the path of its gate above it.

    Args:
      x: left end.
      steps: from the map to the gate.
      entry: text in the map's box; None if the line comes from the left.

    Returns:
      SVG elements, and the x of the product.
    """
    top, line = 24.0, 150.0
    parts = []
    if entry is not None:
        parts.append(box(MAP, x, line - 19, 64, entry, "H×W×C"))
        x += 72
    start = x + 18
    at = start + 22
    previous: float | None = None
    for kind, text, shape in steps:
        width = max(58.0, 20 + 7.6 * len(text))
        parts.append(box(kind, at, top, width, text, shape))
        if previous is None:
            parts.append(arrow((start, line), (start, top + 19), (at, top + 19)))
        else:
            parts.append(arrow((previous, top + 19), (at, top + 19)))
        previous = at + width
        at = previous + 26
    assert previous is not None
    product = previous + 22
    parts.append(arrow((previous, top + 19), (product, top + 19), (product, line - 13)))
    parts.append(arrow((x, line), (product - 13, line)))
    parts.append(circle(product, line, "×"))
    return parts, product


def module(title: str, *stages: Sequence[Step]) -> str:
    """A module with its gates in sequence."""
    parts: list[str] = []
    x, entry = 10.0, "x"
    for index, steps in enumerate(stages):
        drawn, product = gated(x, steps, entry if index == 0 else None)
        parts += drawn
        x = product + 13
    parts += [arrow((x, 150), (x + 30, 150)), box(MAP, x + 30, 131, 64, "x̃", "H×W×C")]
    return picture(x + 112, 195, title, parts)


def branches(title: str) -> str:
    """Branches with a softmax over them."""
    rows = (40.0, 150.0)
    parts = [box(MAP, 10, 76, 64, "x", "H×W×C"), circle(330, 114, "+")]
    for y, text in zip(rows, ("branch 1", "branch R"), strict=True):
        parts += [arrow((84, 95), (104, 95), (104, y + 19), (124, y + 19)), box(STEP, 124, y, 86, text)]
        parts += [arrow((210, y + 19), (232, y + 19)), box(MAP, 232, y, 56, "u₁" if y < 100 else "uᵣ")]
    parts += [arrow((300, 59), (330, 59), (330, 101)), arrow((300, 169), (330, 169), (330, 127))]
    at, previous = 366.0, 343.0
    for kind, text, shape in (
        (VECTOR, "mean", "C"),
        (STEP, "fc, norm, ReLU", "M"),
        (STEP, "fc", "R×C"),
        (GATE, "softmax over R", "R×C"),
    ):
        width = max(58.0, 20 + 7.6 * len(text))
        parts += [arrow((previous, 114), (at, 114)), box(kind, at, 95, width, text, shape)]
        previous, at = at + width, at + width + 24
    total = previous + 40
    for y in rows:
        around, toward = (y - 22, 101) if y < 100 else (y + 30, 127)
        out = 268 if y < 100 else 288
        parts.append(arrow((out, y - 9 if y < 100 else y + 30), (out, around), (total, around), (total, toward)))
    parts += [arrow((previous, 114), (total - 13, 114)), circle(total, 114, "Σ")]
    parts += [arrow((total + 13, 114), (total + 40, 114)), box(MAP, total + 40, 95, 64, "x̃", "H×W×C")]
    return picture(total + 122, 215, title, parts)


def placements() -> str:
    """The five places in a residual block."""
    parts = []
    for index, (name, inside) in enumerate(
        (
            ("standard", ("1×1, norm, ReLU", "3×3, norm, ReLU", "1×1, norm", "SE")),
            ("pre", ("SE", "1×1, norm, ReLU", "3×3, norm, ReLU", "1×1, norm")),
            ("post", ("1×1, norm, ReLU", "3×3, norm, ReLU", "1×1, norm")),
            ("identity", ("1×1, norm, ReLU", "3×3, norm, ReLU", "1×1, norm")),
            ("3x3", ("1×1, norm, ReLU", "3×3, norm, ReLU", "SE", "1×1, norm")),
        )
    ):
        left = 12.0 + 200 * index
        branch, short = left + 4, left + 162
        middle = branch + 65
        parts.append(f'<text style="font-weight:600" x="{left + 86:.0f}" y="20">{name}</text>')
        parts.append(f'<text class="small" x="{middle:.0f}" y="44">x</text>')
        y = 68.0
        previous = 50.0
        for text in inside:
            kind = GATE if text == "SE" else STEP
            parts += [arrow((middle, previous), (middle, y)), box(kind, branch, y, 130, text, height=30)]
            previous, y = y + 30, y + 48
        total = 278.0
        parts += [arrow((middle, previous), (middle, total - 13)), circle(middle, total, "+")]
        if name == "identity":
            parts += [arrow((middle, 58), (short, 58), (short, 140)), box(GATE, short - 20, 140, 40, "SE", height=30)]
            parts.append(arrow((short, 170), (short, total), (middle + 13, total)))
        else:
            parts.append(arrow((middle, 58), (short, 58), (short, total), (middle + 13, total)))
        parts += [arrow((middle, total + 13), (middle, 312)), box(STEP, branch + 30, 312, 70, "ReLU", height=28)]
        end = 340.0
        if name == "post":
            parts += [arrow((middle, 340), (middle, 358)), box(GATE, branch + 30, 358, 70, "SE", height=28)]
            end = 386.0
        parts.append(arrow((middle, end), (middle, end + 20)))
    return picture(1000, 415, "Five places for attention in a residual block", parts)


PICTURES = {
    "se.svg": module(
        "Squeeze-and-excitation",
        [
            (VECTOR, "mean over H, W", "C"),
            (STEP, "fc1", "M = C / r"),
            (STEP, "ReLU", "M"),
            (STEP, "fc2", "C"),
            (GATE, "sigmoid", "C"),
        ],
    ),
    "eca.svg": module(
        "Efficient channel attention",
        [(VECTOR, "mean over H, W", "C"), (STEP, "k weights along C", "C"), (GATE, "sigmoid", "C")],
    ),
    "ese.svg": module(
        "Effective squeeze-and-excitation",
        [(VECTOR, "mean over H, W", "C"), (STEP, "fc", "C"), (GATE, "hard sigmoid", "C")],
    ),
    "cbam.svg": module(
        "Convolutional block attention",
        [
            (VECTOR, "mean, max", "2 × C"),
            (STEP, "shared fc1, fc2", "2 × C"),
            (STEP, "sum", "C"),
            (GATE, "sigmoid", "C"),
        ],
        [
            (VECTOR, "max, mean over C", "H×W×2"),
            (STEP, "7×7, norm", "H×W×1"),
            (GATE, "sigmoid", "H×W×1"),
        ],
    ),
    "context.svg": module(
        "Global context",
        [
            (VECTOR, "softmax-weighted mean", "C"),
            (STEP, "fc1", "M = C / r"),
            (STEP, "layer norm, ReLU", "M"),
            (STEP, "fc2", "C"),
            (GATE, "sigmoid", "C"),
        ],
    ),
    "branches.svg": branches("Branches weighed against each other"),
    "placements.svg": placements(),
}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in PICTURES.items():
        (FOLDER / name).write_text(text)
