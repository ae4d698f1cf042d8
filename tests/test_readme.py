"""The Python examples of the README run as they stand, and its command lines parse."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path

import pytest
import torch

from mom_compile.cli import make_parser

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example(index: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole of torch.compile but for the code that inductor makes, which test_compile.py has."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    exec(compile(EXAMPLES[index], f"README example {index}", "exec"), {"__name__": "example"})


def test_the_readme_leads_with_the_two_commands() -> None:
    text = README.read_text()
    assert text.index("make demo") < text.index("make test") < text.index("## What MoM is")


def test_the_command_lines_parse() -> None:
    commands = [
        shlex.split(line.split("#")[0])
        for path in (README, README.parent / "CONTRIBUTING.md")
        for line in path.read_text().splitlines()
        if line.startswith("mom-compile ")
    ]
    assert {command[1] for command in commands} >= {"train", "export", "verify", "generate"}
    for command in commands:
        make_parser(command[1:]).parse_args(command[1:])
