"""Every example of README.md and of the pages of docs prints what it shows.

They are run as they stand there, in order, a tour against a new server.

- A block is `console` (lines that begin with `$ ` are a shell's, those below are what it prints), `python` (lines
  that begin with `# -> ` are what it prints), or has a comment `<!-- not run: why -->` above it.
- A block's commands are one shell, the blocks are one folder and one server, which is new and the default one.
- In what is shown, `…` is anything. A number of two decimals or more is measured: what is printed may differ by
  10 %, or by 0.01. A number of twelve digits or more is drawn at random: any such number will do. Blanks and line
  ends don't count, except between two numbers.
- Where there is no jq, commands that end in it are run without, and what they print isn't compared; the test then
  ends as skipped, and says so.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from server.cli.main import app
from tests.end_to_end.server_process import ServerProcess, default_threads, environment

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent.parent
README = ("README.md",)
TOURS = (
    (*README, "docs/training.md", "docs/adapters.md", "docs/settings.md"),
    ("docs/quickstart.md", "docs/api.md", "docs/cli.md"),
)
"""Pages in the order in which they go on from each other, against one server."""
PAGES = [page for tour in TOURS for page in tour]
SECONDS = 300.0
"""For one block."""

_BLOCK = re.compile(r"(?P<above>[^\n]*)\n```(?P<kind>[^\n]*)\n(?P<text>.*?)\n```$", re.DOTALL | re.MULTILINE)
_NOT_RUN = re.compile(r"<!-- not run: .+ -->")
_INTO_JQ = re.compile(r"(?:\s|\\\n)*\| jq .*", re.DOTALL)
_LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ [\w.]+ pid=\d+ request=[\w-]+ \S.*")
_MEASURED = re.compile(r"-?\d+\.\d{2,}|\d{12,}")
_BETWEEN_NUMBERS = re.compile(r"(?<=\d)\s+(?=-?\d)")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    text: str
    is_run: bool


def blocks(page: str) -> Iterator[Block]:
    """Return all fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("kind")) + 1
        yield Block(page, line, found["kind"], found["text"], _NOT_RUN.fullmatch(found["above"].strip()) is None)


def commands(block: Block) -> list[tuple[str, str]]:
    """Return (command, what it prints) of a `console` block."""
    found: list[tuple[list[str], list[str]]] = []
    goes_on = False
    for line in block.text.split("\n"):
        if goes_on or line.startswith("$ "):
            if not goes_on:
                found.append(([], []))
            found[-1][0].append(line if goes_on else line.removeprefix("$ "))
            goes_on = line.endswith("\\")
        else:
            found[-1][1].append(line)
    return [("\n".join(typed), "\n".join(printed)) for typed, printed in found]


def matches(shown: str, printed: str) -> bool:
    """Whether the one stands for the other."""
    rest, parts = _squeezed(printed), shown.split("…")
    for number, part in enumerate(parts, 1):
        end = _found(part, rest, r"\A" if number == 1 else "", r"\Z" if number == len(parts) else "")
        if end is None:
            return False
        rest = rest[end:]
    return True


def _found(shown: str, printed: str, before: str, after: str) -> int | None:
    """Return where the first text that `shown` stands for ends in `printed`, or None."""
    texts, numbers = _MEASURED.split(squeezed := _squeezed(shown)), _MEASURED.findall(squeezed)
    kinds = [r"(?<!\d)(?<!\d\.)(-?\d+\.\d++(?:e-?\d+)?)" if "." in number else r"\d+" for number in numbers]
    inner = "".join(re.escape(text) + kind for text, kind in zip(texts, [*kinds, ""], strict=True))
    measured = [float(number) for number in numbers if "." in number]
    for found in re.finditer(before + inner + after, printed):
        pairs = zip(measured, map(float, found.groups()), strict=True)
        if all(abs(number - expected) <= max(0.1 * abs(expected), 0.01) for expected, number in pairs):
            return found.end()
    return None


def _squeezed(text: str) -> str:
    return " ".join("".join(part.split()) for part in _BETWEEN_NUMBERS.split(text))


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("a b\n c", "ab c", True),
        ("ab", "abc", False),
        ("", "", True),
        ("", "x", False),
        ("a…c…e", "abcde", True),
        ("a…c…e", "abcdef", False),
        ("…e", "e", True),
        ("a…", "a", True),
        ("a…c", "ab", False),
        ('{"x":0.25}', '{"x":0.274}', True),
        ('{"x":0.25}', '{"x":17.125}', False),
        ('{"x":0.25}', '{"x":17}', False),
        ('{"weight":0.7}', '{"weight":0.8}', False),
        ('{"seed":123456789012}', '{"seed":5}', True),
        ('{"n":12}', '{"n":13}', False),
        ("loss 2.25  4.5", "loss 2.375 4.5", True),
        ("loss 2.25  4.5", "loss 2.5 4.5", False),
        ("2.25  4.25", "2.375\n4.125", True),
        ("2.25  14.25", "2.2513  14.25", True),
        ("2.25  4.25", "2.25  5.125", False),
        ("2.25  4.25", "2.25", False),
        ("-0.02 over", "-0.03 over", True),
        ("-0.02 over", "0.02 over", False),
        ("-15.27", "15.27", False),
        ("…2.25", "12.25", False),
        ("… loss 2.25 …", "loss 9.25, loss 2.25", True),
        ("… loss 2.25", "loss 2.25, loss 9.25", False),
        ("Found.  -15.27", "Found.   -15.27", True),
        ("(a.b)", "(aXb)", False),
    ],
)
def test_printed_texts_are_compared_with_placeholders(shown: str, printed: str, expected: bool) -> None:
    assert matches(shown, printed) is expected


