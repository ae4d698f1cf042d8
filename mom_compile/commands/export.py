"""``mom-compile export``: a checkpoint into graphs with their state explicit."""

from __future__ import annotations

import argparse
from typing import Any

TARGETS = {
    "onnxruntime": "com.microsoft::LinearAttention, fast",
    "portable": "standard ONNX operators only",
    "genai": "a folder for ONNX Runtime GenAI",
    "pt2": "torch.export programs, operators whole",
    "tensorrt": "engines of TensorRT for RTX, built with no GPU, and their graphs",
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
        choices=["float32", "float16", "bfloat16", "int8", "int4"],
        default="float32",
        help="of --to onnxruntime and tensorrt; int8 and int4: the weights alone (default float32)",
    )
    parser.add_argument(
        "--compute-capability",
        type=int,
        nargs="+",
        metavar="CC",
        help="of --to tensorrt: GPUs that the engines run on (default 86 89 120)",
    )
    parser.add_argument(
        "--profile", choices=["rtx", "jetpack6"], help="of --to tensorrt; jetpack6: for a Jetson Orin (default rtx)"
    )
    for name, default in (("batch", "1 1 8"), ("length", "1 256 1024")):
        parser.add_argument(
            f"--{name}",
            type=int,
            nargs=3,
            metavar=("MIN", "OPT", "MAX"),
            help=f"of --to tensorrt: the {name} an engine serves (default {default})",
        )
    parser.add_argument("--tolerance", type=float, help="largest relative error (default 1e-4, more below float32)")


def run(args: argparse.Namespace) -> int:
    from .. import export
    from ..model import MoMForCausalLM
    from ..run_folder import model_folder

    model = MoMForCausalLM.from_pretrained(args.checkpoint)
    tokenizer = model_folder(args.checkpoint) / "tokenizer.json"
    options: dict[str, Any] = {
        "tokenizer": tokenizer if tokenizer.is_file() else None,
        **({} if args.tolerance is None else {"tolerance": args.tolerance}),
    }
    engine_options = {
        "compute_capabilities": args.compute_capability,
        "profile": args.profile,
        "batch": args.batch,
        "length": args.length,
    }
    engine_options = {name: value for name, value in engine_options.items() if value is not None}
    if engine_options and args.to != "tensorrt":
        name = next(iter(engine_options)).replace("_", "-").replace("capabilities", "capability")
        raise ValueError(f"--{name} must go with --to tensorrt, got --to {args.to}; leave it out")
    if args.precision != "float32" and args.to in ("pt2", "genai"):
        raise ValueError(f"--precision must be float32 for --to {args.to}, got {args.precision}; use --to onnxruntime")
    if args.to == "pt2":
        report = export.to_pt2(model, args.target, **options)
    elif args.to == "genai":
        report = export.to_genai(model, args.target, **options)
    elif args.to == "tensorrt":
        report = export.to_tensorrt(model, args.target, precision=args.precision, **engine_options, **options)
    else:
        report = export.to_onnx(model, args.target, target=args.to, precision=args.precision, **options)
    print(report)
    print(f"{args.target}: {args.to}, largest relative error {report.error:.1e}")
    return 0
