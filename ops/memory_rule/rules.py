"""The update rules of the scalar family: which gate decays the memory and whether the write is a delta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SAVE_INVERSE, SAVE_SCORES, SAVE_STATES, SAVE_V_NEW = 1, 2, 4, 8
SAVE_ALL = SAVE_INVERSE | SAVE_SCORES | SAVE_STATES | SAVE_V_NEW


@dataclass(frozen=True)
class Rule:
    """One update rule ``S <- exp(g) S + write``.

    Attributes:
        name: name in ``MoMConfig.update_rule``.
        op: stem of its operators, ``mom::chunk_<op>`` and ``mom::recurrent_<op>``.
        gate: ``none``, ``head`` (one constant per head) or ``scalar`` (one value per token and head).
        delta: write ``beta k (v - S^T k)^T`` where true, ``k v^T`` where false.
    """

    name: str
    op: str
    gate: Literal["none", "head", "scalar"]
    delta: bool


RULES = {
    rule.name: rule
    for rule in (
        Rule("linear", "linear_attn", "none", False),
        Rule("retention", "retention", "head", False),
        Rule("mamba2", "mamba2", "scalar", False),
        Rule("delta", "delta_rule", "none", True),
        Rule("gated_delta", "gated_delta_rule", "scalar", True),
    )
}
