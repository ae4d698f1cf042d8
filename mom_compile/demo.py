"""The demonstration: train a small model, judge it, export it, verify it, and generate from the exported graph."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._extras import check_installed
from .config import MoMConfig
from .data import TextData, read_texts, tokenize
from .evaluate import evaluate
from .model import MoMForCausalLM
from .ngram import ngram_bits_per_byte
from .run_folder import MODEL
from .tokenizer import ByteTokenizer
from .train import TrainConfig, Trainer

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

SECONDS = 150.0
TARGETS = ("onnxruntime", "portable")
RESET_EVERY = 16
GENERATED = 200
PROMPT = "The "
DECODED = 100
"""Tokens whose decoding is timed."""
BELOW_BIGRAM = 0.5
WORTH = 0.05
SHARE = (0.05, 0.7)


def demo_model() -> MoMConfig:
    """1.8 M parameters: a byte-level MoM that two CPU cores train in minutes.

    Each head draws one decay at random, so several small heads make sure that some of them remember for long. The
    balance loss weighs more than usual, for a run too short to even out its memories slowly.
    """
    return MoMConfig(
        vocab_size=257,
        hidden_size=256,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=32,
        num_memories=4,
        topk=2,
        intermediate_size=512,
        aux_loss_scale=0.05,
        bos_token_id=256,
        eos_token_id=256,
    )


def demo_training(out: str, seconds: float) -> TrainConfig:
    """Settings of the demonstration's run."""
    return TrainConfig(
        out=out,
        batch_size=4,
        seq_len=256,
        max_steps=None,
        max_seconds=seconds,
        learning_rate=3e-3,
        warmup_steps=20,
        held_out=0.1,
        log_every=10,
        save_every=0,
    )


