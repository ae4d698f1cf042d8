"""``mom-compile generate``: continue a text with a checkpoint or an artifact, printed as it comes."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="checkpoint folder, or artifact folder (an ONNX one runs without torch)")
    parser.add_argument("--prompt", default="The ", help="text to continue (default: %(default)r)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens to add (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus (default %(default)s)")
    parser.add_argument("--greedy", action="store_true", help="the most probable token every time")
    parser.add_argument("--seed", type=int, help="makes the sampling repeatable")
    parser.add_argument("--device", help="device of a checkpoint's model (default: cuda where there is one)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decode step of a checkpoint")


def run(args: argparse.Namespace) -> int:
    import sys
    import time
    from pathlib import Path

    from ..export.artifact import is_artifact
    from ..tokenizer import load_tokenizer

    if not Path(args.folder).is_dir():
        raise ValueError(f"folder must be that of a checkpoint or an artifact, got {args.folder!r}, which is no folder")
    tokenizer = load_tokenizer(args.folder)
    ids = tokenizer.encode(args.prompt)
    if not ids:
        if tokenizer.eos_token_id is None:
            raise ValueError("prompt must hold at least one token, got an empty one; pass --prompt with some text")
        ids = [tokenizer.eos_token_id]  # the end of a text is where the next one starts
    decoder = tokenizer.decoder()
    times: list[float] = []

    def emit(token: int) -> None:
        times.append(time.perf_counter())
        if token != tokenizer.eos_token_id:
            sys.stdout.write(decoder.push(token))
            sys.stdout.flush()

    options: dict[str, Any] = {
        "temperature": 0.0 if args.greedy else args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "eos_token_id": -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
    }
    for flag, given in (("--device", args.device), ("--compile", args.compile)):
        if given and is_artifact(args.folder):
            raise ValueError(f"{flag} must go with a checkpoint, got the artifact {args.folder}; leave it out")
    sys.stdout.write(args.prompt)
    sys.stdout.flush()
    if is_artifact(args.folder):
        _artifact(args.folder, ids, args.max_new_tokens, options, emit)
    else:
        _checkpoint(args, ids, options, emit)
    sys.stdout.write(decoder.flush() + "\n")
    sys.stdout.flush()
    if len(times) > 1:
        rate = (len(times) - 1) / (times[-1] - times[0])
        print(f"{len(times)} tokens, {rate:.1f} tokens/s after the first", file=sys.stderr)
    return 0


def _artifact(folder: str, ids: list[int], max_new_tokens: int, options: dict[str, Any], emit: Any) -> None:
    from ..export import load

    for tokens in load(folder).generate([ids], max_new_tokens, **options):
        emit(int(tokens[0]))


def _checkpoint(args: argparse.Namespace, ids: list[int], options: dict[str, Any], emit: Any) -> None:
    import torch

    from ..model import MoMForCausalLM

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = MoMForCausalLM.from_pretrained(args.folder, device=device)
    decode = torch.compile(model, fullgraph=True) if args.compile else None
    model.generate(
        torch.tensor([ids], device=device),
        args.max_new_tokens,
        on_token=lambda tokens: emit(int(tokens[0])),
        decode=decode,
        **options,
    )
