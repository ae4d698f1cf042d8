"""``mom-compile inspect``: what a folder is made of, and which memories the tokens of a text use."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="artifact folder or checkpoint folder")
    parser.add_argument("--text", help="print which memories each token of this text used, per layer")
    parser.add_argument("--budget", action="store_true", help="print weights, states and the batch that fits a memory")
    parser.add_argument("--plot", metavar="PNG", help="with --text: draw it as well")


def run(args: argparse.Namespace) -> int:
    from ..export.artifact import is_artifact, read_manifest

    if args.plot and not args.text:
        raise ValueError(f"--plot must go with --text, got {args.plot!r} alone; add the text to draw")
    lines = _artifact(read_manifest(args.folder)) if is_artifact(args.folder) else _checkpoint(Path(args.folder))
    print("\n".join(lines))
    if args.budget:
        print("\n" + "\n".join(_budget(Path(args.folder))))
    if args.text:
        _memory_use(args.folder, args.text, args.plot)
    return 0


def _artifact(manifest: Mapping[str, Any]) -> Iterator[str]:
    config = manifest["config"]
    yield f"{manifest['kind']} artifact, target {manifest['target']}, state layout {manifest['state_layout_version']}"
    yield _shape_of_model(config)
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    parity = manifest.get("parity")
    if parity is not None:
        result = "passed" if parity["passed"] else "FAILED"
        yield f"parity: {result}, largest relative error {parity['error']:.1e} of {parity['tolerance']:g} allowed"
        for check in parity["checks"]:
            error = f"{check['error']:.1e}" if "error" in check else check.get("measured", "-")
            yield f"  {check['name']}: {error}" + (f" ({check['note']})" if "note" in check else "")
    for name, function in manifest.get("functions", {}).items():
        yield ""
        yield f"{name} ({function['operator']}, {', '.join(function['units'])})"
        yield from _table([_kernel(kernel) for kernel in function["kernels"]] or [(function["note"],)])
    if "engines" in manifest:
        targets = ", ".join(f"{value // 10}.{value % 10}" for value in manifest["compute_capabilities"])
        ranges = ", ".join(f"{name} {smallest} to {most}" for name, (smallest, _, most) in manifest["ranges"].items())
        files = ", ".join(engine["file"] for engine in manifest["engines"].values())
        yield f"engines for compute capability {targets}: {files}; {ranges}"
    for name, io in manifest.get("io", {}).items():
        yield ""
        opsets = ", ".join(f"{domain} {version}" for domain, version in io.get("opsets", {}).items())
        yield f"{manifest['graphs'][name]} ({name}{', opsets ' + opsets if opsets else ''})"
        for side in ("inputs", "outputs"):
            yield from _table([(side[:-1], v["name"], v["dtype"], _shape(v["shape"])) for v in io[side]])
        counted = sorted(io["operators"].items(), key=lambda item: (-item[1], item[0]))
        yield f"  {sum(io['operators'].values())} operators: " + ", ".join(f"{n} {count}" for n, count in counted)
    yield ""
    yield from _table([("file", name, _size(entry["bytes"])) for name, entry in manifest["files"].items()])


def _kernel(kernel: Mapping[str, Any]) -> tuple[str, ...]:
    grid = " x ".join(str(axis) for axis in kernel["grid"] if axis != 1)
    sizes = f"{kernel['shared_bytes']} B shared, {kernel['registers']} registers"
    return f"sm_{kernel['architecture']}", kernel["name"], f"grid {grid}", f"{kernel['threads']} threads", sizes


def _checkpoint(folder: Path) -> Iterator[str]:
    from .._extras import require
    from .._files import read_json
    from ..config import MoMConfig

    config = MoMConfig.from_dict(read_json(folder / "config.json"))
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} must exist, got no such file; is {folder} the right folder?")
    yield "checkpoint"
    yield _shape_of_model(config.to_dict())
    rows, total = [], 0
    with require("safetensors", "onnx").safe_open(str(path), framework="numpy") as file:
        for name in file.keys():
            part = file.get_slice(name)
            count = 1
            for size in part.get_shape():
                count *= size
            total += count
            rows.append(("tensor", name, str(part.get_dtype()), _shape(part.get_shape())))
    yield f"{total:,} parameters in {len(rows)} tensors, {_size(path.stat().st_size)}"
    yield from _table(rows)


def _budget(folder: Path) -> Iterator[str]:
    from .._files import read_json
    from ..config import MoMConfig
    from ..export.artifact import is_artifact, read_manifest
    from ..export.budget import budget_table

    values = read_manifest(folder)["config"] if is_artifact(folder) else read_json(folder / "config.json")
    yield from _table(list(budget_table(MoMConfig.from_dict(values))))


def _shape_of_model(config: Mapping[str, Any]) -> str:
    rule = config["update_rule"]
    memories = f"{config['num_memories']} memories, {config['topk']} per token"
    return (
        f"model: {config['num_hidden_layers']} layers of width {config['hidden_size']}, {memories}"
        f"{' and a shared one' if config['shared_mem'] else ''}, {rule if isinstance(rule, str) else ' '.join(rule)}, "
        f"vocabulary {config['vocab_size']}"
    )


def _shape(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield ("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))).rstrip()


def _memory_use(folder: str, text: str, plot: str | None) -> None:
    from ..export.artifact import is_artifact
    from ..memory_use import memory_use_of_model, memory_use_of_runner, memory_use_table
    from ..tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text)
    if is_artifact(folder):
        from ..export import load

        use = memory_use_of_runner(load(folder), ids)
    else:
        from ..model import MoMForCausalLM

        use = memory_use_of_model(MoMForCausalLM.from_pretrained(folder).float(), ids)
    tokens = [tokenizer.decode([token]) for token in ids]
    print("\n" + memory_use_table(use, tokens))
    if plot is not None:
        from ..plots import plot_memory_use

        print(f"{plot_memory_use(plot, use, tokens)} drawn")
