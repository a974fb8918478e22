"""Links between pages resolve, and pages named in the code exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"docs/[\w/-]+\.\w+")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    missing = []
    for link in LINK.findall(text):
        if re.match(r"\w+:", link):  # another site
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            missing.append(link)

    assert not missing


def test_every_page_is_linked() -> None:
    texts = {page: FENCED.sub("", page.read_text(encoding="utf-8")) for page in PAGES}
    linked = {
        (page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in LINK.findall(texts[page])
    }

    assert not [str(page) for page in PAGES if page.parent != ROOT and page not in linked]


def test_pages_that_code_names_exist() -> None:
    files = [file for room in ("server", "adapters", "benchmarks", "docker") for file in (ROOT / room).rglob("*")]
    texts = {
        file: file.read_text(encoding="utf-8") for file in files if file.suffix in {".py", ".h", ".cpp", ".yml"}
    }
    named = {(file, name) for file, text in texts.items() for name in NAMED.findall(text)}

    assert named  # otherwise the pattern finds nothing
    assert not [(str(file), name) for file, name in named if not (ROOT / name).exists()]


def test_files_that_the_map_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`(\w[\w/.-]+)`", text) if "/" in name or name.endswith(".py")}
    rooms = [ROOT / room for room in ("server", "adapters", "docker", "tests")]
    known = [f"/{file.relative_to(ROOT)}" for room in rooms for file in (room, *room.rglob("*"))] + ["/setup.py"]

    assert len(named) > 50  # otherwise the pattern finds nothing
    assert [name for name in named if not any(file.endswith(f"/{name.rstrip('/')}") for file in known)] == []


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "CHANGELOG.md", "docs/settings.md", "docs/architecture.md"),
        *("server/model/cuda/__init__.py", "server/engine/cuda_backend.py", "server/training/varlen.py"),
    ],
)
def test_not_yet_run_on_a_gpu_is_said_until_there_is_a_report(name: str) -> None:
    """Once docs/gpu.md is a report of `make gpu`, whose first line names the card, nothing may say so."""
    report = ROOT / "docs" / "gpu.md"
    has_run = report.exists()
    if has_run:
        card = report.read_text(encoding="utf-8").partition("\n")[0]
        assert re.fullmatch(r"# \S.*, \d+ GiB; driver [\d.]+, CUDA [\d.]+, torch \d.*", card)
    says_so = "not yet run on a gpu" in (ROOT / name).read_text(encoding="utf-8").lower()

    assert says_so != has_run


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
