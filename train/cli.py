"""The command line: a recipe, a work directory, and settings that override the recipe's."""

import dataclasses
import errno
import importlib
import inspect
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from absl import flags
from ml_collections import config_flags

from se_flax.cli.layout import reflowed
from se_flax.errors import UserError, closest
from train.config import Config, Settings, flatten
from train.synonyms import advice, known

USAGE = """\
Train a network.

  python -m train --config=configs/digits.py --workdir=runs/digits

  --config=FILE[:ARGUMENT]   the recipe; its get_config() gives the settings (see configs/)
  --workdir=DIR              checkpoints, metrics.jsonl, curves.png and TensorBoard events; a run found there is resumed
  --config.A.B=VALUE         overrides one setting of the recipe; tuples in quotes: --config.optim.boundaries='(30,60)'
  --help                     this text; python -m train.ctr --help has the settings of recipes for tables

Settings, with the defaults that a recipe starts from:
"""


def settings_help(kind: type = Config) -> str:
    """Every setting with its default and its comment in the source of its class.

    Args:
      kind: of the settings, a dataclass.

    Returns:
      One line per setting.
    """
    lines: list[str] = []

    def walk(cls: type, prefix: str) -> None:
        comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.MULTILINE))
        for f in dataclasses.fields(cls):
            kind = get_type_hints(cls)[f.name]
            if dataclasses.is_dataclass(kind):
                assert isinstance(kind, type)
                lines.append("")
                walk(kind, f"{prefix}{f.name}.")
            else:
                left = f"  --config.{prefix}{f.name}={f.default!r}"
                lines.append(f"{left:<58} {comments.get(f.name, '')}".rstrip())

    walk(kind, "")
    return "\n".join(lines)


def _types(cls: type, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            found.update(_types(kind, f"{prefix}{f.name}."))
        else:
            found[prefix + f.name] = kind
    return found


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _expected(kind: Any) -> str:
    return _WORDS.get(kind, "a tuple of numbers such as '(30, 60)'")


def parse(argv: Sequence[str]) -> tuple[Any, str]:
    """Reads a command line.

    Args:
      argv: its words, without the program's name.

    Returns:
      The recipe's settings with the overrides applied, and the work directory.

    Raises:
      UserError: a flag or setting that does not exist, a value of the wrong type, or a recipe that cannot be read.
    """
    words = _joined([w if not re.match(r"-[a-z]", w) else "-" + w for w in argv])
    recipe = [w for w in words if w.startswith("--config=")]
    overrides = [w for w in words if w.startswith("--config.")]
    workdir = [w for w in words if w.startswith("--workdir=")]
    known_words = {*recipe, *overrides, *workdir}
    for word in words:
        if word not in known_words:
            raise UserError(f"unknown argument {word!r}; {_meant(word, recipe)}")
    if not recipe or not workdir:
        missing = "--config=configs/<recipe>.py" if not recipe else "--workdir=<directory>"
        raise UserError(
            f"{missing} is missing; for example: python -m train --config=configs/digits.py --workdir=runs/digits"
        )
    config = load_recipe(recipe[-1].removeprefix("--config="))
    types = _types(type(config))
    for word in overrides:
        name, _, value = word.removeprefix("--config.").partition("=")
        if name not in types:
            raise UserError(
                f"unknown setting {name!r}; {advice(name, types)} (python -m {config.program} --help lists all)"
            )
        if types[name] is bool and value.lower() not in ("true", "false", "1", "0"):
            raise UserError(f"got --config.{name}={value}; {_expected(bool)} is expected")
    values = flags.FlagValues()
    line = ["train", *overrides]
    try:
        holder = config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=line)
        values(line)
    except (flags.Error, TypeError, ValueError) as error:
        raise _explained(error, overrides, types) from error
    given = flatten(holder.value)
    for word in overrides:
        name, _, value = word.removeprefix("--config.").partition("=")
        # A tuple's parser takes words for strings.
        if isinstance(given[name], list) and any(isinstance(part, str) for part in given[name]):
            raise UserError(f"got --config.{name}={value}; {_expected(types[name])} is expected")
    return holder.value, workdir[-1].removeprefix("--workdir=")


