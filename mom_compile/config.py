"""The configuration of a MoM model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

UPDATE_RULES = ("linear", "retention", "mamba2", "delta", "gated_delta")
PLANNED_RULES = ("gla", "hgrn2", "kda", "rwkv7", "ttt", "titans")

# Keys of other libraries' config.json that change nothing here.
_IGNORED_KEYS = frozenset(
    (
        "architectures attn_mode capacity dtype torch_dtype fuse_cross_entropy fuse_linear_cross_entropy fuse_norm "
        "fuse_swiglu max_position_embeddings mom_backend transformers_version use_cache use_layer_wise_balance "
        "use_l2warp output_attentions output_hidden_states return_dict chunk_size_feed_forward id2label label2id "
        "is_encoder_decoder problem_type attnres_block_size hidden_act"
    ).split()
)


@dataclass(kw_only=True)
class MoMConfig:
    """Sizes and choices of a MoM language model; field names as in flash-linear-attention's ``MomConfig``.

    Attributes:
        vocab_size: entries of the embedding.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: blocks.
        num_heads: H, key heads. num_v_heads: HV, value heads, a multiple of H (None: H).
        head_dim: K, key dimension of a head, 1 to 256.
        expand_v: V = head_dim * expand_v, a whole number from 1 to 256.
        num_memories: M, routed memories. topk: k, memories each token selects, 1 to M.
        shared_mem: one more memory that every token selects.
        single_kv_proj: one key/value projection serves all memories.
        update_rule: one rule, or one per layer: linear, retention, mamba2, delta, gated_delta.
        use_short_conv, conv_size: the short convolution of each memory and its width W, 2 to 16.
        use_output_gate: gate the normalised output with SiLU.
        hidden_ratio, intermediate_size: width of the MLP: 2/3 * hidden_ratio * D rounded up to a multiple of 256, or
            given.
        norm_eps: added to the mean square in every RMSNorm.
        tie_word_embeddings: the output projection is the embedding.
        initializer_range: standard deviation of the initial weights.
        aux_loss_scale: factor of the balance loss.
        attn: hybrid attention layers; not supported yet, must be None.
        bos_token_id, eos_token_id, pad_token_id: special tokens or None.

    Raises:
        ValueError: a value outside its range, or one that does not fit another.
    """

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_heads: int = 4
    num_v_heads: int | None = None
    head_dim: int = 256
    expand_v: float = 1.0
    num_memories: int = 4
    topk: int = 2
    shared_mem: bool = True
    single_kv_proj: bool = False
    update_rule: str | Sequence[str] = "gated_delta"
    use_short_conv: bool = True
    conv_size: int = 4
    use_output_gate: bool = True
    hidden_ratio: float | None = 4
    intermediate_size: int | None = None
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    aux_loss_scale: float = 0.01
    attn: Any = None
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim", "num_memories"):
            _check_positive(name, getattr(self, name))
        if not isinstance(self.topk, int) or not 1 <= self.topk <= self.num_memories:
            raise ValueError(
                f"topk must lie in [1, num_memories = {self.num_memories}], got {self.topk}; "
                "lower topk or raise num_memories"
            )
        if self.num_v_heads is not None:
            _check_positive("num_v_heads", self.num_v_heads)
            if self.num_v_heads % self.num_heads:
                raise ValueError(
                    f"num_v_heads must be a multiple of num_heads = {self.num_heads}, got {self.num_v_heads}; "
                    "each key head serves the same number of value heads"
                )
        value_dim = self.head_dim * self.expand_v
        if value_dim != int(value_dim) or value_dim < 1:
            raise ValueError(
                f"expand_v must make head_dim * expand_v a whole number, got {self.head_dim} * {self.expand_v}; "
                "change one of them"
            )
        for name, value in (("head_dim", self.head_dim), ("head_dim * expand_v", int(value_dim))):
            if value > 256:
                raise ValueError(f"{name} must be at most 256, got {value}; use more heads of a smaller size")
        if self.use_short_conv and not 2 <= self.conv_size <= 16:
            raise ValueError(f"conv_size must lie in [2, 16], got {self.conv_size}; 4 is usual")
        rules = [self.update_rule] if isinstance(self.update_rule, str) else list(self.update_rule)
        for rule in rules:
            if rule not in UPDATE_RULES:
                planned = " (planned, not there yet)" if rule in PLANNED_RULES else ""
                raise ValueError(
                    f"update_rule must be one of {', '.join(UPDATE_RULES)}, got {rule!r}{planned}; choose one of them"
                )
        if not isinstance(self.update_rule, str):
            if len(rules) != self.num_hidden_layers:
                raise ValueError(
                    f"update_rule must name one rule for each of the {self.num_hidden_layers} layers, "
                    f"got {len(rules)}; give one name for all, or one per layer"
                )
            self.update_rule = rules
        if self.attn is not None:
            raise ValueError(f"attn must be None, got {self.attn!r}; hybrid attention layers are not supported yet")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}; 1e-6 is usual")

    def rule(self, layer: int) -> str:
        """The update rule of a layer."""
        return self.update_rule if isinstance(self.update_rule, str) else self.update_rule[layer]

    @property
    def value_heads(self) -> int:
        """HV."""
        return self.num_v_heads or self.num_heads

    @property
    def value_dim(self) -> int:
        """V, of one head."""
        return int(self.head_dim * self.expand_v)

    @property
    def total_memories(self) -> int:
        """M', with the shared memory."""
        return self.num_memories + int(self.shared_mem)

    @property
    def conv_channels(self) -> int:
        """C of the convolution's state: q, k and v of one memory."""
        return 2 * self.num_heads * self.head_dim + self.value_heads * self.value_dim

    @property
    def mlp_size(self) -> int:
        """Width of the MLP."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        ratio = 4 if self.hidden_ratio is None else self.hidden_ratio
        return 256 * -(-int(self.hidden_size * ratio * 2 / 3) // 256)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for config.json."""
        return {"model_type": "mom", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoMConfig:
        """A configuration from the values of a config.json, ours or flash-linear-attention's.

        Raises:
            ValueError: an unknown key, or a setting that this library does not have.
        """
        values = dict(values)
        model_type = values.pop("model_type", "mom")
        if model_type != "mom":
            raise ValueError(f"model_type must be mom, got {model_type!r}; this is another kind of model")
        if values.get("attnres_block_size") is not None:
            raise ValueError(
                f"attnres_block_size must be None, got {values['attnres_block_size']}; attention residuals are not "
                "supported"
            )
        if values.get("hidden_act", "swish") not in ("swish", "silu"):
            raise ValueError(f"hidden_act must be swish or silu, got {values['hidden_act']!r}; the MLP is SwiGLU")
        if values.get("mom_backend", "gated_deltanet") != "gated_deltanet":
            raise ValueError(f"mom_backend must be gated_deltanet, got {values['mom_backend']!r}; set update_rule")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = set(values) - known - _IGNORED_KEYS
        if unknown:
            raise ValueError(
                f"config must hold known keys, got {', '.join(sorted(unknown))}; "
                f"the known ones are {', '.join(sorted(known))}"
            )
        return cls(**{key: value for key, value in values.items() if key in known})


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}; set it in the config")
