"""The models that are timed, by name."""

from __future__ import annotations

from ..config import MoMConfig

SIZES = {
    "tiny": MoMConfig(vocab_size=257, hidden_size=128, num_hidden_layers=2, num_heads=2, head_dim=64, hidden_ratio=2),
    "50m": MoMConfig(
        vocab_size=16000,
        hidden_size=512,
        num_hidden_layers=8,
        head_dim=128,
        hidden_ratio=3,
        tie_word_embeddings=True,
    ),
    "512m": MoMConfig(
        vocab_size=32000, hidden_size=1024, num_hidden_layers=24, hidden_ratio=3, tie_word_embeddings=True
    ),
    "1b": MoMConfig(vocab_size=32000, hidden_size=1536, num_hidden_layers=22, num_heads=6, hidden_ratio=3),
}


def size(name: str) -> MoMConfig:
    """The configuration of that name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {name!r}; choose one of them")
    return SIZES[name]
