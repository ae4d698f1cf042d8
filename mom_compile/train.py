"""Training: one compiled step, runs that stop and go on exactly, and their records."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ._extras import check_installed, require
from ._files import atomic_directory, write_json
from .captured_step import CapturedStep
from .checkpoint import (
    TrainerState,
    load_model,
    load_optimizer,
    plain,
    read_trainer_state,
    save_checkpoint,
)
from .config import MoMConfig
from .data import TextData, WindowSampler, read_texts, tokenize
from .evaluate import bits_per_byte, choice_counts, evaluate, shares
from .losses import balance_loss
from .memory_policy import block_policies
from .model import MoMForCausalLM
from .ops import linear_cross_entropy
from .optim import clip_gradients, learning_rate_at, make_adamw
from .plots import plot_run
from .precompile import precompiling
from .pretrained import write_model
from .run_folder import CHECKPOINT, MODEL
from .tokenizer import Tokenizer, load_tokenizer

METRICS_FILE = "metrics.jsonl"
COMPILE = ("block", "model", "none")
CHANGEABLE = (
    "data",
    "max_steps",
    "max_seconds",
    "learning_rate",
    "clip",
    "compile",
    "memory",
    "cuda_graph",
    "device",
    "log_every",
    "eval_every",
    "save_every",
    "progress",
)
"""Settings that a resumed run may change; the others belong to what makes it the same run."""


@dataclass(kw_only=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        data: UTF-8 files and folders. out: run folder.
        tokenizer: ``byte`` or a tokenizer.json file.
        batch_size: B, windows of a step. seq_len: L, predictions in a window.
        accumulate: the batch goes through in this many parts, whose gradients add up; divides batch_size.
        max_steps: stop after this many steps, or None. max_seconds: stop after this much training, or None; the first
            step after a start, in which torch.compile works, does not count. With both, what comes first.
        learning_rate: its peak. final_ratio: its end, as a share of the peak. warmup_steps: linear warm-up.
        weight_decay, beta1, beta2: of AdamW. clip: largest global norm of the gradients, 0 for no clipping.
        seed: of the initial weights and of the windows.
        held_out: share of every document that is held out.
        log_every, eval_every, save_every: in steps; 0 turns evaluation or saving within the run off (the end of a run
            always does both).
        compile: torch.compile every ``block`` (one graph for them all: a short first step), the whole ``model``, or
            ``none``; runs eagerly, and says so, where there is no compiler.
        memory: what is kept for the backward, as :meth:`MoMForCausalLM.set_memory_policy` takes it.
        cuda_graph: forward and backward as one CUDA graph from the second step on; no effect elsewhere.
        device: such as cpu or cuda; None: CUDA if there is one.
        bf16: bfloat16 autocast; None: on CUDA devices that have it. Weights and their updates stay float32.
        progress: show a progress bar.
    """

    data: list[str] = field(default_factory=list)
    out: str = "runs/mom"
    tokenizer: str = "byte"
    batch_size: int = 16
    seq_len: int = 256
    accumulate: int = 1
    max_steps: int | None = 1000
    max_seconds: float | None = None
    learning_rate: float = 2e-3
    final_ratio: float = 0.1
    warmup_steps: int = 20
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    held_out: float = 0.05
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 200
    compile: str = "block"
    memory: str = "auto"
    cuda_graph: bool = True
    device: str | None = None
    bf16: bool | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; set a positive number")
        for name in ("eval_every", "save_every", "warmup_steps", "weight_decay", "clip", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}; 0 turns it off")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_size = {self.batch_size}, got {self.accumulate}; change one of them"
            )
        if self.max_steps is None and self.max_seconds is None:
            raise ValueError("max_steps must be given where max_seconds is not, got neither; set one of them")
        for name in ("max_steps", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}; leave it out for no limit")
        if self.compile not in COMPILE:
            raise ValueError(f"compile must be one of {', '.join(COMPILE)}, got {self.compile!r}; block starts fastest")
        block_policies(self.memory, 0)  # refuses what is no policy
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}; 2e-3 suits small models")
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"final_ratio must lie in [0, 1], got {self.final_ratio}; 0.1 is usual")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The settings of a config.json or trainer.json.

        Raises:
            ValueError: an unknown key, or a value out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"config must hold known settings, got {', '.join(unknown)}; it is of another version")
        return cls(**values)


