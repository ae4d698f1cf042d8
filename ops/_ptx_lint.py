"""What compiled kernels must not contain, read from their PTX, ptxas's messages and their resources.

Triton and ptxas have miscompiled asynchronous products (``wgmma``, sm_90) for years without an error, so every kernel
that ships is checked for the patterns rather than for versions:

- a product with an operand in registers: Triton before 3.7 and ptxas before 13.3 reuse the registers while the product
  still reads them (triton-lang/triton 9433, 11781);
- a product that reads shared memory which the threads wrote (``st.shared``, ``stmatrix``, ``cp.async``) with no
  ``fence.proxy.async`` on the way: the product may see what was there before (triton-lang/triton 9610);
- products that ptxas made wait for each other, registers spilled to memory, and more shared memory than the GPU has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ._kernel_variant import SHARED_MEMORY_KB

SPILL_LIMIT = 512
"""Bytes that one thread may spill."""

_SKIPPED = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*\.(?:loc|file)\b[^\n]*", re.DOTALL | re.MULTILINE)
_LABEL = re.compile(r"\s*([$\w]+)\s*:(?!:)")
_GUARD = re.compile(r"@!?%?\w+\s+")
_SHARED_WRITE = re.compile(r"(st|red|atom)\.(?!async|bulk)[\w.:]*shared|stmatrix\.")
_COPY = re.compile(r"cp\.async\.(ca|cg)\.shared")
_COPY_WAIT = re.compile(r"cp\.async\.wait_(group|all)")
_FENCE = re.compile(r"fence\.proxy\.async(\.shared|\s|$)")
_END = re.compile(r"(ret|exit|trap)\b")


@dataclass(frozen=True)
class Statement:
    """One PTX instruction: its line, the labels before it, whether a predicate guards it, and its text."""

    line: int
    labels: tuple[str, ...]
    guarded: bool
    text: str


def lint(ptx: str, log: str, architecture: int, shared: int, spills: int) -> list[str]:
    """The hazards of one compiled kernel, in words; empty for a good one.

    Args:
        ptx: what Triton gave to ptxas.
        log: what ptxas said.
        architecture: compute capability times ten.
        shared: bytes of shared memory of a thread block.
        spills: bytes that one thread spills.
    """
    found = register_products(ptx) + unfenced_products(ptx) if "wgmma.mma_async" in ptx else []
    if re.search(r"wgmma\S* instructions are serialized", log):
        found.append("ptxas serialised the wgmma products")
    if spills > SPILL_LIMIT:
        found.append(f"{spills} bytes spilled per thread, more than {SPILL_LIMIT}")
    limit = SHARED_MEMORY_KB[architecture] * 1024
    if shared > limit:
        found.append(f"{shared} bytes of shared memory, more than the {limit} of sm_{architecture}")
    return found


def statements(ptx: str) -> list[Statement]:
    """The instructions of a PTX file in order; declarations are among them, comments and scope braces are not."""
    # What is skipped keeps its line breaks, so that lines stay those of the file.
    text = _SKIPPED.sub(lambda match: "\n" * match[0].count("\n"), ptx)
    found, line, labels = [], 1, []
    for piece in text.split(";"):
        # Before an instruction: labels, the braces of scopes, and a function's head, whose body opens with a brace.
        rest = piece
        if function := re.search(r"\.(entry|func)\b[^{]*", piece):
            found.append(Statement(line, (), False, ".entry"))
            rest = piece[function.end() :]
        while match := _LABEL.match(rest) or re.match(r"\s*[{}]\s*", rest):
            if match.re is _LABEL:
                labels.append(match[1])
            rest = rest[match.end() :]
        body = rest.strip()
        if body:
            guard = _GUARD.match(body)
            start = line + piece[: len(piece) - len(rest.lstrip())].count("\n")
            text_of = " ".join(body[guard.end() if guard else 0 :].split())
            found.append(Statement(start, tuple(labels), guard is not None, text_of))
            labels = []
        line += piece.count("\n")
    return found


def register_products(ptx: str) -> list[str]:
    """Asynchronous products whose first operand lies in registers: its text is a list in braces, not a descriptor."""
    lines = [
        statement.line
        for statement in statements(ptx)
        if statement.text.startswith("wgmma.mma_async")
        and re.search(r"\}\s*,\s*\{", statement.text)
    ]  # fmt: skip
    return [f"{len(lines)} wgmma with an operand in registers, the first in line {lines[0]}"] if lines else []


def unfenced_products(ptx: str) -> list[str]:
    """Groups of asynchronous products that some path reaches from a write to shared memory without a fence.

    A copy (``cp.async``) writes when it is waited for. Which buffer a write goes to is not followed: a write to another
    buffer between the fence and the product is reported too.
    """
    program = statements(ptx)
    targets = {label: i for i, statement in enumerate(program) for label in statement.labels}
    # At each statement: lines of writes not fenced, and of copies that are under way.
    before: list[tuple[frozenset[int], frozenset[int]] | None] = [None] * len(program)
    work = []
    for i, statement in enumerate(program):
        if statement.text == ".entry":
            before[i] = (frozenset(), frozenset())
            work.append(i)
    while work:
        i = work.pop()
        state = before[i]
        assert state is not None
        after = _step(program[i], *state)
        for j in _successors(program, i, targets):
            known = before[j]
            joined = after if known is None else (known[0] | after[0], known[1] | after[1])
            if joined != known:
                before[j] = joined
                work.append(j)
    found = []
    in_group = False
    for statement, state in zip(program, before, strict=True):
        product = statement.text.startswith("wgmma.mma_async")
        if product and state is not None and state[0] and not in_group:
            found.append(
                f"wgmma in line {statement.line} after a write to shared memory in line {max(state[0])} with no "
                "fence.proxy.async between them"
            )
        if product:
            in_group = True
        elif statement.text.startswith("wgmma.wait_group") or statement.labels:
            in_group = False
    return found


def _step(statement: Statement, dirty: frozenset[int], copies: frozenset[int]) -> tuple[frozenset[int], frozenset[int]]:
    text, line = statement.text, frozenset((statement.line,))
    if _COPY.match(text):
        return dirty, copies | line
    if wait := _COPY_WAIT.match(text):
        left = wait[1] == "group" and not re.search(r"\s0$", text)
        return dirty | copies, copies if left else frozenset()
    if _FENCE.match(text) and not statement.guarded:
        return frozenset(), copies
    if _SHARED_WRITE.match(text):
        return dirty | line, copies
    return dirty, copies


def _successors(program: list[Statement], i: int, targets: dict[str, int]) -> list[int]:
    statement, following = program[i], []
    if statement.text.startswith("bra"):
        following.append(targets[statement.text.split()[-1]])
    elif statement.text.startswith("brx"):
        following.extend(targets.values())
    ends = statement.text.startswith(("bra", "brx")) or bool(_END.match(statement.text))
    if (statement.guarded or not ends) and i + 1 < len(program) and program[i + 1].text != ".entry":
        following.append(i + 1)
    return following
