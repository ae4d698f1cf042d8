"""``mom-compile export``: a checkpoint into graphs with their state explicit."""

from __future__ import annotations

import argparse
from typing import Any

TARGETS = {
    "onnxruntime": "com.microsoft::LinearAttention, fast",
    "portable": "standard ONNX operators only",
    "genai": "a folder for ONNX Runtime GenAI",
    "pt2": "torch.export programs, operators whole",
    "kernels": "the Triton kernels as cubin and PTX, with a C header and launcher",
    "aoti": "AOTInductor packages, run without Python",
    "triton-server": "a model repository for the Triton Inference Server",
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
    parser.add_argument(
        "--architectures",
        help="of --to kernels: compute capabilities times ten (default 80,86,87,89,90,120)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of --to aoti (default cpu)")
    parser.add_argument("--tolerance", type=float, help="largest relative error (default 1e-4, more below float32)")


def run(args: argparse.Namespace) -> int:
    from .. import export
    from ..model import MoMForCausalLM
    from ..run_folder import model_folder

    model = MoMForCausalLM.from_pretrained(args.checkpoint)
    if args.to == "kernels":
        return _kernels(model, args)
    tokenizer = model_folder(args.checkpoint) / "tokenizer.json"
    options: dict[str, Any] = {
        "tokenizer": tokenizer if tokenizer.is_file() else None,
        **({} if args.tolerance is None else {"tolerance": args.tolerance}),
    }
    if args.precision != "float32" and args.to in ("pt2", "genai", "aoti", "triton-server"):
        raise ValueError(f"--precision must be float32 for --to {args.to}, got {args.precision}; use --to onnxruntime")
    if args.to == "pt2":
        report = export.to_pt2(model, args.target, **options)
    elif args.to == "aoti":
        report = export.to_aoti(model, args.target, device=args.device, **options)
    elif args.to == "triton-server":
        report = export.to_triton_server(model, args.target, **options)
    elif args.to == "genai":
        report = export.to_genai(model, args.target, **options)
    else:
        report = export.to_onnx(model, args.target, target=args.to, precision=args.precision, **options)
    print(report)
    print(f"{args.target}: {args.to}, largest relative error {report.error:.1e}")
    return 0


def _kernels(model: Any, args: argparse.Namespace) -> int:
    from .. import export
    from ..export.kernel_pack import ARCHITECTURES

    architectures: list[int] = list(ARCHITECTURES)
    if args.architectures is not None:
        words = args.architectures.split(",")
        if not all(word.strip().isdigit() for word in words):
            raise ValueError(
                f"--architectures must be numbers such as 86,90, got {args.architectures}; separate by commas"
            )
        architectures = [int(word) for word in words]
    manifest = export.to_kernels(model, args.target, architectures)
    count = sum(len(function["kernels"]) for function in manifest["functions"].values())
    print(f"{args.target}: {count} kernels for sm_{', sm_'.join(map(str, manifest['architectures']))}")
    return 0
