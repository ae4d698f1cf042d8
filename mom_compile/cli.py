"""The command line, ``mom-compile``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a model on text files",
    "generate": "continue a text with a checkpoint or an exported artifact",
    "export": "export a checkpoint to a deployable graph, with its state explicit",
    "verify": "check artifacts against their checkpoint",
    "inspect": "what an artifact or a checkpoint is made of, and which memories a text uses",
    "bench": "time decoding, training and operators beside this machine's limits",
    "eval": "bits per byte of a checkpoint on text files",
    "convert": "convert a checkpoint of flash-linear-attention",
    "demo": "train a small model, export it, verify it and generate from the exported graph",
}


def make_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser with the options of the subcommand that ``arguments`` name."""
    parser = argparse.ArgumentParser(prog="mom-compile", description=__doc__)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    chosen = next((argument for argument in arguments if argument in COMMANDS), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == chosen:  # importing every command would load torch to print a help text
            module = importlib.import_module(f".commands.{name}", __package__)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status; user errors print one line and give 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(arguments)
    args = parser.parse_args(arguments)
    if args.version:
        from . import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return int(args.run(args))
    except (ValueError, ImportError, OSError) as error:
        print(f"mom-compile {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nmom-compile {args.command}: interrupted", file=sys.stderr)
        return 130
