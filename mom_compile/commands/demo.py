"""``mom-compile demo``: train, judge, export, verify and generate, in minutes on a CPU."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="PATH", help="UTF-8 file or folder (the Python interpreter's documentation)")
    parser.add_argument("--out", default="runs/demo", help="folder of the run (runs/demo)")
    parser.add_argument("--seconds", type=float, default=150.0, help="of training (150)")
    parser.add_argument("--keep", action="store_true", help="refuse to replace the demonstration before")


def run(args: argparse.Namespace) -> int:
    from ..demo import demo_folder, run_demo

    with demo_folder(args.out, args.keep) as folder:
        report = run_demo(folder, args.text, args.seconds)
    print("\nFrom the exported graph:\n")
    print("\n".join("    " + line for line in report.sample.splitlines()))
    print(f"\n{report.table()}\n")
    failed = [row.what for row in report.rows if row.passed is False]
    print("all requirements hold" if report.passed else f"not as required: {', '.join(failed)}")
    return 0 if report.passed else 1
