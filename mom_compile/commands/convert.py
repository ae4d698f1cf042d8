"""``mom-compile convert``: a checkpoint of another library into ours."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="checkpoint folder, such as one of flash-linear-attention's MomForCausalLM")
    parser.add_argument("target", help="folder to write")


def run(args: argparse.Namespace) -> int:
    import shutil
    from pathlib import Path

    from ..model import MoMForCausalLM

    model = MoMForCausalLM.from_pretrained(args.source)
    model.save_pretrained(args.target)
    tokenizer = Path(args.source) / "tokenizer.json"
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, Path(args.target) / tokenizer.name)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.target}: {count:,} parameters, update rule {model.config.update_rule}")
    return 0
