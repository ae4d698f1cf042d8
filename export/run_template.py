"""Generate text from this folder with numpy and onnxruntime alone:  python run.py "The " --max-new-tokens 100"""

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

FOLDER = Path(__file__).parent
OPERATORS = FOLDER / f"libmom_cpu_{platform.machine()}.so"  # built from mom_cpu.cpp, where there is one


def zeros(entry: dict[str, Any]) -> OrtValue:
    """An empty state. numpy has no bfloat16: its zeros are those of any type of its size."""
    shape = (1, entry["shape"][0] * entry["shape"][1], *entry["shape"][2:])
    if entry["dtype"] == "bfloat16":
        return OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, np.uint16), 16)
    return OrtValue.ortvalue_from_numpy(np.zeros(shape, entry["dtype"]))


def session_of(graph: str, made_with: str) -> onnxruntime.InferenceSession:
    """A session of a graph. What does not open in an older onnxruntime than it was made with asks for a newer one."""
    options = onnxruntime.SessionOptions()
    if graph.endswith("_cpu.onnx"):
        options.register_custom_ops_library(str(OPERATORS))
    try:
        return onnxruntime.InferenceSession(str(FOLDER / graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # checked only here: many graphs do open in older versions
        wanted, got = (version.split(".")[:2] for version in (made_with, onnxruntime.__version__))
        if [*map(int, got)] >= [*map(int, wanted)]:
            raise
        sys.exit(
            f"onnxruntime must open {graph}, made with {made_with}, got {onnxruntime.__version__}; "
            f'run: pip install --upgrade "onnxruntime>={".".join(wanted)}" ({str(error).splitlines()[0][:200]})'
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="The ")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    args = parser.parse_args()
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    graphs, made_with = manifest["graphs"], manifest["versions"]["onnxruntime"]
    fused = "decode_cpu" in graphs and OPERATORS.is_file()
    prefill, decode = (session_of(graphs[name + "_cpu" * fused], made_with) for name in ("prefill", "decode"))
    if manifest["tokenizer"] == "tokenizers":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        ids = tokenizer.encode(args.prompt).ids

        def text(tokens: list[int]) -> str:
            return tokenizer.decode(tokens)

    else:  # one token per byte
        ids = list(args.prompt.encode())

        def text(tokens: list[int]) -> str:
            return bytes(token for token in tokens if token < 256).decode(errors="replace")

    state = {
        f"past_key_values.{layer}.{entry['name']}": zeros(entry)
        for layer in range(manifest["config"]["num_hidden_layers"])
        for entry in manifest["state"]
    }
    names = ["logits", *(name.replace("past_key_values", "present") for name in state)]
    tokens, done = np.array([ids], np.int64), list(ids)
    for _ in range(args.max_new_tokens):
        session = decode if tokens.shape[1] == 1 else prefill
        inputs = {"input_ids": OrtValue.ortvalue_from_numpy(tokens), **state}
        logits, *present = session.run_with_ort_values(names, inputs)
        state = dict(zip(state, present))  # noqa: B905 the outputs come in the order of their names
        tokens = logits.numpy()[:, -1:].argmax(-1)
        if tokens[0, 0] == manifest["config"]["eos_token_id"]:
            break
        done.append(int(tokens[0, 0]))
    sys.stdout.write(text(done) + "\n")


if __name__ == "__main__":
    main()