def interpreter_text() -> str:
    """The documentation topics that come with every Python interpreter, in order of their names.

    The topics quote each other: a paragraph that was there before is left out, so that none is in both the training and
    the held-out text.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    paragraphs = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraph = paragraph.strip("\n")
            if paragraph.strip() and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
    return "\n\n".join(paragraphs) + "\n"


@dataclass(frozen=True)
class Row:
    """A line of the summary: what, how much, and whether it is as required (None: nothing is)."""

    what: str
    value: str
    passed: bool | None = None
    required: str = ""


@dataclass
class Report:
    """What a demonstration found."""

    rows: list[Row] = field(default_factory=list)
    sample: str = ""

    def add(self, what: str, value: str, passed: bool | None = None, required: str = "") -> None:
        """Append a row."""
        self.rows.append(Row(what, value, passed, required))

    @property
    def passed(self) -> bool:
        """Whether every requirement holds."""
        return all(row.passed is not False for row in self.rows)

    def table(self) -> str:
        """The summary as text."""
        words = {None: "", True: "pass", False: "FAIL"}
        lines = [
            (row.what, row.value, f"{words[row.passed]}  {row.required}".strip() if row.required else words[row.passed])
            for row in self.rows
        ]
        widths = [max((len(line[column]) for line in lines), default=0) for column in (0, 1)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in lines)


def run_demo(
    out: str | os.PathLike[str],
    text: str | os.PathLike[str] | None = None,
    seconds: float = SECONDS,
    say: Callable[[str], None] | None = None,
    device: str = "cpu",
) -> Report:
    """Train, judge, export, verify and generate.

    Args:
        out: run folder; must not hold a run.
        text: UTF-8 file or folder; None: the Python interpreter's own documentation.
        seconds: of training.
        say: where progress messages go; standard error by default.
        device: where the model is trained.

    Returns:
        The report, whose ``passed`` says whether all requirements hold.

    Raises:
        ValueError: ``out`` holds a run, or the text is too short.
        ImportError: packages of the extras ``onnx`` and ``train`` are missing.
    """
    begin = time.perf_counter()
    check_installed(("onnx", "onnxscript", "onnxruntime"), "onnx")
    from .export import to_onnx

    folder = Path(out)
    report = Report()
    if text is None:
        text = folder / "text.txt"
        folder.mkdir(parents=True, exist_ok=True)
        text.write_text(interpreter_text(), encoding="utf-8")
    config = demo_training(str(folder), seconds)
    config.data = [str(text)]
    tokenizer = ByteTokenizer()
    data = tokenize(read_texts(config.data), tokenizer, config.held_out)
    if len(data.held_out) < 2:
        raise ValueError(f"text must hold at least 20 bytes, got {len(data.train)}; pass a longer one")
    config.device = device
    trainer = Trainer(config, demo_model(), tokenizer=tokenizer, data=data, say=say)
    model, say = trainer.model, trainer.say
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report.add("parameters", f"{parameters:,}")
    report.add("text", f"{data.train.num_bytes:,} bytes to train on, {data.held_out.num_bytes:,} held out")
    before = evaluate(model, data.held_out, batch_size=64, max_tokens=16384).bits_per_byte
    say(f"training {parameters:,} parameters for {seconds:.0f} s")
    if not trainer.run():
        raise KeyboardInterrupt
    _judge(report, model, data, before)
    report.add(
        "training",
        f"{trainer.step} steps of {config.batch_size} x {config.seq_len} bytes in {trainer.elapsed:.0f} s, "
        + (f"compiled in {trainer.first_step_seconds:.0f} s" if trainer.compiled else "eager: no compiler"),
    )
    exported = MoMForCausalLM.from_pretrained(folder / MODEL)
    for target in TARGETS:
        say(f"exporting for {target} and verifying the graph")
        artifact = folder / target
        parity = to_onnx(exported, artifact, target=target)
        required = f"relative error at most {parity.tolerance:g}"
        report.add(f"parity of {target}", f"{parity.error:.1e}", parity.passed, required)
    say("generating from the exported graph")
    report.sample, runtime_speed = _generate(folder / TARGETS[0], tokenizer)
    report.add("decode, onnxruntime", f"{runtime_speed:,.0f} tokens/s")
    report.add("decode, eager", f"{_decode_speed(exported, exported):,.0f} tokens/s")
    if trainer.compiled:
        compiled = torch.compile(exported, fullgraph=True)
        report.add("decode, compiled", f"{_decode_speed(exported, compiled):,.0f} tokens/s")
    else:
        report.add("decode, compiled", f"not measured: {trainer.compile_problem}")
    for name in ("loss.png", "memories.png"):
        report.add("plot", str(folder / name))
    report.add("whole demonstration", f"{time.perf_counter() - begin:.0f} s")
    return report


def _judge(report: Report, model: MoMForCausalLM, data: TextData, before: float) -> None:
    """Held-out bits per byte against the baselines, what the memories are worth, and how evenly they are used."""
    held_out = data.held_out
    # The same rows for both: many, so that the pieces of 16 bytes are few, and long against 16 bytes.
    rows = max(1, min(64, len(held_out) // 256))
    after = evaluate(model, held_out, batch_size=rows)
    zeroed = evaluate(model, held_out, batch_size=rows, reset_every=RESET_EVERY).bits_per_byte
    worth = zeroed - after.bits_per_byte
    bigram, trigram = (ngram_bits_per_byte(data.train, held_out, 257, order) for order in (2, 3))
    report.add("bits/byte before training", f"{before:.3f}")
    report.add(
        "bits/byte after training",
        f"{after.bits_per_byte:.3f}",
        after.bits_per_byte <= bigram - BELOW_BIGRAM,
        f"at most {bigram - BELOW_BIGRAM:.3f}, the bigram's - {BELOW_BIGRAM}",
    )
    report.add("bits/byte of a bigram model", f"{bigram:.3f}")
    report.add("bits/byte of a trigram model", f"{trigram:.3f}")
    report.add(
        f"bits/byte, memories zeroed every {RESET_EVERY} bytes",
        f"{zeroed:.3f}, {worth:+.3f}",
        worth >= WORTH,
        f"worse by at least {WORTH}",
    )
    for layer, shares in enumerate(after.memory_shares):
        report.add(
            f"memory shares of layer {layer}",
            f"{100 * min(shares):.0f} % to {100 * max(shares):.0f} %",
            SHARE[0] <= min(shares) and max(shares) <= SHARE[1],
            f"each within {100 * SHARE[0]:.0f} % to {100 * SHARE[1]:.0f} %",
        )


def _generate(folder: Path, tokenizer: Tokenizer) -> tuple[str, float]:
    """A continuation of the prompt from an artifact, by onnxruntime, and its speed in tokens/s."""
    from .export import load

    runner = load(folder)
    prompt = [tokenizer.encode(PROMPT)]
    ids: list[int] = []
    for step, token in enumerate(
        runner.generate(prompt, GENERATED, temperature=0.7, top_p=0.9, seed=0, eos_token_id=-1)
    ):
        if step == 1:
            begin = time.perf_counter()  # the first token pays for opening the graphs
        ids.append(int(token[0]))
    speed = (len(ids) - 2) / (time.perf_counter() - begin)
    return PROMPT + tokenizer.decode(ids), speed


@torch.no_grad()
def _decode_speed(model: MoMForCausalLM, step: Callable[..., Any]) -> float:
    """Tokens/s of one sequence, greedy, without the prompt and the first two steps (compilation)."""
    ids = torch.tensor([ByteTokenizer().encode(PROMPT)])
    out = model(ids)
    begin = 0.0
    for index in range(DECODED + 2):
        if index == 2:
            begin = time.perf_counter()
        out = step(out.logits[:, -1:].argmax(-1), state=out.state)
    return DECODED / (time.perf_counter() - begin)


@contextlib.contextmanager
def demo_folder(out: str | os.PathLike[str], keep: bool) -> Iterator[Path]:
    """The run folder of a demonstration, without the run of the one before.

    Raises:
        ValueError: the folder holds something else than a demonstration, or one that ``keep`` protects.
    """
    folder = Path(out)
    marker = folder / ".mom-compile-demo"
    if folder.exists() and any(folder.iterdir()):
        if not marker.exists():
            raise ValueError(f"out must be a new folder, got {str(folder)!r} with other files in it; choose another")
        if keep:
            raise ValueError(f"out must be a new folder with --keep, got {str(folder)!r}; choose another")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    yield folder
