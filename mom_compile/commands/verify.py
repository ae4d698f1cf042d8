"""``mom-compile verify``: artifacts against the checkpoint they came from, or against their own recorded reference."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", help="artifact folders, or checkpoint folders (their files are checked)")
    parser.add_argument("--checkpoint", help="checkpoint folder the artifacts were exported from: the full comparison")
    parser.add_argument("--tolerance", type=float, help="largest relative error (default: that of the export)")


def run(args: argparse.Namespace) -> int:
    from ..export.artifact import is_artifact
    from ..report import reports_table

    model = None
    if args.checkpoint is not None:
        from ..model import MoMForCausalLM

        model = MoMForCausalLM.from_pretrained(args.checkpoint).float().eval()
    reports: dict[str, Report] = {}
    for folder in args.folders:
        if is_artifact(folder):
            from ..export import verify

            reports[folder] = verify(folder, model, args.tolerance)
        else:
            from ..verify_checkpoint import verify_checkpoint

            reports[folder] = verify_checkpoint(folder, args.tolerance)
    if len(reports) == 1:
        print(next(iter(reports.values())))
    else:
        print(reports_table(reports))
    passed = all(report.passed for report in reports.values())
    artifacts = [folder for folder in reports if is_artifact(folder)]
    if model is not None and len(artifacts) > 1:
        from ..export import load
        from ..export.verification import verify_conversation

        runners = [load(folder) for folder in artifacts]
        tolerance = max(reports[folder].tolerance for folder in artifacts)
        check = verify_conversation(runners, model, tolerance)
        print(f"{check.name}: {check.error:.1e} {'ok' if check.passed else 'FAILED'}")
        passed &= check.passed
    return 0 if passed else 1
