"""Training on a CUDA device: no waits, CUDA graphs, even steps, memory policies, the CPU's loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_config
from support import relative
from torch import Tensor
from torch._dynamo.utils import counters

from mom_compile import MoMConfig, MoMForCausalLM
from mom_compile.captured_step import CapturedStep
from mom_compile.optim import clip_gradients, make_adamw
from mom_compile.train import TrainConfig, Trainer, window_loss

pytestmark = pytest.mark.gpu
POLICIES = ("save", "selective", "block")


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.set_default_device(before)


def _model(layers: int = 2, **changes: Any) -> MoMForCausalLM:
    sizes: dict[str, Any] = {"vocab_size": 257, "hidden_size": 128, "num_heads": 2, "head_dim": 64, "hidden_ratio": 2}
    torch.manual_seed(0)
    return MoMForCausalLM(MoMConfig(**{**sizes, "num_hidden_layers": layers, **changes})).cuda().train()


def _compile_blocks(model: MoMForCausalLM) -> None:
    for block in model.model.layers:
        block.compile(fullgraph=True)


def _step(model: MoMForCausalLM, optimizer: torch.optim.Optimizer, windows: Tensor) -> Tensor:
    """One optimizer step as the trainer takes it."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
        loss, aux_loss, _ = window_loss(model, windows)
    (loss + model.config.aux_loss_scale * aux_loss).backward()
    clip_gradients(model, 1.0)
    optimizer.step()
    return loss.detach()


def _windows(count: int, batch: int = 4, length: int = 200) -> list[Tensor]:
    return [torch.randint(0, 257, (batch, length + 1)) for _ in range(count)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_training_step_waits_for_nothing(policy: Any, compiled: bool) -> None:
    model = _model()
    model.set_memory_policy(policy)
    if compiled:
        _compile_blocks(model)
    optimizer = make_adamw(model, 1e-3, 0.1)
    windows = _windows(4)
    for each in windows[:3]:
        _step(model, optimizer, each)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(model, optimizer, windows[3])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not counters["graph_break"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_training_step_as_a_cuda_graph(compiled: bool) -> None:
    """Replays leave the losses and the parameters that the same steps leave without a graph."""
    models = {"plain": _model()}
    models["captured"] = copy.deepcopy(models["plain"])
    optimizers = {name: make_adamw(model, 1e-3, 0.1) for name, model in models.items()}
    for model in models.values():
        model.set_memory_policy("selective")
        if compiled:
            _compile_blocks(model)

    def gradients(model: MoMForCausalLM, windows: Tensor) -> tuple[Tensor, ...]:
        loss, aux_loss, _ = window_loss(model, windows)
        (loss + 0.01 * aux_loss).backward()
        return loss.detach(), aux_loss.detach()

    windows = _windows(8)
    captured = CapturedStep(
        lambda windows: gradients(models["captured"], windows), models["captured"].parameters(), windows[0]
    )
    for each in windows:
        optimizers["plain"].zero_grad(set_to_none=True)
        expected = gradients(models["plain"], each)
        optimizers["captured"].zero_grad(set_to_none=True)
        assert all(torch.equal(a, b) for a, b in zip(captured(each), expected, strict=True))
        for optimizer in optimizers.values():
            optimizer.step()
    for (name, a), b in zip(models["plain"].named_parameters(), models["captured"].parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="captured shapes"):
        captured(windows[0][:1])


def test_a_run_with_and_without_a_cuda_graph(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 23) for i in range(20000)))
    losses = []
    for cuda_graph in (False, True):
        config = TrainConfig(
            data=[str(text)], out=str(tmp_path / f"run-{cuda_graph}"), batch_size=4, seq_len=64, accumulate=2,
            max_steps=8, log_every=1, cuda_graph=cuda_graph, progress=False, device="cuda",
        )  # fmt: skip
        trainer = Trainer(config, tiny_config(vocab_size=257))
        losses.append([trainer.train_step().loss for _ in range(8)])
        assert (trainer._captured is not None) == cuda_graph
    assert losses[0] == losses[1]


