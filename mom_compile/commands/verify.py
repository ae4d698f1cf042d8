"""``mom-compile verify``: artifacts against the checkpoint they came from, or against their own recorded reference."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data import TokenStream
    from ..report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        help="artifact folders, checkpoint folders (their files are checked), or one run folder: its model and all "
        "artifacts inside it",
    )
    parser.add_argument("--checkpoint", help="checkpoint folder the artifacts were exported from: the full comparison")
    parser.add_argument("--tolerance", type=float, help="largest relative error (default: that of the export)")
    add_text_argument(parser)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the conversation")


def add_text_argument(parser: argparse.ArgumentParser) -> None:
    """``--text``, the held-out text."""
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="PATH",
        help="UTF-8 files that the model was not trained on, for bits per byte (default: the held-out part of the "
        "text that the run folder names, where it still exists)",
    )


def run(args: argparse.Namespace) -> int:
    from ..export.artifact import is_artifact
    from ..report import reports_table
    from ..run_folder import model_folder

    folders, checkpoint = list(args.folders), args.checkpoint
    if checkpoint is None and len(folders) == 1 and model_folder(folders[0]) != Path(folders[0]):
        checkpoint = folders[0]
        inside = sorted(str(path) for path in Path(checkpoint).iterdir() if is_artifact(path))
        folders = [str(model_folder(checkpoint)), *inside]
    reports: dict[str, Report] = {}
    artifacts = [folder for folder in folders if is_artifact(folder)]
    for folder in folders:
        if folder not in artifacts:
            from ..verify_checkpoint import verify_checkpoint

            reports[folder] = verify_checkpoint(folder, args.tolerance)
    if checkpoint is None:
        for folder in artifacts:
            from ..export import verify

            reports[folder] = verify(folder, None, args.tolerance)
    elif artifacts:
        from ..export.ladder import verify_all
        from ..export.text_verification import HeldOut
        from ..model import MoMForCausalLM

        model = MoMForCausalLM.from_pretrained(checkpoint).float().eval()
        stream = held_out(checkpoint, args.text, model.config.vocab_size)
        text = None if stream is None else HeldOut(model, stream)
        reports |= verify_all(artifacts, model, tolerance=args.tolerance, text=text, compiled=not args.no_compile)
    print(next(iter(reports.values())) if len(reports) == 1 else reports_table(reports))
    return 0 if all(report.passed for report in reports.values()) else 1


def held_out(checkpoint: str, paths: list[str] | None, vocab_size: int) -> TokenStream | None:
    """The tokens of the given files, or those that the run folder's training held out."""
    from ..data import read_texts, tokenize
    from ..run_folder import held_out_stream
    from ..tokenizer import load_tokenizer

    if paths is None:
        return held_out_stream(checkpoint, vocab_size)
    return tokenize(read_texts(paths), load_tokenizer(checkpoint, vocab_size), held_out=0).train
