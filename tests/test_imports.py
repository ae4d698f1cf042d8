"""What importing costs and allows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _run(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=120)


def test_the_package_itself_imports_neither_torch_nor_triton() -> None:
    result = _run("import sys, mom_compile; assert not {'torch', 'triton', 'numpy'} & set(sys.modules)")
    assert result.returncode == 0, result.stderr


def test_the_operators_import_without_triton() -> None:
    result = _run("import sys; sys.modules['triton'] = None; import mom_compile.ops; mom_compile.MoMForCausalLM")
    assert result.returncode == 0, result.stderr


def test_a_second_copy_of_the_operators_is_refused() -> None:
    result = _run("import ops", cwd=ROOT)
    assert result.returncode != 0 and "import mom_compile.ops, not ops" in result.stderr


def test_unknown_names() -> None:
    import mom_compile

    with pytest.raises(AttributeError, match="module 'mom_compile' has no attribute 'Mom'; it has .*MoMAttention"):
        mom_compile.Mom  # noqa: B018


@pytest.mark.parametrize("module", ["kernels", "launch"])
def test_kernel_files_know_no_autograd(module: str) -> None:
    for path in (ROOT / "ops").glob(f"*/{module}*.py"):
        text = path.read_text()
        assert "autograd" not in text and "register_op" not in text, path
        if module == "kernels":
            assert "import torch" not in text, path
