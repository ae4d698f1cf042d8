"""What a model takes in memory, and the least time that a token takes. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..config import MoMConfig

BANDWIDTHS = {
    "Jetson Orin Nano 8GB": 68.0,
    "Jetson Orin NX 16GB": 102.4,
    "Jetson AGX Orin 64GB": 204.8,
    "GeForce RTX 3060 12GB": 360.0,
    "GeForce RTX 4060 8GB": 272.0,
    "GeForce RTX 4090 24GB": 1008.0,
    "GeForce RTX 5090 32GB": 1792.0,
}
"""GB/s by the makers' data sheets."""
WEIGHT_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
USABLE = 0.8
"""Share of the memory that weights and states may take; the rest is for activations, the runtime and the system."""
ENGINES = 2
"""The prefill and the decode engine each hold the weights."""
STATE_BUFFERS = 2
"""A step reads one and writes the other."""


def parameters(config: MoMConfig) -> dict[str, int]:
    """How many weights there are: ``embedding``, ``matrices`` (a token reads all of them), ``float32`` (router, beta
    and decay, which stay so) and ``other`` (norms, convolutions). Tied embeddings count as matrices alone."""
    hidden, keys = config.hidden_size, config.num_heads * config.head_dim
    values = config.value_heads * config.value_dim
    groups = 1 if config.single_kv_proj else config.total_memories
    matrices = other = small = 0
    for layer in range(config.num_hidden_layers):
        rule = config.rule(layer)
        matrices += hidden * keys + groups * (keys + values) * hidden + values * hidden
        matrices += values * hidden if config.use_output_gate else 0
        matrices += 3 * hidden * config.mlp_size
        small += config.num_memories * hidden
        small += groups * config.value_heads * hidden if rule in ("delta", "gated_delta") else 0
        if rule in ("mamba2", "gated_delta"):
            small += groups * config.value_heads * hidden + 2 * config.value_heads
        other += 2 * hidden + config.value_dim
        other += config.conv_channels * config.conv_size if config.use_short_conv else 0
    table = config.vocab_size * hidden
    return {
        "embedding": 0 if config.tie_word_embeddings else table,
        "matrices": matrices + table,
        "float32": small,
        "other": other + hidden,
    }


def state_bytes(config: MoMConfig) -> int:
    """Of one sequence: float32 states and convolution inputs of all layers."""
    memories = config.total_memories
    recurrent = memories * config.value_heads * config.head_dim * config.value_dim
    conv = memories * config.conv_channels * (config.conv_size - 1) if config.use_short_conv else 0
    return 4 * config.num_hidden_layers * (recurrent + conv)


def weight_bytes(config: MoMConfig, precision: str) -> dict[str, int]:
    """``total``, and ``read`` by one token: all but the embedding table, of which it reads a row.

    int8 and int4 are of the matrices alone, int4 with a float16 scale for every 128 weights; the rest is float16.
    """
    counts, bits = parameters(config), WEIGHT_BITS[precision]
    rest = max(bits, 16) // 8
    # Weights below 16 bits are those of products: a table tied to the head is then stored beside it.
    embedding = config.vocab_size * config.hidden_size if bits < 16 else counts["embedding"]
    matrices = counts["matrices"] * bits // 8
    if precision == "int4":
        matrices += counts["matrices"] // 128 * 2
    read = matrices + 4 * counts["float32"] + rest * counts["other"]
    return {"total": read + rest * embedding, "read": read}


def floor_ms(config: MoMConfig, precision: str, bandwidth: float, batch: int = 1, touched: bool = False) -> float:
    """Milliseconds that a decode step takes to move its bytes at ``bandwidth`` GB/s: the weights once, and each
    sequence's states read and written, of which the ``touched`` graph moves the selected memories twice each way."""
    moved = 2 * state_bytes(config)
    if touched:
        moved = 2 * moved * (config.topk + config.shared_mem) // config.total_memories
    return (weight_bytes(config, precision)["read"] + batch * moved) / bandwidth / 1e6


def largest_batch(config: MoMConfig, precision: str, memory: float) -> int:
    """Sequences that fit into ``memory`` GB beside both engines; 0 where the weights alone do not."""
    free = USABLE * memory * 1e9 - ENGINES * weight_bytes(config, precision)["total"]
    return max(0, int(free // (STATE_BUFFERS * state_bytes(config))))


def budget(config: MoMConfig, precision: str, touched: bool = False) -> dict[str, Any]:
    """For the manifest: bytes, and the floor in ms per token at batch 1 for each named device."""
    return {
        "state_bytes_per_sequence": state_bytes(config),
        "weight_bytes": weight_bytes(config, precision)["total"],
        "weight_bytes_read_per_token": weight_bytes(config, precision)["read"],
        "floor_ms_per_token": {
            device: round(floor_ms(config, precision, bandwidth, touched=touched), 3)
            for device, bandwidth in BANDWIDTHS.items()
        },
        "bandwidth_gb_per_s": BANDWIDTHS,
    }


def budget_table(config: MoMConfig) -> Iterator[tuple[str, ...]]:
    """Rows: precision, weights, state of a sequence, largest batch in 8, 16 and 64 GB, floor of a token on an Orin."""
    orin = "Jetson AGX Orin 64GB"
    yield ("precision", "weights", "state", "batch in 8 GB", "16 GB", "64 GB", f"ms per token, {orin}")
    for precision in WEIGHT_BITS:
        yield (
            precision,
            f"{weight_bytes(config, precision)['total'] / 1e6:.1f} MB",
            f"{state_bytes(config) / 1e6:.2f} MB",
            *(str(largest_batch(config, precision, memory)) for memory in (8, 16, 64)),
            f"{floor_ms(config, precision, BANDWIDTHS[orin]):.2f}",
        )