def _meant(word: str, recipe: Sequence[str]) -> str:
    """What an argument that does not exist may have meant: a setting under another program's name."""
    types = _types(type(load_recipe(recipe[-1].removeprefix("--config="))) if recipe else Config)
    name = word.lstrip("-").partition("=")[0]
    if known(name, types):
        return advice(name, types, flag="--config.")
    return "allowed: --config=, --workdir=, --config.<setting>=, --help"


def _joined(words: Sequence[str]) -> list[str]:
    """Turns `--flag value` into `--flag=value`."""
    out: list[str] = []
    for word in words:
        if out and out[-1].startswith("--") and "=" not in out[-1] and not word.startswith("--"):
            out[-1] += f"={word}"
        else:
            out.append(word)
    return out


def load_recipe(text: str) -> Any:
    """Runs a recipe.

    Args:
      text: `path.py`, or `path.py:argument` for a recipe whose `get_config` takes one.

    Returns:
      What its `get_config` gives.

    Raises:
      UserError: no such file, no `get_config`, an argument that it does not take, or a result of another type.
    """
    name, *argument = text.split(":", 1)
    path = Path(name)
    if not path.is_file():
        there = [str(p) for p in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        hint = closest(name, there) if there else "give the path of a file such as configs/digits.py"
        raise UserError(f"there is no recipe {name!r}; {hint}")
    get_config = runpy.run_path(name).get("get_config")
    if get_config is None:
        raise UserError(f"{name} has no function get_config(); see configs/digits.py")
    try:
        inspect.signature(get_config).bind(*argument)
    except TypeError as error:
        raise UserError(f"{name} takes no argument, got {text!r}; leave out ':{argument[0]}'") from error
    config = get_config(*argument)
    if not isinstance(config, Settings):
        raise UserError(f"get_config() of {name} must return a train.config.Config, got {type(config).__name__}")
    return config


def _explained(error: Exception, overrides: Sequence[str], types: dict[str, Any]) -> UserError:
    """The override that a flags error is about, in one sentence; the recipe's own fault otherwise."""
    for word in overrides:
        name, _, value = word.removeprefix("--config.").partition("=")
        if f"config.{name}=" in str(error) or f"config.{name}:" in str(error):
            return UserError(f"got --config.{name}={value}; {_expected(types[name])} is expected")
    return UserError(f"the recipe could not be read: {str(error).strip().splitlines()[-1]}")


def main(argv: Sequence[str] | None = None, kind: type = Config, usage: str = USAGE) -> int:
    """Runs the program.

    Args:
      argv: words of the command line, without the program's name; the process's own when None.
      kind: of the settings that the help lists; a recipe of any kind is run.
      usage: what the help says before them.

    Returns:
      The exit code: 0 done, 2 a mistake of the user's (one sentence on stderr), 130 stopped early by a signal.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help", "-help") for word in words):
        print(reflowed(usage + settings_help(kind)))
        return 0

    def run() -> int:
        config, workdir = parse(words)
        # Imports JAX, which a wrong flag need not wait for.
        loop = importlib.import_module(config.loop)
        outcome = loop.run(config, workdir)
        if outcome.bad_images:
            print(outcome.bad_images, file=sys.stderr)
        print(outcome)
        return 0 if outcome.completed else 130

    return exit_code(run)


def exit_code(run: Callable[[], int]) -> int:
    """Runs a program; what its user can mend becomes one sentence on stderr.

    Args:
      run: the program; it returns its exit code.

    Returns:
      That code; 2 after a mistake of the user's or where the disk refuses a file, 130 when interrupted.
    """
    try:
        return run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EPERM, errno.EACCES, errno.EROFS, errno.EIO):
            raise
        print(
            f"error: {error.filename or 'a file of the run'} could not be written ({error.strerror}); see to it, "
            "then run the same command to resume from the last checkpoint",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; run the same command to resume from the last checkpoint", file=sys.stderr)
        return 130
