"""The kernel pack: its table agrees with the launches and the binaries, builds as C and C++, and runs on a GPU."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kernel_cases import write_cases
from models import tiny_config, tiny_model
from support import INTERPRET

from mom_compile import MoMConfig, MoMForCausalLM
from mom_compile.cli import main
from mom_compile.export import load, to_kernels
from mom_compile.export.artifact import read_manifest
from mom_compile.export.kernel_function import Dtypes, Function
from mom_compile.export.kernel_functions import functions
from mom_compile.export.kernel_pack import ARCHITECTURES
from mom_compile.export.kernel_table import Argument, entries, record
from mom_compile.export.launch_formula import Formula, Units, fit
from mom_compile.export.prefill_functions import ORDER
from mom_compile.ops._launch import cdiv
from mom_compile.ops._layout import CHUNK, rows_bound

pytest.importorskip("triton")
if INTERPRET:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

SOURCES = Path(__file__).parent / "cpp"
META = torch.device("meta")
BFLOAT16 = Dtypes(torch.bfloat16, torch.bfloat16)


def _compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("needs g++")
    return found


def _build(pack: Path, target: Path) -> Path:
    sources = [str(SOURCES / "check_pack.cpp"), str(pack / "mom_launch.cpp")]
    command = [_compiler(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{pack}", *sources, "-ldl"]
    subprocess.run([*command, "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack") / "kernels"
    to_kernels(tiny_model().bfloat16(), folder, [90])
    return folder


def test_the_table_is_that_of_the_binaries(pack: Path) -> None:
    manifest = read_manifest(pack)
    assert manifest["kind"] == "kernels" and manifest["compute_capabilities"] == [90]
    seen = 0
    for function in manifest["functions"].values():
        for kernel in function["kernels"]:
            cubin, ptx = ((pack / name) for name in kernel["files"])
            assert cubin.read_bytes()[:4] == b"\x7fELF"
            text = ptx.read_text()
            assert f".entry {kernel['symbol']}(" in text
            assert int(re.findall(r"\.reqntid (\d+)", text)[0]) == kernel["threads"]
            assert f"sm_{kernel['architecture']}" in re.findall(r"\.target (\w+)", text)[0]
            # A kernel waits for the one before it where the launcher lets it begin before that ends, and nowhere else.
            assert ("griddepcontrol.wait" in text) == kernel["overlap"]
            entry = re.search(r"\.entry [^(]*\(([^)]*)\)", text)
            assert entry is not None
            parameters = re.findall(r"\.param \.(\w+)", entry[1])
            sizes = [64 if argument["type"].startswith("*") else 32 for argument in kernel["arguments"]]
            assert [int(kind[1:]) for kind in parameters[: len(sizes)]] == sizes
            # What follows are Triton's scratch pointers, which no kernel of ours uses.
            assert [int(kind[1:]) for kind in parameters[len(sizes) :]] == [64] * (len(parameters) - len(sizes))
            seen += 1
    assert seen >= 35
    assert all(function["kernels"] or "note" in function for function in manifest["functions"].values())


def _units(function: Function, sizes: Units) -> Units:
    first, second, third = (size if i < len(function.units) else 0 for i, size in enumerate(sizes))
    return min(first, function.limit), second, third


def _functions(config: MoMConfig) -> dict[str, Function]:
    return {function.name: function for function in functions(config, BFLOAT16)}


@pytest.mark.parametrize("rule", ["gated_delta", "linear"])
def test_formulas_hold_at_sizes_that_were_not_recorded(rule: str) -> None:
    for function in _functions(tiny_config(rule, head_dim=32)).values():
        whole = entries(function, 90)
        for sizes in ((5, 11, 300), (1, 77, 65), (40, 3000, 1), (3000, 40, 5001)):
            units = _units(function, sizes)
            table = [entry for entry in whole if entry.smallest <= units[0] <= entry.largest]
            calls = record(function, 90, units)
            assert [entry.variant.kernel for entry in table] == [call.kernel for call in calls]
            for entry, call in zip(table, calls, strict=True):
                assert tuple(axis(units) for axis in entry.grid) == (*call.grid, 1, 1)[:3]
                given = [value for value in call.args if value is not None]
                for argument, value in zip(entry.arguments, given, strict=True):
                    if argument.shape is not None:
                        assert [axis(units) for axis in argument.shape] == list(value.shape)
                    else:
                        number = argument.value
                        assert (number(units) if isinstance(number, Formula) else number) == value


def test_whole_numbers_are_not_specialised() -> None:
    """Triton compiles a kernel anew for the value 1 and for multiples of 16, unless told not to; a pack cannot."""
    for function in _functions(tiny_config(head_dim=16)).values():
        for entry in entries(function, 90):
            for parameter in entry.variant.kernel.params:
                if entry.variant.signature.get(parameter.name) == "i32":
                    assert parameter.do_not_specialize, f"{entry.name} {parameter.name}"


def test_decode_takes_narrow_blocks_for_few_states() -> None:
    function = _functions(tiny_config(head_dim=64))["decode_step_gated_delta"]
    state = [entry for entry in entries(function, 90) if entry.name.endswith("decode_state")]
    assert [entry.variant.constants["BV"] for entry in state] == [16, 32, 64]
    assert [entry.smallest for entry in state] == [1, *(entry.largest + 1 for entry in state[:-1])]
    combine = [entry for entry in entries(function, 90) if entry.name.endswith("decode_combine")]
    assert len(combine) == 1 and combine[0].largest == function.limit


def test_kernels_of_decode_overlap_from_90_on() -> None:
    whole = {name: one for name, one in _functions(tiny_config(head_dim=64)).items() if name.startswith("decode")}
    for function in whole.values():
        for architecture in (89, 90, 120):
            for entry in entries(function, architecture):
                calls = record(function, architecture, (entry.smallest, 0, 0))
                (asked,) = (call.config.overlap for call in calls if call.kernel is entry.variant.kernel)
                assert entry.overlap == (bool(asked) and architecture >= 90), f"{entry.name} on {architecture}"
                if function.name.startswith("decode_step"):
                    assert entry.overlap == (architecture >= 90)


def test_formulas() -> None:
    assert Formula(1, (64, 2, 0))((3, 5, 0)) == 203
    assert Formula(0, (64, 0, 0)).text(["chunks"]) == "64 * chunks" and Formula(7).text(["n"]) == 7
    assert Formula(1, (1, 2, 0)).text(["a", "b"]) == "a + 2 * b + 1"
    assert (Formula(5, times=3, per=16, unit=1) * 2)((0, 17, 0)) == 10 + 6 * cdiv(17, 16)
    assert Formula(0, times=1, per=256).text(["tokens"]) == "ceil(tokens / 256)"
    assert Formula(0, times=1, each=3, per=64).text(["n"]) == "ceil(3 * n / 64)"
    assert Formula(0, times=1, each=3, per=64)((65, 0, 0)) == 4
    assert Formula(0, (5, 0, 0), digits=True)((3, 0, 0)) == 4
    assert Formula(0, (5, 0, 0), digits=True).text(["n"]) == "digits(5 * n)"


def test_formulas_are_found() -> None:
    sizes = [(a, b, c) for a in (1, 2, 3, 7, 64, 65) for b in (1, 16, 33) for c in (1, 127, 129)]
    for formula in (
        Formula(3, (2, 0, 5)),
        Formula(4, times=7, per=128, unit=2),
        Formula(0, times=1, each=3, per=64, unit=2),
        Formula(0, (5, 0, 0), digits=True),
    ):
        assert fit({units: formula(units) for units in sizes}) == formula
    with pytest.raises(AssertionError, match="no formula"):
        fit({units: units[0] ** 2 for units in sizes})


def test_the_header_is_c_and_cpp(pack: Path, tmp_path: Path) -> None:
    source = tmp_path / "table.c"
    source.write_text('#define MOM_KERNELS_DEFINE\n#include "mom_kernels.h"\n')
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{pack}", "-fsyntax-only"]
    subprocess.run([_compiler(), "-x", "c", "-std=c99", *flags, str(source)], check=True)
    subprocess.run([_compiler(), "-x", "c++", "-std=c++17", *flags, str(source)], check=True)


def test_the_header_counts_chunks(pack: Path, tmp_path: Path) -> None:
    source = tmp_path / "chunks.c"
    sizes = [(1, 1), (3, 1), (1, 64), (7, 4097)]
    calls = "".join(f'    printf("%u\\n", mom_chunks({sequences}, {tokens}));\n' for sequences, tokens in sizes)
    source.write_text(f'#include <stdio.h>\n#include "mom_kernels.h"\nint main(void) {{\n{calls}    return 0;\n}}\n')
    subprocess.run([_compiler(), "-x", "c", f"-I{pack}", str(source), "-o", str(tmp_path / "chunks")], check=True)
    done = subprocess.run([str(tmp_path / "chunks")], check=True, capture_output=True, text=True)
    config = tiny_config()
    assert [int(line) + 1 for line in done.stdout.split()] == [_chunks(config, *pair) for pair in sizes]


def test_formulas_are_the_same_in_c(pack: Path, tmp_path: Path) -> None:
    source, sizes = tmp_path / "formulas.cpp", (5, 77, 1001)
    source.write_text(
        '#include <cstdio>\n#include "mom_kernels.h"\nint main() {\n'
        f"    const uint32_t units[3] = {{{', '.join(map(str, sizes))}}};\n"
        "    for (uint32_t i = 0; i < mom_kernel_count; ++i) {\n"
        "        const mom_kernel *k = &mom_kernels[i];\n"
        '        std::printf("%s %u %u", k->name, k->smallest, k->overlap);\n'
        '        for (int axis = 0; axis < 3; ++axis) std::printf(" %u", mom_programs(k, axis, units));\n'
        "        for (uint32_t j = 0; j < k->num_arguments; ++j)\n"
        '            std::printf(" %lld", static_cast<long long>(mom_amount(&k->arguments[j], units)));\n'
        '        std::printf("\\n");\n    }\n}\n'
    )
    program = tmp_path / "formulas"
    command = [_compiler(), "-std=c++17", "-Wall", "-Werror", f"-I{pack}", str(source), str(pack / "mom_launch.cpp")]
    subprocess.run([*command, "-ldl", "-o", str(program)], check=True)
    done = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    expected = []
    for function in _functions(tiny_config()).values():
        for entry in entries(function, 90):
            amounts = [_amount(argument, sizes) for argument in entry.arguments]
            row = [entry.name, entry.smallest, int(entry.overlap), *(f(sizes) for f in entry.grid), *amounts]
            expected.append(" ".join(map(str, row)))
    assert done.stdout.splitlines() == expected


def _amount(argument: Argument, units: Units) -> int:
    """Bytes behind a pointer, a whole number, or 0 for a float, which has a field of its own."""
    if argument.shape is not None:
        item = {"fp32": 4, "bf16": 2, "i32": 4, "i64": 8}[argument.type.removeprefix("*")]
        return item * math.prod(axis(units) for axis in argument.shape)
    return argument.value(units) if isinstance(argument.value, Formula) else 0


def test_the_header_names_the_functions_and_their_order(pack: Path) -> None:
    text, manifest = (pack / "mom_kernels.h").read_text(), read_manifest(pack)
    for name, function in manifest["functions"].items():
        units = [*(f'"{unit}"' for unit in function["units"]), "0", "0"][:3]
        assert f'{{"{name}", "{function["operator"]}", {{{", ".join(units)}}}}},' in text
    assert all(f" * {line}".rstrip() in text for line in ORDER.splitlines())


def test_the_launcher_builds_and_says_what_is_missing(pack: Path, tmp_path: Path) -> None:
    program = _build(pack, tmp_path / "check_pack")
    if torch.cuda.is_available():
        pytest.skip("says it without a GPU")
    done = subprocess.run([str(program), str(pack), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "install the NVIDIA driver" in done.stderr or "is there a GPU?" in done.stderr


def test_a_changed_file_is_noticed(pack: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pack, copy)
    with next(copy.rglob("*.cubin")).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="must have the hash in manifest.json"):
        read_manifest(copy)


def test_bad_input(pack: Path, tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"compute_capabilities must be some of 80, .*, got 75; leave out"):
        to_kernels(model, tmp_path / "a", [90, 75])
    with pytest.raises(ValueError, match="compute_capabilities must be some of .*, got none"):
        to_kernels(model, tmp_path / "a", [])
    with pytest.raises(ValueError, match="must have parameters of float32, bfloat16 or float16, got float64"):
        to_kernels(tiny_model().double(), tmp_path / "a", [90])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="directory must be new, empty or an artifact"):
        to_kernels(model, tmp_path / "b", [90])
    with pytest.raises(ValueError, match="kind must be that of a graph, got 'kernels'"):
        load(pack)
    assert not (tmp_path / "a").exists()


def test_sizes_without_a_safe_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mom_compile.ops import _ptx_lint

    monkeypatch.setattr(_ptx_lint, "SHARED_MEMORY_KB", {86: 1})
    with pytest.raises(ValueError, match=r"safe configuration of .* got for sm_86: .* shared memory, .*; leave 86 out"):
        to_kernels(tiny_model().bfloat16(), tmp_path / "a", [86])
    assert not (tmp_path / "a").exists()


def _plugin_flags() -> list[str]:
    """Headers of TensorRT (.ci/tensorrt-headers fetches them) and of CUDA, which Triton brings."""
    import triton

    folders = [os.environ.get("TENSORRT_INCLUDE"), "/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu"]
    tensorrt = [folder for folder in folders if folder and (Path(folder) / "NvInferRuntime.h").is_file()]
    cuda = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    if not tensorrt:
        pytest.skip("needs the headers of TensorRT 10: .ci/tensorrt-headers FOLDER, TENSORRT_INCLUDE=FOLDER")
    return ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-isystem{tensorrt[0]}", f"-isystem{cuda}"]


def _build_plugin(pack: Path) -> Path:
    library = pack / "libmom_plugin.so"
    sources = [str(pack / name) for name in ("mom_plugin.cpp", "mom_launch.cpp")]
    command = [_compiler(), *_plugin_flags(), "-shared", "-fPIC", *sources, "-ldl", "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def test_the_plugin_builds_without_tensorrt_libraries(pack: Path) -> None:
    library = _build_plugin(pack)
    symbols = subprocess.run(["nm", "-DC", str(library)], check=True, capture_output=True, text=True).stdout
    defined = {line.split()[-1] for line in symbols.splitlines() if " T " in line}
    assert {"getCreators", "setLoggerFinder"} <= defined
    assert not [line for line in symbols.splitlines() if " U " in line and ("nvinfer" in line or "cuda" in line)]


def test_the_command_line(pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "checkpoint"
    tiny_model().bfloat16().save_pretrained(checkpoint)
    with pytest.raises(SystemExit):
        main(["export", str(checkpoint), str(tmp_path / "a"), "--to", "kernel"])
    arguments = ["export", str(checkpoint), str(tmp_path / "a"), "--to", "kernels", "--compute-capability"]
    assert main([*arguments, "91"]) == 2
    assert "compute_capabilities must be some of 80, 86, 87, 89, 90, 100, 120" in capsys.readouterr().err
    assert main([*arguments, "90"]) == 0
    assert re.search(r"a: \d+ kernels for sm_90", capsys.readouterr().out)
    own, other = (read_manifest(folder) for folder in (tmp_path / "a", pack))
    assert own["functions"] == other["functions"] and own["dtype"] == "bfloat16"
    assert main(["inspect", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert "decode_step_gated_delta (mom::decode_step_, batch)" in printed and "decode_combine" in printed


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("rule", "architectures"),
    [pytest.param("gated_delta", ARCHITECTURES, id="all"), pytest.param("mamba2", (90,), id="mamba2-sm90")],
)
def test_every_architecture(rule: str, architectures: tuple[int, ...], tmp_path: Path) -> None:
    manifest = to_kernels(model_for_gpu(update_rule=rule), tmp_path / "kernels", architectures)
    found = {
        (kernel["architecture"], kernel["name"]) for f in manifest["functions"].values() for kernel in f["kernels"]
    }
    assert {architecture for architecture, _ in found} == set(architectures)
    assert len(found) % len(architectures) == 0
    _build(tmp_path / "kernels", tmp_path / "check_pack")


PACKED = ((1, 1), (2, 150), (5, 700))
"""Sequences and tokens of prefill."""


def _chunks(config: MoMConfig, sequences: int, tokens: int) -> int:
    """One more than suffices: the last one is unused."""
    return rows_bound(tokens, config.topk, sequences, config.num_memories, config.shared_mem) // CHUNK + 1


def model_for_gpu(**changes: object) -> MoMForCausalLM:
    sizes = {"vocab_size": 257, "hidden_size": 256, "num_heads": 4, "head_dim": 64, "num_hidden_layers": 1}
    return MoMForCausalLM(MoMConfig(**{**sizes, "num_memories": 4, "topk": 2, **changes})).bfloat16()  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="gated_delta-64"),
        pytest.param({"head_dim": 256, "hidden_size": 1024}, id="gated_delta-256"),
        pytest.param(
            {"update_rule": "mamba2", "head_dim": 100, "expand_v": 0.6, "hidden_size": 240}, id="mamba2-100x60"
        ),
    ],
)
def test_equals_the_operators_on_a_gpu(changes: dict[str, object], tmp_path: Path) -> None:
    """Bit for bit, launched from C++; the decode step also as a TensorRT plugin, where the headers to build it are."""
    model = model_for_gpu(**changes)
    major, minor = torch.cuda.get_device_capability()
    architecture = major * 10 + minor
    pack = tmp_path / "kernels"
    to_kernels(model, pack, [architecture])
    cases = []
    for function in functions(model.config, BFLOAT16):
        if len(function.units) > 1:
            sizes = [(sequences, _chunks(model.config, sequences, tokens), tokens) for sequences, tokens in PACKED]
        else:
            sizes = [(1, 0, 0), (3, 0, 0), (40, 0, 0)]
        table = entries(function, architecture)
        cases += [(function, units) for units in sizes if any(e.smallest <= units[0] <= e.largest for e in table)]
    count = write_cases(tmp_path / "cases", cases, architecture)
    program = str(_build(pack, tmp_path / "check_pack"))
    done = subprocess.run([program, str(pack), str(tmp_path / "cases")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{count} cases, 0 buffers differ\n")

    checker = tmp_path / "check_plugin"
    source = str(SOURCES / "check_plugin.cpp")
    subprocess.run([_compiler(), *_plugin_flags(), source, "-ldl", "-o", str(checker)], check=True)
    library = str(_build_plugin(pack))
    done = subprocess.run([str(checker), library, str(tmp_path / "cases")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "3 calls, 0 tensors differ\n"
