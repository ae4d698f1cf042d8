"""A plain transformer of as many parameters, from torch's own attention: what decoding costs with a growing cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mom_compile import MoMConfig, MoMForCausalLM
from mom_compile.bench.measure import median_ms

NAME = "transformer"
NOTE = "compiled, CUDA graph, the fastest backend of scaled_dot_product_attention"
HEAD = 64
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
SPARE = 0.95


def missing() -> str:
    return ""


def _parameters(config: MoMConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MoMForCausalLM(config).parameters())


class Block(nn.Module):
    """Attention and SwiGLU around it; attention itself is called between the two parts."""

    def __init__(self, hidden: int, intermediate: int, eps: float) -> None:
        super().__init__()
        self.heads = hidden // HEAD
        self.attn_norm, self.mlp_norm = nn.RMSNorm(hidden, eps=eps), nn.RMSNorm(hidden, eps=eps)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)


def before(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, D]`` -> q, k, v ``[B, H, 1, 64]``, q and k turned by their position."""
    q, k, v = block.qkv(block.attn_norm(x)).unflatten(-1, (3, block.heads, 1, HEAD)).unbind(1)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    return turn(q), turn(k), v


def after(block: Block, x: Tensor, o: Tensor) -> Tensor:
    """Output projection and MLP on the residual stream ``[B, D]``."""
    x = x + block.out(o.flatten(1))
    gate, up = block.gate_up(block.mlp_norm(x)).chunk(2, -1)
    return x + block.down(F.silu(gate) * up)


class Transformer(nn.Module):
    """Llama-like, its MLP as wide as makes the parameters equal."""

    def __init__(self, config: MoMConfig) -> None:
        super().__init__()
        hidden, layers = config.hidden_size, config.num_hidden_layers
        embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
        each = (_parameters(config) - embeddings) / layers - 4 * hidden**2
        intermediate = max(round(each / (3 * hidden) / 64) * 64, 64)
        self.embedding = nn.Embedding(config.vocab_size, hidden)
        self.blocks = nn.ModuleList([Block(hidden, intermediate, config.norm_eps) for _ in range(layers)])
        self.norm = nn.RMSNorm(hidden, eps=config.norm_eps)
        self.head = nn.Linear(hidden, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight


def _fastest(q: Tensor, k: Tensor, v: Tensor) -> SDPBackend:
    """The backend that attends fastest; one that refuses the shape is out."""
    times = {}
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                times[backend] = median_ms(lambda: F.scaled_dot_product_attention(q, k, v), q.device, 5)
        except RuntimeError:
            continue
    return min(times, key=lambda backend: times[backend])


def decoder(
    config: MoMConfig, device: torch.device, dtype: torch.dtype, compile: bool = True
) -> Callable[[int, int], tuple[Callable[[], object], int]]:
    """See ``mom_compile.bench.peers``. The new token is the last of ``context``: no mask is needed."""
    model = Transformer(config).to(device, dtype).eval()
    first, last = (torch.compile(f, dynamic=False) for f in (before, after)) if compile else (before, after)
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    if not config.tie_word_embeddings:
        del weights[model.embedding.weight.data_ptr()]

    @torch.no_grad()
    def build(batch: int, context: int) -> tuple[Callable[[], object], int]:
        shape = (batch, config.hidden_size // HEAD, context, HEAD)
        cache_bytes = 2 * config.num_hidden_layers * batch * config.hidden_size * context * dtype.itemsize
        if device.type == "cuda":
            room = torch.cuda.mem_get_info(device)[0]
            if cache_bytes > SPARE * room:
                raise MemoryError(f"{cache_bytes / 2**30:.0f} GiB of keys and values, {room / 2**30:.0f} GiB free")
        caches = [
            tuple(torch.empty(shape, dtype=dtype, device=device).normal_() for _ in range(2)) for _ in model.blocks
        ]
        angle = (context - 1) * 10000.0 ** -(torch.arange(0, HEAD, 2, device=device) / HEAD)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        ids = torch.randint(0, config.vocab_size, (batch,), device=device)
        backend = _fastest(caches[0][0][:, :, -1:], *caches[0])

        @torch.no_grad()
        def step() -> Tensor:
            x = model.embedding(ids)
            for block, (keys, values) in zip(model.blocks, caches, strict=True):
                q, k, v = first(block, x, cos, sin)
                keys[:, :, -1:].copy_(k)
                values[:, :, -1:].copy_(v)
                x = last(block, x, F.scaled_dot_product_attention(q, keys, values))
            logits = model.head(model.norm(x))
            ids.copy_(logits.argmax(-1))
            return logits

        with sdpa_kernel(backend):
            step()
            if device.type != "cuda":
                return step, sum(weights.values()) + cache_bytes
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()

        def replay() -> object:
            graph.replay()
            return caches, ids  # the graph itself holds only their addresses

        return replay, sum(weights.values()) + cache_bytes

    return build
