"""Checks that every runner's tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mom_compile import export
from mom_compile.export.runner import State


def check_interleaved(folder: Path) -> None:
    """Two conversations through one session, a piece in turn, give what each gives through a session of its own."""
    shared = export.load(folder)
    conversations = np.random.default_rng(0).integers(0, 256, (2, 1, 90))
    pieces = [(0, 66), (66, 67), (67, 68), (68, 75), (75, 76), (76, 90)]
    alone: list[list[np.ndarray]] = []
    for ids in conversations:
        own, state, logits = export.load(folder), None, []
        for start, stop in pieces:
            result, state = own(ids[:, start:stop], state)
            logits.append(np.asarray(result).copy())
        alone.append(logits)
    states: list[State | None] = [None, None]
    for index, (start, stop) in enumerate(pieces):
        for which, ids in enumerate(conversations):
            result, states[which] = shared(ids[:, start:stop], states[which])
            assert np.array_equal(np.asarray(result), alone[which][index])
    first, second = (shared.decode_loop(state, 1) for state in states if state is not None)
    own_first, own_second = (export.load(folder).decode_loop(state, 1) for state in states if state is not None)
    for token in ([1], [2], [3]):
        for loop, own_loop in ((first, own_first), (second, own_second)):
            assert np.array_equal(loop(np.array(token)).copy(), own_loop(np.array(token)).copy())
