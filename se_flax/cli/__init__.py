"""The command line `se-flax`."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout

from se_flax.cli.layout import Printable, printable, reflowed
from se_flax.errors import UserError, respelled
from se_flax.version import __version__

_DESCRIPTION = """\
Squeeze-and-excitation networks in JAX: list them, predict and evaluate with checkpoints, convert and export these.

  se-flax list '*seresnet*'                    networks by name
  se-flax info seresnet50                      one network, or a REF
  se-flax costs seresnet50 --image-size 224    its size and multiply-adds
  se-flax predict seresnet50.ra2_in1k cat.jpg  most probable classes of a picture
  se-flax eval seresnet50.ra2_in1k data/val    exact accuracy on class folders
  se-flax gates seresnet50.ra2_in1k data/val   its gates, by class and layer
  se-flax convert model.safetensors my-model   from one format to another
  se-flax export seresnet50.ra2_in1k served    StableHLO, ONNX, SavedModel

A REF is a published checkpoint (seresnet50.ra2_in1k), a repository on the Hugging Face hub (owner/name), a folder that
se-flax, timm or a training run wrote, or a .safetensors, .npz, .h5 or .pth file.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; None takes those of the process.

    Returns:
      The exit status: 0 success, 1 an error that the user can correct (one line on standard error), 2 a wrong command
      line, 130 interrupted.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        # Labels, provenance and errors quote files of strangers.
        with redirect_stdout(Printable(sys.stdout)), redirect_stderr(Printable(sys.stderr)):
            options.run(options)
    except UserError as error:
        print(f"se-flax: {printable(_in_flags(str(error), options.command, parser))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader (head, less) has ended
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("se-flax: interrupted", file=sys.stderr)
        return 130
    return 0


def _in_flags(text: str, command: str, parser: argparse.ArgumentParser) -> str:
    """Replaces Python arguments in a message by the flags of the command, or by those of another command."""
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    names = {"se_flax.list_models()": "se-flax list"}
    elsewhere: dict[str, str] = {}
    for name in (command, *commands):
        for action in commands[name]._actions:
            flag = next((option for option in action.option_strings if option.startswith("--")), None)
            argument = f"{action.dest}=True" if action.nargs == 0 else f"{action.dest}="
            if flag and argument not in names:
                names[argument] = flag if action.nargs == 0 else f"{flag}="
                elsewhere |= {} if name == command else {argument: f"{flag} is a flag of se-flax {name}"}
    hints = [hint for argument, hint in elsewhere.items() if respelled(text, {argument: ""}) != text]
    return respelled(text, names) + "".join(f" ({hint})" for hint in hints)


def _parser() -> argparse.ArgumentParser:
    from se_flax.cli import costs, export, files, gates, images, tables

    parser = argparse.ArgumentParser(
        "se-flax", description=reflowed(_DESCRIPTION), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"se-flax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for group in (tables, costs, images, gates, files, export):
        group.add_commands(commands)
    return parser
