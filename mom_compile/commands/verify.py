"""``mom-compile verify``: an artifact against the checkpoint it came from, or against its own recorded reference."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="artifact folder, or a checkpoint folder (its files are checked)")
    parser.add_argument("--checkpoint", help="checkpoint folder the artifact was exported from: the full comparison")
    parser.add_argument("--tolerance", type=float, help="largest relative error (default: that of the export)")


def run(args: argparse.Namespace) -> int:
    from ..export.artifact import is_artifact

    if is_artifact(args.folder):
        from ..export import verify

        model = None
        if args.checkpoint is not None:
            from ..model import MoMForCausalLM

            model = MoMForCausalLM.from_pretrained(args.checkpoint).float()
        report = verify(args.folder, model, args.tolerance)
    else:
        from ..verify_checkpoint import verify_checkpoint

        report = verify_checkpoint(args.folder, args.tolerance)
    print(report)
    return 0 if report.passed else 1
