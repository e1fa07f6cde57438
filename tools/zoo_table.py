"""Writes docs/zoo.md: all networks with size, costs, measured parity and published checkpoints.

    python tools/zoo_table.py           # counts networks that are new or have another size, then writes the page
    python tools/zoo_table.py --again   # counts all networks

Counting traces each network (seconds each, minutes in all), so the counts are kept in `benchmarks/results/costs.jsonl`.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import se_flax
from se_flax.analysis.costs import costs
from se_flax.variant import Variant
from se_flax.zoo import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "zoo.md"
COUNTS = ROOT / "benchmarks" / "results" / "costs.jsonl"
PARITY = ROOT / "benchmarks" / "results" / "parity.jsonl"
HEAD = """# Model zoo

Choose one of {networks} networks; {published} of them have published weights ({checkpoints} checkpoints). Written by
`python tools/zoo_table.py`.

- **Parameters**: trainable, with the default classifier; tested against the paper or released model.
- **GMACs**: multiply-adds of one image in billions, as in timm's tables ([conventions](costs.md)).
- **Parity**: largest difference from timm's logits over the largest logit ([all differences](parity.md)). Empty: not
  measured, or not in timm.
- **Checkpoints**: tags for [`se_flax.load_pretrained("<network>.<tag>")`](checkpoints.md).

On the command line: `se-flax list '*seresnet*'`, `se-flax info <network>`, `se-flax costs <network>`.

"""
COLUMNS = """| network | pixels | parameters | GMACs | parity | checkpoints |
|---|---:|---:|---:|---:|---|
"""


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of every name in a file of JSON lines; empty without a file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def count(name: str, variant: Variant) -> dict[str, Any]:
    """Counts one network at its own image size."""
    counted = costs(name)
    return {"name": name, "image_size": variant.input_size, "params": counted.params, "macs": counted.macs}


def missing(variants: Mapping[str, Variant], counts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Networks without a count, or with the count of another size."""
    return sorted(
        name
        for name, variant in variants.items()
        if name not in counts
        or (counts[name]["image_size"], counts[name]["params"]) != (variant.input_size, variant.num_params)
    )


def without_title(line: str, title: str) -> str:
    """The rest of a module's first line, as a sentence under the heading `title`."""
    rest = line.removeprefix(title).strip(" .,:")
    if rest.startswith("(") and rest.index(")") + 1 < len(rest):
        return line  # a reference in the middle of the sentence
    rest = rest.removeprefix("(").removesuffix(")") if rest.startswith("(") else rest
    return f"{rest[:1].upper()}{rest[1:]}."


def page(
    families: Iterable[ModuleType],
    counts: Mapping[str, Mapping[str, Any]],
    parity: Mapping[str, Mapping[str, Any]],
) -> str:
    """The whole page.

    Args:
      families: modules with a table `VARIANTS`; the first line of a module's docstring heads its networks.
      counts: rows of `count`, by name.
      parity: rows of `benchmarks.parity`, by name.

    Returns:
      Markdown.
    """
    sections, weights = [], []
    for family in families:
        line = (family.__doc__ or "").split("\n")[0]
        title = re.split(r" \(|[:.]|, (?:with|as|in)\b", line)[0]
        rows = []
        for name in sorted(family.VARIANTS):
            variant = se_flax.get_variant(name)
            weights.append(len(variant.weights))
            logits = parity.get(name, {}).get("logits")
            cells = (
                f"`{name}`",
                str(variant.input_size),
                f"{variant.num_params:,}",
                f"{counts[name]['macs'] / 1e9:.3f}" if name in counts else "",
                "" if logits is None else f"{logits:.1e}",
                ", ".join(f"`{published.tag}`" for published in variant.weights),
            )
            rows.append("| " + " | ".join(cells) + " |\n")
        sections.append(f"## {title}\n\n{without_title(line, title)}\n\n{COLUMNS}{''.join(rows)}")
    head = HEAD.format(networks=len(weights), published=sum(map(bool, weights)), checkpoints=sum(weights))
    return head + "\n".join(sections)


def main() -> None:
    """Counts the networks that are not counted yet and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="count all networks")
    options = parser.parse_args()
    variants = {name: se_flax.get_variant(name) for name in se_flax.list_models()}
    counts = {} if options.again else read(COUNTS)
    counts = {name: row for name, row in counts.items() if name in variants}
    PAGE.write_text(page(FAMILIES, counts, read(PARITY)))  # in case the counting is interrupted
    for name in sorted(missing(variants, counts), key=lambda name: variants[name].num_params):
        counts[name] = count(name, variants[name])
        print(f"{name}: {counts[name]['macs']:,}", flush=True)
        COUNTS.write_text("".join(json.dumps(counts[key]) + "\n" for key in sorted(counts)))
    PAGE.write_text(page(FAMILIES, counts, read(PARITY)))


if __name__ == "__main__":
    main()
