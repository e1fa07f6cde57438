"""Collects the published checkpoints in parity fixtures into `se_flax/data/checkpoints.json`.

    python tools/collect_checkpoints.py FOLDER [FOLDER ...]

Every folder holds fixtures `<architecture>.json.gz` with a list `checkpoints` in timm's format. The table has one entry
per architecture and one line per checkpoint, with the fields of `se_flax.variant.Weights`.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "se_flax" / "data" / "checkpoints.json"


def row(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """One checkpoint as fields of `Weights`, without absent fields and those equal to timm's default."""
    sizes = checkpoint["input_size"][1:]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{checkpoint['name']} takes images of {sizes}; only squares are expected")
    test_size = checkpoint["test_input_size"]
    fields = {
        "tag": checkpoint["tag"],
        "hub_id": checkpoint["hf_hub_id"],
        "num_classes": checkpoint["num_classes"],
        "image_size": sizes[0],
        "mean": checkpoint["mean"],
        "std": checkpoint["std"],
        "interpolation": checkpoint["interpolation"],
        "crop": checkpoint["crop_pct"],
        "licence": checkpoint["license"],
        "test_image_size": test_size[1] if test_size else None,
        "test_crop": checkpoint["test_crop_pct"],
        "crop_mode": None if checkpoint["crop_mode"] == "center" else checkpoint["crop_mode"],
    }
    return {key: value for key, value in fields.items() if value is not None}


def collect(folders: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """Rows by architecture, both sorted; architectures without a published checkpoint are left out."""
    table = {}
    for path in sorted(path for folder in folders for path in folder.glob("*.json.gz")):
        fixture = json.loads(gzip.decompress(path.read_bytes()))
        if fixture.get("checkpoints"):
            table[fixture["model"]] = sorted(map(row, fixture["checkpoints"]), key=lambda fields: fields["tag"])
    return dict(sorted(table.items()))


def dump(table: dict[str, list[dict[str, Any]]]) -> str:
    """JSON with one line per checkpoint, so that a change shows as one line."""
    blocks = []
    for name, rows in table.items():
        lines = ",\n".join("  " + json.dumps(fields) for fields in rows)
        blocks.append(f"{json.dumps(name)}: [\n{lines}\n]")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of fixtures")
    table = collect(parser.parse_args().folders)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(dump(table))
    print(f"{TARGET}: {len(table)} architectures, {sum(map(len, table.values()))} checkpoints")


if __name__ == "__main__":
    main()
