"""What is installed without a checkout, as in the container: whatever is read while it runs."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECKED_WITH = {"package.json", "package-lock.json", "tsconfig.json", ".prettierrc.json", ".prettierignore"}
"""Of the page's folder: for its linters alone, as its types are."""


def test_a_wheel_has_what_is_read_while_it_runs() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    there = {path for name, globs in told.items() for glob in globs for path in (ROOT / name).glob(glob)}
    wanted = {
        path
        for package in ("adapters", "server")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.name not in CHECKED_WITH and path.suffix not in (".py", ".pyc", ".ts", ".mts")
    }
    assert wanted - there == set()
