"""``mom-compile eval``: bits per byte of a checkpoint on text files."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint folder")
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="UTF-8 files and folders")
    parser.add_argument("--batch-size", type=int, default=16, help="rows that run side by side (16)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of one call (256)")
    parser.add_argument("--fresh", action="store_true", help="start each piece of --seq-len tokens from an empty state")
    parser.add_argument(
        "--reset-every", type=int, metavar="N", help="zero the memories every N tokens: what are they worth?"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="judge on the first N tokens")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")


def run(args: argparse.Namespace) -> int:
    from ..data import read_texts, tokenize
    from ..evaluate import evaluate
    from ..model import MoMForCausalLM
    from ..tokenizer import load_tokenizer

    model = MoMForCausalLM.from_pretrained(args.checkpoint, device=args.device)
    tokenizer = load_tokenizer(args.checkpoint, model.config.vocab_size)
    stream = tokenize(read_texts(args.data), tokenizer, held_out=0).train
    result = evaluate(
        model,
        stream,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        carry_state=not args.fresh,
        reset_every=args.reset_every,
        max_tokens=args.max_tokens,
    )
    print(f"bits per byte    {result.bits_per_byte:.4f}")
    print(f"nats per token   {result.nats_per_token:.4f}")
    print(f"tokens, bytes    {result.num_tokens:,}, {result.num_bytes:,}")
    for layer, layer_shares in enumerate(result.memory_shares):
        print(f"memories, layer {layer} {' '.join(f'{100 * share:.1f}%' for share in layer_shares)}")
    return 0
