"""What is installed without a checkout, as in the container: whatever is read while it runs."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECKED_WITH = {"package.json", "package-lock.json", "tsconfig.json", ".prettierrc.json", ".prettierignore"}
"""Of the page's folder: for its linters alone, as its types are."""
TELLING = [
    *(ROOT / "docs").rglob("*.md"),
    *ROOT.glob("*.md"),
    ROOT / "Makefile",
    *(path for package in ("adapters", "server") for path in (ROOT / package).rglob("*.py")),
    *(path for path in (ROOT / "docker").rglob("*") if path.is_file() and path.suffix != ".whl"),
]
"""Where people, or a build, are told how to install."""


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


def test_who_installs_an_extra_as_told_keeps_what_git_pull_renews() -> None:
    """Without `-e` pip puts a copy in the place of what `make serve` installed, which then runs for good."""
    told = [path for path in TELLING if path.parent != ROOT / "docker"]  # nobody pulls within an image
    commands = r"(?:pip install|\$\(PIP\))[^`;:]*"
    found = [line for path in told for line in re.findall(commands, path.read_text(encoding="utf-8"))]
    here = [line for line in found if re.search(r"[ '\"]\.\[", line)]
    assert here
    assert [line for line in here if " -e " not in line] == []


def test_who_installs_an_extra_as_told_asks_no_registry_for_smolora() -> None:
    """It is in none: a pip of another environment would find nothing, or what a stranger put there."""
    assert [path.name for path in TELLING if "smolora[" in path.read_text(encoding="utf-8")] == []


def imported() -> set[str]:
    """What the code imports of others, by its first name."""
    found: set[str] = set()
    for path in (path for package in ("adapters", "server") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"adapters", "server"}


def test_what_is_imported_is_asked_for() -> None:
    """By its name and with a bound: what comes along with something else may be older than what is used of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    names = {re.split(r"[^\w-]", one, maxsplit=1)[0].replace("-", "_") for one in asked}
    of_others = {
        "multipart": "python_multipart",
        "opentelemetry": "opentelemetry_sdk",
        "pydantic_core": "pydantic",
    }
    assert {of_others.get(name, name) for name in imported()} - names == set()
    assert all(re.search(r">=\d", one) for one in project["dependencies"])
