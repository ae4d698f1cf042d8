"""The wheel holds every module, and nothing at the top level of site-packages but mom_compile."""

from __future__ import annotations

from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent


def test_every_subpackage_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"mom_compile"}
    for top in ("mom_compile", "ops", "export"):
        prefix = "mom_compile" if top == "mom_compile" else f"mom_compile.{top}"
        for path in (ROOT / top).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT / top).parts
            if parts[:1] not in (("ops",), ("export",)) or top != "mom_compile":
                found.add(".".join([prefix, *parts]))
    assert listed == found


def test_the_links_point_at_the_folders() -> None:
    for name in ("ops", "export"):
        link = ROOT / "mom_compile" / name
        assert link.is_symlink() and link.resolve() == ROOT / name