def test_policies_keep_less_and_give_the_same_gradients() -> None:
    model = _model(3)  # float32: bfloat16 rounds elsewhere in another graph, and a choice of the router may flip
    ids = torch.randint(0, 257, (2, 2048))
    peaks: dict[tuple[bool, str], int] = {}
    for compiled in (False, True):
        expected: list[Tensor] = []
        for policy in POLICIES:
            torch._dynamo.reset()
            model.set_memory_policy(policy)
            if compiled:
                _compile_blocks(model)
            for _ in range(2):
                model.zero_grad()
                torch.cuda.reset_peak_memory_stats()
                model(ids, labels=ids).loss.backward()
            peaks[compiled, policy] = torch.cuda.max_memory_allocated()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            if not expected:
                expected = gradients
            elif not compiled:
                assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
            else:
                assert all(relative(a, b) < 1e-3 for a, b in zip(gradients, expected, strict=True))
        assert peaks[compiled, "block"] < peaks[compiled, "selective"] < peaks[compiled, "save"]


def _event_times(step: Callable[[int], object], steps: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for index in range(steps):
        step(index)
        events[index + 1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events[:-1], events[1:], strict=True)]


def test_steps_with_random_documents_are_even() -> None:
    """The slowest of steps 10 to 200 within 1.2 of the median: no recompilation, no wait, no slow path.

    As one CUDA graph, which takes the documents as an input: launched one by one, a step is as even as the CPU is free.
    """
    model = _model(3, hidden_size=512, num_heads=4, head_dim=128).bfloat16()
    _compile_blocks(model)
    length, documents = 16384, 24
    ids = torch.randint(0, 257, (1, length))
    cuts = torch.sort(torch.randint(0, length + 1, (200, documents - 1))).values
    ends = torch.tensor([0, length]).expand(200, 2)
    bounds = torch.cat([ends[:, :1], cuts, ends[:, 1:]], 1)

    def step(ids: Tensor, bounds: Tensor) -> tuple[Tensor]:
        loss = model(ids, labels=ids, cu_seqlens=bounds).loss
        assert loss is not None
        loss.backward()
        return (loss.detach(),)

    expected = step(ids, bounds[7])[0].clone()
    model.zero_grad()
    captured = CapturedStep(step, model.parameters(), ids, bounds[0])
    assert torch.equal(captured(ids, bounds[7])[0], expected)
    times = _event_times(lambda index: captured(ids, bounds[index]), 200)[10:]
    median = sorted(times)[len(times) // 2]
    print(f"median {median:.2f} ms, slowest {max(times):.2f}")
    assert max(times) <= 1.2 * median, f"median {median:.2f} ms, slowest {max(times):.2f} ms"


def _curve(device: str, windows: list[Tensor]) -> Tensor:
    torch.manual_seed(0)
    with torch.device("cpu"):
        config = tiny_config(vocab_size=64, num_hidden_layers=1, head_dim=16, initializer_range=0.02)
        model = MoMForCausalLM(config).train()
    model = model.to(device)
    optimizer = make_adamw(model, 5e-3, 0.1)
    losses = [_step(model, optimizer, each.to(device)) for each in windows]
    return torch.stack(losses).cpu()


def test_300_steps_give_the_loss_of_the_cpu() -> None:
    """Triton kernels under bfloat16 autocast against the PyTorch implementations in float32: one curve within noise."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(1)
        text = torch.randint(0, 64, (40,), generator=generator).repeat(60)  # a period that a memory learns to recall
        noise = torch.rand(text.shape, generator=generator) < 0.1
        text = torch.where(noise, torch.randint(0, 64, text.shape, generator=generator), text)
        starts = torch.randint(0, len(text) - 66, (300, 4), generator=generator)
        windows = [torch.stack([text[start : start + 66] for start in row.tolist()]) for row in starts]
    expected, actual = _curve("cpu", windows), _curve("cuda", windows)
    assert expected[-50:].mean() < 0.6 * expected[:10].mean()
    assert (actual[:20] - expected[:20]).abs().max() < 0.05
    smooth = [curve.view(12, 25).mean(1) for curve in (actual, expected)]
    spread = expected.view(12, 25).std(1) / 5  # standard error of a mean of 25 steps
    assert ((smooth[0] - smooth[1]).abs() < 0.02 * smooth[1] + 2 * spread).all(), (smooth, spread)
