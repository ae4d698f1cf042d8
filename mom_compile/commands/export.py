"""``mom-compile export``: a checkpoint into graphs with their state explicit."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint folder: config.json and model.safetensors")
    parser.add_argument("target", help="artifact folder to write")
    parser.add_argument(
        "--to",
        choices=["onnxruntime", "portable"],
        default="onnxruntime",
        help="onnxruntime: com.microsoft::LinearAttention, fast; portable: standard ONNX operators only",
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative error (default 1e-4)")


def run(args: argparse.Namespace) -> int:
    from ..export import to_onnx
    from ..model import MoMForCausalLM
    from ..run_folder import model_folder

    model = MoMForCausalLM.from_pretrained(args.checkpoint)
    tokenizer = model_folder(args.checkpoint) / "tokenizer.json"
    report = to_onnx(
        model,
        args.target,
        target=args.to,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        tolerance=args.tolerance,
    )
    print(report)
    print(f"{args.target}: {args.to}, largest relative error {report.error:.1e}")
    return 0