@pytest.mark.parametrize(
    ("typed", "without"),
    [
        ("curl x | jq .a", "curl x"),
        ("curl x \\\n    | jq -c '.a[] | .b'", "curl x"),
        ("curl x | tail -n 1", "curl x | tail -n 1"),
    ],
)
def test_commands_run_without_jq(typed: str, without: str) -> None:
    assert _INTO_JQ.sub("", typed) == without


@pytest.mark.parametrize("page", [*PAGES, "docs/operations.md"])
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    found = list(blocks(page))
    assert len(found) == (ROOT / page).read_text(encoding="utf-8").count("\n```") / 2
    assert {block.kind for block in found if block.is_run} <= {"console", "python"}
    for block in found:
        shows_commands = block.kind != "console" or block.text.startswith("$ ")
        assert shows_commands, f"{page}:{block.line} begins with no command"


def test_every_command_has_a_section() -> None:
    text = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    sections = [name for line in re.findall(r"^## (.+)$", text, re.MULTILINE) for name in line.split(", ")]
    names = [name for command in typer.main.get_group(app).commands.values() if (name := command.name)]
    assert sorted(sections) == sorted(names)


class Reader:
    """Who does what the pages say, in a folder in which what it names is there, with the server at `url`."""

    def __init__(self, folder: Path, server: ServerProcess) -> None:
        self._folder = folder
        self._address = server.url.removeprefix("http://")
        self._environment = environment() | {"SMOLORA_URL": server.url, "COLUMNS": "200"}
        self._has_jq = shutil.which("jq") is not None
        self.not_compared: list[str] = []
        (folder / ".venv").symlink_to(sys.prefix)
        shutil.copytree(ROOT / "examples", folder / "examples")

    def run(self, block: Block) -> None:
        """AssertionError where something else is printed than shown, or a command fails."""
        if block.kind == "python":
            lines = block.text.split("\n")
            shown = "\n".join(line.removeprefix("# -> ") for line in lines if line.startswith("# -> "))
            self._compare(block, "the program", shown, self._printed(block, [sys.executable, "-c", block.text]))
            return
        typed = commands(block) if self._has_jq else self._without_jq(block)
        if not typed:
            return
        script = "set -e\n" + "\nprintf '\\0'\n".join(command for command, _ in typed) + "\nprintf '\\0'\n"
        outputs = self._printed(block, ["bash", "-c", script]).split("\0")
        for (command, shown), printed in zip(typed, outputs[:-1], strict=True):
            self._compare(block, command, shown, printed)

    def _without_jq(self, block: Block) -> list[tuple[str, str]]:
        """Return the block's commands without jq, or none if one of them needs jq's output."""
        typed = commands(block)
        with_jq = [command for command, _ in typed if _INTO_JQ.search(command)]
        self.not_compared += with_jq
        if any("$(" in command for command in with_jq):
            return []
        return [(_INTO_JQ.sub("", command), "…" if command in with_jq else shown) for command, shown in typed]

    def _printed(self, block: Block, arguments: list[str]) -> str:
        arguments[-1] = re.sub(r"(localhost|127\.0\.0\.1):8000", self._address, arguments[-1])
        done = subprocess.run(
            arguments,
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{block.page}:{block.line}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout.replace(self._address, "127.0.0.1:8000")

    @staticmethod
    def _compare(block: Block, command: str, shown: str, printed: str) -> None:
        message = f"{block.page}:{block.line}: {command}\n--- prints\n{printed}\n--- and not\n{shown}"
        assert matches(shown, printed), message


@pytest.mark.parametrize(
    "pages",
    [README, *(pytest.param(tour, marks=pytest.mark.thorough) for tour in TOURS)],
    ids=" ".join,
)
def test_readme_and_docs(base_dir: Path, tmp_path: Path, pages: tuple[str, ...]) -> None:
    # The README alone has one thread in make test: several would wait for each other while other tests run.
    with nullcontext() if pages == README else default_threads():
        server = ServerProcess(tmp_path / "data", base_dir=base_dir, workers=1)
    try:
        reader = Reader(tmp_path, server)
        for page in pages:
            for block in blocks(page):
                if block.is_run:
                    reader.run(block)
        check_log(server.log())
    finally:
        server.close()
    if reader.not_compared:
        pytest.skip(
            f"all passed, but without jq the output of {len(reader.not_compared)} commands wasn't compared"
        )


def check_log(log: str) -> None:
    """Check that the lines of the server, its worker and uvicorn have one format."""
    lines = log[log.index("Try, in another terminal") :].splitlines()[3:]
    assert [line for line in lines if not _LOG_LINE.fullmatch(line)] == []
    assert {line.split()[2] for line in lines} >= {"smolora.api", "smolora.worker"}
