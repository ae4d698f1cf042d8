"""What pipelined loops must not contain, read from Triton's GPU dialect (TTGIR), where buffers still have names.

Asynchronous products (``wgmma``, sm_90) of one iteration may be under way while the copies of a later one start. A copy
must not go where such a product reads: Triton gives a load one buffer more for that, but not where it is read into
registers as well (seen from 3.6.0 to 3.9.0: chunk_bwd and chunk_pairs_bwd gave other bits in 40 of 40 runs on an H200).
"""

from __future__ import annotations

import re

_NAME = r"%[\w.$-]+(?:#\d+)?"
_ALLOC = re.compile(rf"({_NAME}) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
_VIEW = re.compile(rf"({_NAME}) = ttg\.(?:memdesc_\w+|local_\w+view) ({_NAME})")
_COPY = re.compile(rf"ttg\.async_copy_global_to_local {_NAME}, ({_NAME})")
_DOT = re.compile(rf"ttng\.warp_group_dot ({_NAME}), ({_NAME}), .*isAsync = true")
_WAIT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")


def overwritten_operands(ttgir: str) -> list[str]:
    """Buffers that a copy of a later iteration overwrites while a product may still read them, in words.

    Args:
        ttgir: ``compiled.asm["ttgir"]``.

    Products are done at a wait for all of them. With N buffers and copies that run d iterations ahead, iteration i
    reads buffer i mod N and copies into buffer (i + d) mod N.
    """
    buffers: dict[str, int] = {}
    views: dict[str, str] = {}
    ahead: dict[str, int] = {}  # copies before the loop
    found: dict[str, None] = {}
    loops: list[tuple[int, set[str]]] = []  # indentation, and the allocations that products under way read

    def allocation(name: str) -> str:
        while name in views:
            name = views[name]
        return name

    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        while loops and line.strip().startswith("}") and indent <= loops[-1][0]:
            loops.pop()
        if match := _ALLOC.search(line):
            buffers[match[1]] = int(match[2])
        elif match := _VIEW.search(line):
            views[match[1]] = match[2]
        elif "scf.for" in line or "scf.while" in line:
            loops.append((indent, set()))
        elif match := _COPY.search(line):
            target = allocation(match[1])
            if not loops or target not in loops[-1][1]:
                ahead[target] = ahead.get(target, 0) + 1
            elif ahead.get(target, 0) % buffers.get(target, 1) == 0:
                found[f"copies into {target} ({buffers.get(target, 1)} buffers) while a product may read them"] = None
        elif (match := _DOT.search(line)) and loops:
            loops[-1][1].update(map(allocation, match.groups()))
        elif (match := _WAIT.search(line)) and loops and int(match[1]) == 0:
            loops[-1][1].clear()
    return list(found)
