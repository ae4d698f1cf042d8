"""``mom-compile train``: a model on text files."""

from __future__ import annotations

import argparse

# Command-line option -> setting of TrainConfig or MoMConfig. Defaults are suppressed, so that a resumed run keeps its
# own settings and only what was typed can disagree with them.
_TRAIN = {
    "batch_size": (int, "windows of a step (16)"),
    "seq_len": (int, "tokens predicted in a window (256)"),
    "accumulate": (int, "parts that a batch is split into to save memory (1)"),
    "max_steps": (int, "stop after this many steps (1000, or no limit with --max-seconds)"),
    "max_seconds": (float, "stop after this much training"),
    "learning_rate": (float, "peak of the learning rate (0.002)"),
    "warmup_steps": (int, "steps of linear warm-up (20)"),
    "weight_decay": (float, "of AdamW (0.1)"),
    "clip": (float, "largest norm of the gradients (1.0; 0 for no clipping)"),
    "seed": (int, "of weights and windows (0)"),
    "held_out": (float, "share of every file that is held out (0.05)"),
    "log_every": (int, "steps between records (10)"),
    "eval_every": (int, "steps between evaluations (0: at the end only)"),
    "save_every": (int, "steps between checkpoints (200)"),
}
_MODEL = {
    "hidden_size": (int, "width (256)"),
    "num_layers": (int, "blocks (2)"),
    "num_heads": (int, "heads (4)"),
    "head_dim": (int, "size of a head (32)"),
    "num_memories": (int, "routed memories (4)"),
    "topk": (int, "memories that each token selects (2)"),
    "intermediate_size": (int, "width of the MLP (2 x width)"),
    "aux_loss_scale": (float, "factor of the balance loss (0.01)"),
}
_MODEL_DEFAULTS = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 32,
    "num_memories": 4,
    "topk": 2,
    "aux_loss_scale": 0.01,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", nargs="+", default=argparse.SUPPRESS, metavar="PATH", help="UTF-8 files and folders")
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings")
    parser.add_argument(
        "--tokenizer", default=argparse.SUPPRESS, metavar="FILE", help="tokenizer.json, or byte (default)"
    )
    for name, (kind, text) in {**_TRAIN, **_MODEL}.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=text, metavar="N")
    parser.add_argument(
        "--update-rule", default=argparse.SUPPRESS, metavar="RULE", help="linear, retention, mamba2, delta, gated_delta"
    )
    parser.add_argument(
        "--compile", default=argparse.SUPPRESS, metavar="WHAT", help="block (default), model or none: what is compiled"
    )
    parser.add_argument(
        "--memory", default=argparse.SUPPRESS, metavar="POLICY",
        help="what is kept for the backward: auto (default), save, selective, block, or block:N for the first N blocks",
    )  # fmt: skip
    parser.add_argument("--no-cuda-graph", action="store_true", help="launch every kernel of a step by itself")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--device", default=argparse.SUPPRESS, help="such as cpu or cuda")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path
    from typing import Any

    from ..checkpoint import read_trainer_state
    from ..config import MoMConfig
    from ..run_folder import CHECKPOINT
    from ..tokenizer import load_tokenizer
    from ..train import TrainConfig, Trainer

    given = vars(args)
    names = (*_TRAIN, "data", "tokenizer", "device", "compile", "memory")
    settings: dict[str, Any] = {name: given[name] for name in names if name in given}
    settings |= {"out": args.out}
    if args.no_progress:
        settings["progress"] = False
    if args.no_cuda_graph:
        settings["cuda_graph"] = False
    model_settings: dict[str, Any] = {
        {"num_layers": "num_hidden_layers"}.get(name, name): given[name]
        for name in (*_MODEL, "update_rule")
        if name in given
    }
    if args.resume:
        if model_settings:
            name = next(iter(model_settings))
            raise ValueError(
                f"{name} must be left out with --resume, got {model_settings[name]}; start a new run for it"
            )
        saved = read_trainer_state(Path(args.out) / CHECKPOINT).config
        trainer = Trainer(TrainConfig.from_dict({**saved, **settings}), resume=True)
    else:
        if "data" not in settings:
            raise ValueError("--data must name the text to train on, got nothing; pass UTF-8 files or folders")
        if "max_seconds" in settings:
            settings.setdefault("max_steps", None)
        config = TrainConfig(**settings)
        tokenizer = load_tokenizer(config.tokenizer)
        end = tokenizer.eos_token_id
        sizes = {**_MODEL_DEFAULTS, **model_settings}
        sizes.setdefault("intermediate_size", 2 * sizes["hidden_size"])
        model_config = MoMConfig(vocab_size=tokenizer.vocab_size, bos_token_id=end, eos_token_id=end, **sizes)
        trainer = Trainer(config, model_config, tokenizer=tokenizer)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    trainer.say(
        f"{parameters:,} parameters, {len(trainer.data.train):,} training and {len(trainer.data.held_out):,} held-out "
        f"tokens, {trainer.device}, {'compiled' if trainer.compiled else 'eager'}"
    )
    if trainer.progress() >= 1:
        raise ValueError(
            f"max_steps must leave something to do, got a run that is complete at step {trainer.step}; "
            "raise --max-steps or --max-seconds"
        )
    if not trainer.run():
        return 130
    print(trainer.folder / "model")
    return 0
