"""``mom-compile export``: a checkpoint into graphs with their state explicit."""

from __future__ import annotations

import argparse
from typing import Any

from .verify import add_text_argument

TARGETS = {
    "onnxruntime": "com.microsoft::LinearAttention, fast",
    "portable": "standard ONNX operators only",
    "opset27": "standard ONNX operators, those of opset 27 among them",
    "genai": "a folder for ONNX Runtime GenAI",
    "pt2": "torch.export programs, operators whole",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint folder: config.json and model.safetensors")
    parser.add_argument("target", help="artifact folder to write")
    parser.add_argument(
        "--to",
        choices=list(TARGETS),
        default="onnxruntime",
        help="; ".join(f"{name}: {summary}" for name, summary in TARGETS.items()),
    )
    parser.add_argument(
        "--precision",
        choices=["float32", "float16", "int8", "int4"],
        default="float32",
        help="of --to onnxruntime; int8 and int4: the weights alone (default float32)",
    )
    add_text_argument(parser)
    parser.add_argument("--tolerance", type=float, help="largest relative error (default 1e-4, more below float32)")


def run(args: argparse.Namespace) -> int:
    from .. import export
    from ..model import MoMForCausalLM
    from ..run_folder import model_folder
    from .verify import held_out

    model = MoMForCausalLM.from_pretrained(args.checkpoint)
    tokenizer = model_folder(args.checkpoint) / "tokenizer.json"
    options: dict[str, Any] = {
        "tokenizer": tokenizer if tokenizer.is_file() else None,
        **({} if args.tolerance is None else {"tolerance": args.tolerance}),
    }
    if args.precision != "float32" and args.to in ("pt2", "genai"):
        raise ValueError(f"--precision must be float32 for --to {args.to}, got {args.precision}; use --to onnxruntime")
    if args.to == "pt2":
        report = export.to_pt2(model, args.target, **options)
    elif args.to == "genai":
        report = export.to_genai(model, args.target, **options)
    else:
        text = held_out(args.checkpoint, args.text, model.config.vocab_size)
        report = export.to_onnx(model, args.target, target=args.to, precision=args.precision, text=text, **options)
    print(report)
    print(f"{args.target}: {args.to}, largest relative error {report.error:.1e}")
    return 0
