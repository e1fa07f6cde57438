"""`se-flax list` and `se-flax info`: networks and checkpoints of the zoo."""

import argparse
import functools
import json
from typing import Any

from se_flax.checkpoints.names import meanings
from se_flax.cli.checkpoints import add_checkpoint, describe, facts, is_checkpoint, load_checkpoint
from se_flax.cli.layout import print_table, wrapped
from se_flax.errors import UserError, closest
from se_flax.images.preprocess import Preprocess
from se_flax.variant import Variant, Weights
from se_flax.zoo import get_variant, list_models


def add_commands(commands: Any) -> None:
    """Adds the commands of this file to an argument parser."""
    parser = commands.add_parser(
        "list",
        help="networks and their checkpoints",
        description="Networks with parameters, input size in pixels, published checkpoints and, if the terminal is "
        "wide enough, source. Create a network with se_flax.create_model(NAME), load its checkpoint with "
        "se_flax.load_pretrained(NAME.TAG).",
    )
    parser.add_argument("pattern", nargs="?", default="*", help="shell wildcard in quotes, such as '*seresnet*'")
    parser.add_argument("--pretrained", action="store_true", help="only networks with a published checkpoint")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of the table")
    parser.set_defaults(run=show_list)
    parser = commands.add_parser(
        "info",
        help="one network and its checkpoints",
        description="One network: size, source, arguments, and the preprocessing and licence of each checkpoint. Or "
        "one checkpoint (a folder, a file or a repository on the hub), which is loaded.",
    )
    add_checkpoint(parser, "NAME|REF")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.set_defaults(run=show_info)


def show_list(options: argparse.Namespace) -> None:
    """Prints the table.

    Raises:
      UserError: no network matches.
    """
    rows = [(name, get_variant(name)) for name in list_models(options.pattern)]
    if options.pretrained:
        rows = [row for row in rows if row[1].weights]
    if not rows:
        known = list_models()
        hint = closest(options.pattern.strip("*"), known)
        raise UserError(f"no network matches {options.pattern!r}; {hint} (quote wildcards: '*resnet*')")
    if options.json:
        print(json.dumps([_facts(name, variant) for name, variant in rows], indent=2))
        return
    table = [("name", "parameters", "input", "checkpoints", "source")]
    for name, v in rows:
        tags = ", ".join(w.tag for w in v.weights)
        table.append((name, f"{v.num_params / 1e6:.2f} M", str(v.input_size), tags or "-", v.source))
    print_table(table, right=(1, 2), optional=(4,))
    count = sum(len(v.weights) for _, v in rows)
    print("\n" + wrapped(f"{len(rows)} networks, {count} published checkpoints"))


def show_info(options: argparse.Namespace) -> None:
    """Prints everything about one network, or about one checkpoint.

    Raises:
      UserError: the name is unknown, or the checkpoint cannot be read.
    """
    if is_checkpoint(options.ref):
        loaded = load_checkpoint(options)
        print(json.dumps(facts(loaded), indent=2, ensure_ascii=False) if options.json else describe(loaded))
        return
    if options.name or options.revision:
        flag = "--name" if options.name else "--revision"
        raise UserError(f"got {flag} with the network {options.ref}; it goes with a file, folder or repository")
    name = meanings(options.ref)[0]
    variant = get_variant(name)
    if options.json:
        print(json.dumps(_facts(name, variant), indent=2))
        return
    print(wrapped(f"{name}: {variant.num_params:,} parameters, made for {variant.input_size} px"))
    print(wrapped(f"source: {variant.source}"))
    for key, value in variant.attributes().items():
        print(wrapped(f"  {key} = {_short(value)}"))
    if not variant.weights:
        print("no published checkpoint")
        return
    print()
    table = [("checkpoint", "classes", "input", "crop", "resize", "mean", "std", "licence")]
    for w in variant.weights:
        size = f"{w.image_size}" + (f" (best at {w.test_image_size})" if w.test_image_size else "")
        crop = f"{w.crop:g}" + (f" ({w.test_crop:g})" if w.test_crop else "")
        crop += "" if w.crop_mode == "center" else f" {w.crop_mode}"
        mean, std = (" ".join(f"{x:.3g}" for x in values) for values in (w.mean, w.std))
        table.append((f"{name}.{w.tag}", str(w.num_classes), size, crop, w.interpolation, mean, std, w.licence))
    print_table(table, right=(1,))


def _short(value: Any) -> str:
    """An argument as source code; a table of stages as its length."""
    if isinstance(value, functools.partial):
        named = {key: item for key, item in value.keywords.items() if not key.endswith("_init")}
        inner = ", ".join(f"{key}={_short(item)}" for key, item in named.items())
        return f"{_short(value.func)}({inner})"
    if isinstance(value, tuple) and any(isinstance(item, tuple) for item in value):
        return f"{len(value)} stages"
    return getattr(value, "__name__", None) or repr(value)


def _facts(name: str, variant: Variant) -> dict[str, Any]:
    return {
        "name": name,
        "params": variant.num_params,
        "input_size": variant.input_size,
        "source": variant.source,
        "checkpoints": [_checkpoint(name, weights) for weights in variant.weights],
    }


def _checkpoint(name: str, weights: Weights) -> dict[str, Any]:
    return {
        "ref": f"{name}.{weights.tag}",
        "hub_id": weights.hub_id,
        "num_classes": weights.num_classes,
        "preprocess": Preprocess.of(weights).to_json(),
        "test_image_size": weights.test_image_size,
        "test_crop": weights.test_crop,
        "licence": weights.licence,
    }
