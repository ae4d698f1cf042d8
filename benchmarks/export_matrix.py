"""Every combination of the layer's settings through the export targets: the largest relative error of each.

    python benchmarks/export_matrix.py [--jobs 2] [--targets pt2 onnxruntime ...]

The first three targets take all of {rule} x {(M, k)} x {shared memory} x {convolution}, the others the cover below. A
run that was interrupted goes on where it was; only what passed is kept. The table is results/export-matrix.csv.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

RULES = ("gated_delta", "delta", "mamba2", "linear")
MEMORIES = ((1, 1), (4, 1), (4, 2), (8, 1), (8, 2), (8, 3), (4, 3))
TABLE = Path(__file__).parent / "results" / "export-matrix.csv"


class Combination(NamedTuple):
    """Settings of a layer: update rule, M, k, with the shared memory, with the convolution."""

    rule: str
    memories: int
    topk: int
    shared: bool
    convolution: bool


# Every pair of values of any two settings, but for mamba2 and linear with one memory: all pairs need 14 rows.
COVER = (
    Combination("gated_delta", 1, 1, True, False),
    Combination("gated_delta", 4, 2, False, True),
    Combination("gated_delta", 8, 3, True, True),
    Combination("delta", 1, 1, False, True),
    Combination("delta", 4, 3, True, False),
    Combination("delta", 8, 2, True, False),
    Combination("mamba2", 4, 1, False, False),
    Combination("mamba2", 8, 2, True, True),
    Combination("mamba2", 8, 3, False, False),
    Combination("linear", 4, 2, True, False),
    Combination("linear", 4, 3, False, True),
    Combination("linear", 8, 1, True, True),
)
ALL = ("pt2", "onnxruntime", "portable")
COVERED = ("genai", "aoti", "float16", "int8", "int4", "opset27")
# What a trained model keeps within 2e-2, random weights pass on: where q and k are almost orthogonal the read of a
# single token is a small difference of rounded numbers.
RANDOM_WEIGHTS = {"int8": 1e-1, "int4": 5e-1}


def combinations() -> list[Combination]:
    """All of them."""
    return [
        Combination(rule, *memories, shared, convolution)
        for rule, memories, shared, convolution in itertools.product(RULES, MEMORIES, (True, False), (True, False))
    ]


def available() -> list[str]:
    """The targets that this installation has."""
    from mom_compile import export
    from mom_compile.export.onnx_artifact import TARGETS

    later = {"aoti": "to_aoti" in export.__all__, "opset27": "opset27" in TARGETS}
    return [target for target in (*ALL, *COVERED) if later.get(target, True)]


def run(job: tuple[Combination, str]) -> str:
    """Export one combination to one target: the largest relative error, or what went wrong."""
    import torch

    from mom_compile import MoMConfig, export

    combination, target = job
    torch.set_num_threads(1)
    gc.disable()  # tracing makes millions of small objects and hardly a cycle: a fifth of the time
    config = MoMConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_heads=2,
        head_dim=16,
        num_memories=combination.memories,
        topk=combination.topk,
        shared_mem=combination.shared,
        use_short_conv=combination.convolution,
        update_rule=combination.rule,
        intermediate_size=64,
        initializer_range=0.2,
    )
    model = _decided_model(config)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "artifact"
        try:
            if target in ("pt2", "genai", "aoti"):
                report = getattr(export, f"to_{target}")(model, out)
            elif target in ("float16", "int8", "int4"):
                report = export.to_onnx(model, out, precision=target, tolerance=RANDOM_WEIGHTS.get(target))
            else:
                report = export.to_onnx(model, out, target=target)
        except Exception as error:
            return f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    gc.enable()
    gc.collect()
    return f"{report.error:.1e}"


def _decided_model(config: Any) -> Any:
    """The first model by seed whose router no token of the vocabulary leaves undecided: rounding then moves no choice.

    The router of a single layer sees the embedding alone.
    """
    import torch

    from mom_compile import MoMForCausalLM

    ids = torch.arange(config.vocab_size).unsqueeze(0)
    for seed in itertools.count():
        torch.manual_seed(seed)
        model = MoMForCausalLM(config).eval()
        with torch.no_grad():
            ordered = model(ids).router_logits[0].sort(-1, descending=True).values
        if config.topk == config.num_memories or (ordered.diff(dim=-1)[..., config.topk - 1] < -1e-3).all():
            return model


def read_table(path: Path = TABLE) -> dict[Combination, dict[str, str]]:
    """The cells of an earlier run that passed."""
    table: dict[Combination, dict[str, str]] = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                settings = [row.pop(name) for name in Combination._fields]
                key = Combination(settings[0], *map(int, settings[1:3]), *(value == "True" for value in settings[3:]))
                table[key] = {name: value for name, value in row.items() if value and not value.startswith("FAILED")}
    return table


def write_table(table: dict[Combination, dict[str, str]], path: Path = TABLE) -> None:
    """All combinations in order, a column per target."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*Combination._fields, *ALL, *COVERED], restval="", lineterminator="\n")
        writer.writeheader()
        for combination in combinations():
            writer.writerow({**combination._asdict(), **table.get(combination, {})})


def jobs(targets: list[str], table: dict[Combination, dict[str, str]]) -> Iterator[tuple[Combination, str]]:
    """What is left to do; the cover first, so that every target is seen early."""
    for combination in sorted(combinations(), key=lambda item: item not in COVER):
        for target in targets:
            if target not in table.get(combination, {}) and (target in ALL or combination in COVER):
                yield combination, target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--targets", nargs="+", choices=[*ALL, *COVERED], help="default: those that are there")
    parser.add_argument("--fresh", action="store_true", help="do not go on from the table that is there")
    args = parser.parse_args()
    table: dict[Combination, dict[str, Any]] = {} if args.fresh else read_table()
    todo = list(jobs(args.targets or available(), table))
    begin, failed = time.monotonic(), 0
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.jobs, maxtasksperchild=50) as pool:
        for number, ((combination, target), result) in enumerate(zip(todo, pool.imap(run, todo), strict=True), start=1):
            table.setdefault(combination, {})[target] = result
            failed += result.startswith("FAILED")
            write_table(table)
            print(f"{number}/{len(todo)}  {target}  {' '.join(map(str, combination))}  {result}", flush=True)
    print(f"{len(todo)} exports, {failed} failed, {(time.monotonic() - begin) / 60:.0f} minutes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
