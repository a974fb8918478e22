"""Installation without a checkout, as in the container: all files that are read at run time."""

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import server

ROOT = Path(__file__).parent.parent
CHECKED_WITH = {"package.json", "package-lock.json", "tsconfig.json", ".prettierrc.json", ".prettierignore"}
"""Files of the page's folder that only its linters use, as its types."""
INSTRUCTIONS = [
    *(ROOT / "docs").rglob("*.md"),
    *ROOT.glob("*.md"),
    ROOT / "Makefile",
    *(path for package in ("adapters", "server") for path in (ROOT / package).rglob("*.py")),
    *(path for path in (ROOT / "docker").rglob("*") if path.is_file() and path.suffix != ".whl"),
]
"""Files that say how to install, to people or to a build."""


def test_wheel_has_all_runtime_files() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    there = {path for name, globs in patterns.items() for glob in globs for path in (ROOT / name).glob(glob)}
    wanted = {
        path
        for package in ("adapters", "server")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.name not in CHECKED_WITH and path.suffix not in (".py", ".pyc", ".ts", ".mts")
    }
    assert wanted - there == set()


def test_changelog_and_project_have_one_version() -> None:
    """The number stands once, in `server.__version__`. The changelog's newest heading is about that version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "server.__version__"}
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    releases = [
        re.fullmatch(r"(\d+\.\d+\.\d+) \((unreleased|\d{4}-\d{2}-\d{2})\)", heading) for heading in headings
    ]
    versions = [release[1] for release in releases if release]
    assert len(versions) == len(headings) > 0, "each heading is a version and a date"
    assert versions[0] == server.__version__
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert numbers == sorted(set(numbers), reverse=True)
    assert not any(release and release[2] == "unreleased" for release in releases[1:])


def test_documented_extras_keep_the_editable_install() -> None:
    """Without `-e` pip would replace the installation of `make serve` by a copy, which would then never be
    updated."""
    pages = [path for path in INSTRUCTIONS if path.parent != ROOT / "docker"]  # nobody pulls within an image
    commands = r"(?:pip install|\$\(PIP\))[^`;:]*"
    found = [line for path in pages for line in re.findall(commands, path.read_text(encoding="utf-8"))]
    here = [line for line in found if re.search(r"[ '\"]\.\[", line)]
    assert here
    assert [line for line in here if " -e " not in line] == []


def test_documented_extras_do_not_query_a_registry_for_smolora() -> None:
    """No registry has it: pip would find nothing, or a stranger's package."""
    assert [path.name for path in INSTRUCTIONS if "smolora[" in path.read_text(encoding="utf-8")] == []


def imported() -> set[str]:
    """Return the top-level names of external imports."""
    found: set[str] = set()
    for path in (path for package in ("adapters", "server") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"adapters", "server"}


def test_imports_are_declared_dependencies() -> None:
    """Each is declared by name and with a bound: a transitive dependency may be older than needed."""
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
        "triton": "torch",  # comes with its builds for CUDA
    }
    assert {of_others.get(name, name) for name in imported()} - names == set()
    assert all(re.search(r">=\d", one) for one in project["dependencies"])


@pytest.mark.parametrize("jobs", ["-j1", "-j4"])
@pytest.mark.parametrize("how", ["flag", "variable"])
def test_taken_port_is_reported_before_the_set_up(how: str, jobs: str, tmp_path: Path) -> None:
    for path in (ROOT / "Makefile", ROOT / "pyproject.toml", *ROOT.glob("*.lock")):
        shutil.copy(path, tmp_path)
    (tmp_path / "server" / "web").mkdir(parents=True)
    shutil.copy(ROOT / "server" / "web" / "package-lock.json", tmp_path / "server" / "web")
    (tmp_path / "tests").mkdir()

    def served(port: int) -> "subprocess.CompletedProcess[str]":
        flags = [f"ARGS=--port {port}"] if how == "flag" else []
        # A make that runs this test passes its own flags on.
        own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        own |= {"SMOLORA_PORT": str(port)} if how == "variable" else {}
        command = ["make", jobs, "serve", "PYTHON=false", *flags]  # with no Python, the set-up ends as it begins
        return subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, check=False)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = served(port)
        assert done.returncode != 0
        assert done.stderr.startswith(f"port {port} on 127.0.0.1 is taken: ")
        assert "make serve ARGS='--port 8001'" in done.stderr
        assert "smolora needs Python" not in done.stderr
    assert served(port).stderr.startswith("smolora needs Python 3.11")
