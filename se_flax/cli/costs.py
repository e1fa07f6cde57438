"""`se-flax costs`: parameters, multiply-adds and activations of a network."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from se_flax.analysis.costs import Costs, LayerCosts, costs
from se_flax.checkpoints.names import meanings
from se_flax.cli.layout import print_table, wrapped
from se_flax.zoo import create_model, get_variant


def add_commands(commands: Any) -> None:
    """Adds the command of this file to an argument parser."""
    parser = commands.add_parser(
        "costs",
        help="parameters, multiply-adds and activations of a network",
        description="Counts one network's costs for one image in its traced program. Multiply-adds come under two "
        "conventions: timm's tables (convolutions, matrix products, 2 per element of a batch norm, final pooling) and "
        "the squeeze-and-excitation paper's (convolutions, matrix products, sums of two maps, the attention's "
        "pooling). Parameters are the trainable ones; the paper counts running means and variances too.",
    )
    parser.add_argument("name", metavar="NAME", help="a network's name, such as seresnet50")
    parser.add_argument("--image-size", type=int, help="image size in pixels (default: the network's)")
    parser.add_argument("--without-attention", action="store_true", help="the same network without its attention")
    parser.add_argument("--by-layer", action="store_true", help="a line for every layer")
    parser.add_argument("--json", action="store_true", help="one JSON object of whole numbers instead of the table")
    parser.set_defaults(run=show_costs)


def show_costs(options: argparse.Namespace) -> None:
    """Prints the costs.

    Raises:
      UserError: the name is unknown, or the image size is not a positive number.
    """
    name = meanings(options.name)[0]
    size = get_variant(name).input_size if options.image_size is None else options.image_size
    model = create_model(name, **({"attention": None} if options.without_attention else {}))
    counted = costs(model, size)
    if options.json:
        by_layer = {"by_layer": [_facts(layer) for layer in counted.by_layer]} if options.by_layer else {}
        print(json.dumps({**counted.totals(), **by_layer}, indent=2))
        return
    if options.by_layer:
        print_table(_rows(counted.by_layer), right=(2, 3, 4, 5))
        print()
    without = " without attention" if options.without_attention else ""
    print(wrapped(f"{name}{without}, one image of {size} x {size} pixels") + "\n")
    print_table(_summary(counted), right=(1, 2, 3))


def _summary(counted: Costs) -> list[tuple[str, ...]]:
    macs, params = counted.attention_macs, counted.attention_params
    return [
        ("", "network", "attention", "share"),
        ("parameters", f"{counted.params:,}", f"{params:,}", _share(params, counted.params)),
        ("parameters with running statistics", f"{counted.params_with_statistics:,}", "", ""),
        ("multiply-adds as in timm's tables", f"{counted.macs:,}", f"{macs:,}", _share(macs, counted.macs)),
        ("multiply-adds as in the SE paper", f"{counted.macs_paper:,}", "", ""),
        ("activations as in timm's tables", f"{counted.activations:,}", "", ""),
    ]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"


def _rows(layers: Sequence[LayerCosts]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("layer", "kind", "parameters", "timm's MACs", "paper's MACs", "activations")]
    for layer in layers:
        counts = (layer.params, layer.macs, layer.macs_paper, layer.activations)
        rows.append((layer.path or "(network)", layer.kind, *(f"{count:,}" for count in counts)))
    return rows


def _facts(layer: LayerCosts) -> dict[str, Any]:
    return {
        "path": layer.path,
        "kind": layer.kind,
        "is_attention": layer.is_attention,
        "params": layer.params,
        "params_with_statistics": layer.params + layer.statistics,
        "macs": layer.macs,
        "macs_paper": layer.macs_paper,
        "activations": layer.activations,
    }
