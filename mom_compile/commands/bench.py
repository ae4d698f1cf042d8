"""``mom-compile bench``: decoding, training and operators timed beside this machine's limits and others' code."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="kind", required=True)
    decode = kinds.add_parser("decode", help="ms per token over batch, context and model")
    decode.add_argument("--size", nargs="+", help="models: tiny, 50m, 512m, 1b (512m; on a CPU 50m)")
    decode.add_argument("--batch", type=int, nargs="+", help="sequences at once (1 16 128; on a CPU 1)")
    decode.add_argument("--context", type=int, nargs="+", help="tokens seen before (2048 32768 131072)")
    decode.add_argument("--state", default="float32", choices=["float32", "bfloat16", "float16"], help="state's dtype")
    decode.add_argument("--prompt", type=int, default=512, help="on a CPU: tokens of the prefill (512)")
    decode.add_argument("--forms", nargs="+", help="on a CPU: eager, compiled, onnxruntime (all)")
    decode.add_argument("--no-touched", action="store_true", help="on a CPU: leave out the touched states of one layer")
    decode.add_argument(
        "--one-thread", action="store_true", help="on a CPU that others use: one thread, by the time that it ran"
    )
    decode.add_argument("--artifact", type=Path, help="on a CPU: keep the exported model there, or take it from there")
    train = kinds.add_parser("train", help="forward + backward of model, layer and operator")
    train.add_argument("--size", help="model (512m; on a CPU tiny)")
    train.add_argument("--shape", nargs="+", metavar="BxT", help="batch x length of the steps (8x2048 1x16384)")
    train.add_argument("--length", type=int, nargs="*", help="lengths of one sequence as well (2048 to 262144)")
    train.add_argument("--no-compile", action="store_true", help="run the model eagerly")
    train.add_argument("--no-cuda-graph", action="store_true", help="launch every kernel of a step by itself")
    train.add_argument(
        "--memory", default="auto", metavar="POLICY",
        help="memory policy: auto (default), save, selective, block, or block:N for the first N blocks",
    )  # fmt: skip
    train.add_argument("--quick", action="store_true", help="no further lengths, no operators")
    train.add_argument(
        "--keep-caches", action="store_true", help="use the compilers' caches: the first step is shorter"
    )
    operators = kinds.add_parser("operators", help="every operator, forward and backward")
    operators.add_argument("--size", help="shapes: 512m, small, tiny (512m; on a CPU small)")
    operators.add_argument("--rule", default="gated_delta", help="update rule (gated_delta)")
    operators.add_argument("--repeats", type=int, default=20, help="measurements a median is over (20)")
    operators.add_argument("--peer", action="store_true", help="the gated delta rule of the adapters as well")
    for kind in (decode, train, operators):
        kind.add_argument("--device", help="cuda or cpu (cuda where there is one)")
        kind.add_argument("--out", type=Path, metavar="FOLDER", help="write a CSV and, with matplotlib, a plot there")
        kind.add_argument(
            "--peers", metavar="FOLDER", help="adapters of others' code (benchmarks/peers of the sources)"
        )
        if kind is not operators:
            kind.add_argument("--slow-peers", action="store_true", help="also what tunes itself for minutes")


def run(args: argparse.Namespace) -> int:
    if args.kind == "train" and not args.keep_caches:
        # Before torch is imported: the first step is timed with both compilers' caches empty.
        with tempfile.TemporaryDirectory(prefix="mom-compile-bench-") as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "inductor")
            os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")
            return _train(args)
    return {"decode": _decode, "train": _train, "operators": _operators}[args.kind](args)


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise ValueError(f"device must be cuda or cpu, got {name!r}; choose one of them")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be there, got cuda without a CUDA GPU; pass --device cpu")
    return torch.device(name)


def _decode(args: argparse.Namespace) -> int:
    import torch

    from ..bench.peers import peers_folder

    device = _device(args.device)
    if device.type == "cpu":
        from ..bench.decode_cpu import FORMS, bench_decode_cpu

        forms = args.forms or list(FORMS)
        for form in forms:
            if form not in FORMS:
                raise ValueError(f"forms must be of {', '.join(FORMS)}, got {form!r}; choose among them")
        for name in args.size or ["50m"]:
            path = args.out and args.out / f"decode-cpu-{name}.csv"
            bench_decode_cpu(
                name,
                args.batch or [1],
                args.prompt,
                forms,
                not args.no_touched,
                path=path,
                folder=args.artifact,
                one_thread=args.one_thread,
            )
        return 0
    from ..bench.decode import Options, bench_decode, plot_decode

    options = Options(
        state=getattr(torch, args.state), peers=peers_folder(args.peers), slow_peers=args.slow_peers, out=args.out
    )
    given = {"sizes": args.size, "batches": args.batch, "contexts": args.context}
    table = bench_decode(options._replace(**{name: value for name, value in given.items() if value}), device)
    if args.out:
        plot_decode(table, args.out / "decode.png")
    return 0


def _train(args: argparse.Namespace) -> int:
    from ..bench.peers import peers_folder
    from ..bench.train import Options, bench_train, plot_train

    device = _device(args.device)
    gpu = device.type == "cuda"
    shapes = [_shape(text) for text in args.shape or (["8x2048", "1x16384"] if gpu else ["2x64", "1x128"])]
    lengths = args.length
    if lengths is None:
        lengths = [2048, 8192, 32768, 131072, 262144] if gpu and not args.quick else []
    shapes += [(1, length) for length in lengths if (1, length) not in shapes]
    options = Options(
        size=args.size or ("512m" if gpu else "tiny"),
        shapes=shapes,
        compile=not args.no_compile,
        memory=args.memory,
        graph=not args.no_cuda_graph,
        peers=peers_folder(args.peers),
        operators=not args.quick,
        slow_peers=args.slow_peers,
        out=args.out,
    )
    table = bench_train(options, device)
    if args.out:
        plot_train(table, args.out / "train.png")
    return 0


def _shape(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    if not (batch.isdigit() and length.isdigit() and int(batch) and int(length)):
        raise ValueError(f"shape must be BATCHxLENGTH, got {text!r}; for example 8x2048")
    return int(batch), int(length)


def _operators(args: argparse.Namespace) -> int:
    from ..bench.operators import bench_operators
    from ..bench.peers import peers_folder
    from ..ops import RULES

    if args.rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {args.rule!r}; choose one of them")
    device = _device(args.device)
    name = args.size or ("512m" if device.type == "cuda" else "small")
    peers = peers_folder(args.peers) if args.peer or args.peers else None
    bench_operators(name, args.rule, device, args.repeats, peers, args.out and args.out / "operators.csv")
    return 0