def compiler_problem(device: torch.device | str) -> str | None:
    """Why ``torch.compile`` cannot make code for a device here, or None if it can."""
    kind = torch.device(device).type
    if kind == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed, so torch.compile cannot make GPU kernels (pip install triton)"
        return None
    from torch._inductor import cpp_builder, exc

    try:
        found = cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError):
        found = ""
    if not found or shutil.which(found) is None:
        return "no C++ compiler was found, which torch.compile needs on a CPU (install g++ or clang, or set CXX)"
    return None


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step.

    Attributes:
        loss: nats per token. aux_loss: balance loss. grad_norm: before clipping.
        choices: ``[L, M]`` int64, the router's choices by memory.
        num_bytes: bytes of text that the targets stand for. num_tokens: targets.
    """

    loss: float
    aux_loss: float
    grad_norm: float
    choices: Tensor
    num_bytes: int
    num_tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Exact, whatever the tokenizer."""
        return bits_per_byte(self.loss * self.num_tokens, self.num_bytes)


def window_loss(model: MoMForCausalLM, windows: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Mean cross entropy of windows ``[B, L+1]`` int64, balance loss (both float32 scalars), router logits by layer."""
    x, _, router_logits = model.hidden_states(windows[:, :-1], detach_state=True)
    cross_entropy = linear_cross_entropy(x, model.lm_head.weight, windows[:, 1:])
    return cross_entropy, balance_loss(router_logits, model.config.topk), router_logits


class Trainer:
    """A training run in a folder.

    Args:
        config: settings of the run.
        model_config: of a new model; None on resuming.
        resume: go on from ``out/checkpoint``. Settings outside :data:`CHANGEABLE` must be those of the run.
        tokenizer: None loads the one that ``config`` names.
        data: None reads the files that ``config`` names.
        say: where messages go; standard error by default.

    Raises:
        ValueError: settings, text or a checkpoint that do not fit.
        ImportError: tqdm, matplotlib or tokenizers are needed and missing.

    The run folder holds config.json, metrics.jsonl, checkpoint/ (the last state, to resume), model/ (the weights with
    the lowest held-out bits per byte, for generate and export), loss.png and memories.png.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: MoMConfig | None = None,
        *,
        resume: bool = False,
        tokenizer: Tokenizer | None = None,
        data: TextData | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        check_installed(("matplotlib",), "train")
        self._tqdm = require("tqdm", "train").tqdm
        self.say = say or (lambda message: self._tqdm.write(message, file=sys.stderr))
        saved = self._saved_state(resume)
        self.tokenizer = tokenizer or load_tokenizer(self._tokenizer_source(resume))
        self.data = data or tokenize(read_texts(config.data), self.tokenizer, config.held_out)
        if saved and saved.data_fingerprint != self.data.fingerprint:
            raise ValueError(
                f"data must be the text that the run in {self.folder} began with, got another (its SHA-256 is "
                f"{self.data.fingerprint[:12]}, not {saved.data_fingerprint[:12]}); restore the files or start anew"
            )
        self.sampler = WindowSampler(self.data.train, config.batch_size, config.seq_len, config.seed)
        if saved:
            self.model = load_model(self.folder / CHECKPOINT, self.device)
        else:
            self.model = self._new_model(model_config)
        self.optimizer = make_adamw(self.model, config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
        self.step, self.elapsed = 0, 0.0
        self.best_bits: float | None = None
        if saved:
            load_optimizer(self.folder / CHECKPOINT, self.model, self.optimizer)
            self.step, self.elapsed, self.best_bits = saved.step, saved.elapsed, saved.best_bits
        self.compile_problem = "turned off" if config.compile == "none" else compiler_problem(self.device)
        if self.compile_problem and config.compile != "none":
            self.say(f"not compiling: {self.compile_problem}; training runs eagerly, which is slower")
        self.first_step_seconds = 0.0
        self.last_step: StepResult | None = None
        self._loss: Callable[..., Any] = window_loss
        self._captured: CapturedStep | None = None
        self._warm = False
        self.model.set_memory_policy(config.memory)
        if self.compiled and config.compile == "model":
            self._loss = torch.compile(window_loss, fullgraph=True)
        elif self.compiled:
            for block in self.model.model.layers:
                block.compile(fullgraph=True)

    @property
    def compiled(self) -> bool:
        """Whether steps run through torch.compile."""
        return self.compile_problem is None

    def _saved_state(self, resume: bool) -> TrainerState | None:
        folder = self.folder / CHECKPOINT
        if not resume:
            if folder.exists():
                raise ValueError(
                    f"out must be the folder of a new run, got {str(self.folder)!r} with a checkpoint in it; "
                    "pass --resume to go on with it, or choose another folder"
                )
            return None
        saved = read_trainer_state(folder)
        for name, value in self.config.to_dict().items():
            if name not in (*CHANGEABLE, "out", "tokenizer") and saved.config.get(name, value) != value:
                raise ValueError(
                    f"{name} must stay {saved.config[name]} in a resumed run, got {value}; start a new run to change it"
                )
        return saved

    def _tokenizer_source(self, resume: bool) -> str:
        if resume and self.config.tokenizer != "byte":
            return str(self.folder / CHECKPOINT / "tokenizer.json")
        return self.config.tokenizer

    def _new_model(self, model_config: MoMConfig | None) -> MoMForCausalLM:
        if model_config is None:
            raise ValueError("model_config must be given for a new run, got None; pass a MoMConfig")
        if model_config.vocab_size < self.tokenizer.vocab_size:
            raise ValueError(
                f"vocab_size must be at least the tokenizer's {self.tokenizer.vocab_size}, "
                f"got {model_config.vocab_size}; set it in the model's config"
            )
        torch.manual_seed(self.config.seed)
        return MoMForCausalLM(model_config).to(self.device).train()

    # ---- one step ----

    def train_step(self) -> StepResult:
        """Take the next optimizer step.

        Raises:
            ValueError: a loss or a gradient that is not finite; the weights are those before the step.
        """
        config = self.config
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        array, num_bytes = self.sampler.windows(self.step)
        windows = torch.from_numpy(array).to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        loss, aux_loss, choices = self._run_gradients(windows)
        norm = clip_gradients(self.model, config.clip)
        # One transfer for the three: each would make a GPU wait.
        mean_loss, mean_aux, grad_norm = torch.stack([loss, aux_loss, norm]).tolist()
        if not all(map(math.isfinite, (mean_loss, mean_aux, grad_norm))):
            raise ValueError(
                f"loss and gradients must be finite, got loss {mean_loss} and gradient norm {grad_norm} at step "
                f"{self.step}; lower --learning-rate ({config.learning_rate}), or resume from the checkpoint before"
            )
        self.optimizer.step()
        self.step += 1
        return StepResult(
            mean_loss,
            mean_aux,
            grad_norm,
            choices.clone(),  # the next replay overwrites them
            num_bytes,
            windows.shape[0] * (windows.shape[1] - 1),
        )

    def _run_gradients(self, windows: Tensor) -> tuple[Tensor, ...]:
        """:meth:`_gradients`, captured on a GPU once its first call has compiled everything."""
        if self.device.type != "cuda" or not self.config.cuda_graph:
            return self._gradients(windows)
        if self._captured is not None:
            return self._captured(windows)
        if self.compiled and not self._warm:
            self._warm = True
            return self._gradients(windows)
        self._captured = CapturedStep(self._gradients, self.model.parameters(), windows)
        return self._captured(windows)

    def _gradients(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add up the gradients of windows ``[B, L+1]``; loss, balance loss and the router's choices by memory."""
        config = self.config
        losses, aux_losses, choices = [], [], []
        for part in windows.chunk(config.accumulate):
            with self._autocast():
                loss, aux_loss, router_logits = self._loss(self.model, part)
                total = loss + self.model.config.aux_loss_scale * aux_loss
            (total / config.accumulate).backward()
            losses.append(loss.detach())
            aux_losses.append(aux_loss.detach())
            choices.append(choice_counts(router_logits, self.model.config.topk))
        return torch.stack(losses).mean(), torch.stack(aux_losses).mean(), torch.stack(choices).sum(0)

    def _first_step(self) -> StepResult:
        batch = self.config.batch_size // self.config.accumulate
        with precompiling(self.model, batch, self.config.seq_len, self._autocast_dtype()):
            return self.train_step()

    def _autocast_dtype(self) -> torch.dtype | None:
        bf16 = self.config.bf16
        if bf16 is None:
            bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else None

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = self._autocast_dtype()
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def progress(self) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        config = self.config
        by_steps = self.step / config.max_steps if config.max_steps else 0.0
        by_time = self.elapsed / config.max_seconds if config.max_seconds else 0.0
        return max(by_steps, by_time)

    def learning_rate(self) -> float:
        """Of the next step."""
        config = self.config
        return learning_rate_at(
            self.step, self.progress(), config.learning_rate, config.warmup_steps, config.final_ratio
        )

    # ---- the run ----

    def run(self) -> bool:
        """Train until a limit is reached or Ctrl-C asks to stop; save either way.

        Returns:
            True if the run is complete, False if it was interrupted.

        A second Ctrl-C stops at once; the last checkpoint stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_config()
        complete = False
        first, start_step = True, self.step
        if self.compiled:
            self.say("compiling the training step: about a minute, less the next time")
        with _InterruptFlag() as interrupt, self._metrics() as metrics, self._bar() as bar:
            since, since_tokens = time.perf_counter(), 0
            while self.progress() < 1 and not interrupt.raised:
                begin = time.perf_counter()
                rate = self.learning_rate()
                result = self.last_step = self._first_step() if first else self.train_step()
                seconds = time.perf_counter() - begin
                if first and self.compiled:
                    # Compilation is no training: neither the budget nor the speed counts it.
                    self.first_step_seconds = seconds
                    since = time.perf_counter()
                else:
                    self.elapsed += seconds
                    since_tokens += result.num_tokens
                first = False
                self._advance(bar)
                if self.step % self.config.log_every == 0 or self.step == start_step + 1:
                    now = time.perf_counter()
                    speed = since_tokens / (now - since) if since_tokens else 0.0
                    since, since_tokens = now, 0
                    self._log(metrics, bar, result, rate, speed)
                if self.config.eval_every and self.step % self.config.eval_every == 0 and self.progress() < 1:
                    self._evaluate(metrics)
                    since, since_tokens = time.perf_counter(), 0
                if self.config.save_every and self.step % self.config.save_every == 0 and self.progress() < 1:
                    self.save()
                    since, since_tokens = time.perf_counter(), 0
            complete = self.progress() >= 1
            if complete or not (self.folder / MODEL).exists():
                self._evaluate(metrics)
            self.save()
        plot_run(self.folder)
        if not complete:
            self.say(f"stopped at step {self.step}; go on with:\n    {self.resume_command()}")
        return complete

    def resume_command(self) -> str:
        """The shell command that goes on with this run."""
        return f"mom-compile train --out {shlex.quote(self.config.out)} --resume"

    def save(self) -> None:
        """Write ``out/checkpoint``."""
        state = TrainerState(self.step, self.elapsed, self.best_bits, self.data.fingerprint, self.config.to_dict())
        save_checkpoint(self.folder / CHECKPOINT, self.model, self.optimizer, state, self.tokenizer)

    def _evaluate(self, metrics: TextIO) -> None:
        """Judge the model on the held-out text and keep it in ``out/model`` if it is the best so far."""
        if len(self.data.held_out) > 1:
            with self._autocast():
                result = evaluate(
                    self.model, self.data.held_out, batch_size=self.config.batch_size, seq_len=self.config.seq_len
                )
            bits = result.bits_per_byte
            record = {"step": self.step, "held_out_bits_per_byte": bits, "memory_shares": result.memory_shares}
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            self.say(f"step {self.step}: {bits:.3f} bits per byte on {result.num_bytes:,} held-out bytes")
            if self.best_bits is not None and bits >= self.best_bits:
                return
            self.best_bits = bits
        with atomic_directory(self.folder / MODEL, keep=False) as folder:
            write_model(self.model, folder)
            self.tokenizer.save(folder)

    def _log(self, metrics: TextIO, bar: Any, result: StepResult, rate: float, speed: float) -> None:
        record = {
            "step": self.step,
            "loss": result.loss,
            "aux_loss": result.aux_loss,
            "bits_per_byte": result.bits_per_byte,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "tokens_per_second": round(speed, 1),
            "elapsed": round(self.elapsed, 3),
            "memory_shares": [[round(share, 4) for share in layer] for layer in shares(result.choices.cpu())],
        }
        metrics.write(json.dumps(record) + "\n")
        metrics.flush()
        bar.set_postfix_str(
            f"loss {result.loss:.3f}, {result.bits_per_byte:.3f} bits/byte, {speed:,.0f} tokens/s", refresh=True
        )

    def _write_config(self) -> None:
        write_json(self.folder / "config.json", {"train": self.config.to_dict(), "model": self.model.config.to_dict()})

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[TextIO]:
        """metrics.jsonl, without what an interrupted run wrote after the checkpoint that it resumes from."""
        path = self.folder / METRICS_FILE
        kept = []
        if self.step and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                    if json.loads(line)["step"] <= self.step:
                        kept.append(line + "\n")
        with path.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            yield file

    def _bar(self) -> Any:
        config = self.config
        seconds = round(config.max_seconds or 0)
        by_time = None if config.max_steps else "{l_bar}{bar}| {n_fmt}/{total_fmt} s{postfix}"
        return self._tqdm(
            total=config.max_steps or seconds,
            initial=self.step if config.max_steps else min(int(self.elapsed), seconds),
            unit="step",
            bar_format=by_time,
            disable=not config.progress,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def _advance(self, bar: Any) -> None:
        done = self.step if self.config.max_steps else min(int(self.elapsed), bar.total)
        if done > bar.n:
            bar.update(done - bar.n)


class _InterruptFlag:
    """Ctrl-C sets ``raised``, so that a step is never cut in half; the second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.raised = False
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> _InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, *_: object) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
