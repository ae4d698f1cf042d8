"""``mom-compile export``: a checkpoint into graphs with their state explicit."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from .verify import add_text_argument

TARGETS = {
    "onnxruntime": "com.microsoft::LinearAttention, fast",
    "onnxruntime-cuda": "the Triton kernels as operators of onnxruntime on CUDA",
    "portable": "standard ONNX operators only",
    "opset27": "standard ONNX operators, those of opset 27 among them",
    "genai": "a folder for ONNX Runtime GenAI",
    "pt2": "torch.export programs, operators whole",
    "kernels": "the Triton kernels as cubin and PTX, with a C header and launcher",
    "aoti": "AOTInductor packages, run without Python",
    "triton-server": "a model repository for the Triton Inference Server",
    "tensorrt": "engines of TensorRT for RTX, built with no GPU, and their graphs",
}

OPTIONS = {
    "precision": ("onnxruntime", "onnxruntime-cuda", "tensorrt"),
    "state_dtype": ("onnxruntime", "portable", "opset27", "genai", "triton-server"),
    "compute_capability": ("tensorrt", "kernels", "onnxruntime-cuda"),
    "profile": ("tensorrt",),
    "batch": ("tensorrt",),
    "length": ("tensorrt",),
    "device": ("aoti",),
    "engine": ("genai",),
}
"""Option -> the targets that it belongs to."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint folder: config.json and model.safetensors")
    parser.add_argument("target", help="artifact folder to write")
    parser.add_argument(
        "--to",
        choices=list(TARGETS),
        default="onnxruntime",
        help="; ".join(f"{name}: {summary}" for name, summary in TARGETS.items()),
    )
    add_text_argument(parser)
    parser.add_argument("--tolerance", type=float, help="largest relative error (default 1e-4, more below float32)")

    def option(name: str, summary: str, **rest: Any) -> None:
        targets = " and ".join(OPTIONS[name])
        parser.add_argument("--" + name.replace("_", "-"), help=f"of --to {targets}: {summary}", **rest)

    option(
        "precision",
        "int8 and int4 are of the weights alone (default float32, onnxruntime-cuda: float16)",
        choices=["float32", "float16", "bfloat16", "int8", "int4"],
    )
    option(
        "state_dtype",
        "the recurrent state that the graphs take and give, their arithmetic being float32 (default float32)",
        choices=["float32", "float16", "bfloat16"],
    )
    option(
        "compute_capability",
        "GPUs to build for, times ten (default 86 89 120; kernels: 80 87 90 too; onnxruntime-cuda: 80 90 too)",
        type=int,
        nargs="+",
        metavar="CC",
    )
    option("profile", "jetpack6 is for a Jetson Orin (default rtx)", choices=["rtx", "jetpack6"])
    for name, default in (("batch", "1 1 8"), ("length", "1 256 1024")):
        option(
            name, f"the {name} an engine serves (default {default})", type=int, nargs=3, metavar=("MIN", "OPT", "MAX")
        )
    option("device", "where the package runs (default cpu)", choices=["cpu", "cuda"])
    option("engine", "also the form for its engine, continuous batching", action="store_true", default=None)


def run(args: argparse.Namespace) -> int:
    from .. import export
    from ..model import MoMForCausalLM
    from ..run_folder import model_folder
    from .verify import held_out

    options: dict[str, Any] = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    for name in options:
        if args.to not in OPTIONS[name]:
            targets = " or ".join(f"--to {target}" for target in OPTIONS[name])
            raise ValueError(f"--{name.replace('_', '-')} must go with {targets}, got --to {args.to}; leave it out")
    if "compute_capability" in options:
        options["compute_capabilities"] = options.pop("compute_capability")
    model = MoMForCausalLM.from_pretrained(args.checkpoint)
    if args.to == "kernels":
        manifest = export.to_kernels(model, args.target, **options)
        count = sum(len(function["kernels"]) for function in manifest["functions"].values())
        print(f"{args.target}: {count} kernels for sm_{', sm_'.join(map(str, manifest['compute_capabilities']))}")
        return 0
    tokenizer = model_folder(args.checkpoint) / "tokenizer.json"
    options["tokenizer"] = tokenizer if tokenizer.is_file() else None
    if args.tolerance is not None:
        options["tolerance"] = args.tolerance
    exporters: dict[str, Any] = {
        "pt2": export.to_pt2,
        "aoti": export.to_aoti,
        "triton-server": export.to_triton_server,
        "genai": export.to_genai,
        "tensorrt": export.to_tensorrt,
    }
    exporter = exporters.get(args.to)
    if exporter is None:
        options["text"] = held_out(args.checkpoint, args.text, model.config.vocab_size)
        exporter = export.to_onnx_cuda if args.to == "onnxruntime-cuda" else partial(export.to_onnx, target=args.to)
    report = exporter(model, args.target, **options)
    print(report)
    print(f"{args.target}: {args.to}, largest relative error {report.error:.1e}")
    return 0
