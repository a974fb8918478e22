"""Where nothing may be skipped, nothing is: on a machine that is known to be able, native tests run or fail."""

import re
import subprocess
from pathlib import Path

import pytest

from server.model.native.build import NativeUnavailable
from tests.kits import native

ROOT = Path(__file__).parents[4]


@pytest.fixture
def nothing_native(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No library has been compiled, and there is no compiler."""
    monkeypatch.setattr(native, "CACHE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("nothing_native")
def test_elsewhere_they_are_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REQUIRE_NATIVE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="nothing native here"):
        native.native_library()
    native.lend_native(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["native.lock"]


@pytest.mark.usefixtures("nothing_native")
def test_where_they_are_required_they_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REQUIRE_NATIVE", "1")
    with pytest.raises(pytest.fail.Exception, match="REQUIRE_NATIVE=1, but "):
        native.native_library()
    with pytest.raises(NativeUnavailable):
        native.lend_native(tmp_path)


def test_no_other_test_decides_for_itself() -> None:
    """To skip for want of an instruction or a compiler is `kits.native`'s alone."""
    words = re.compile(r"skip.*(native|avx512|can_pack|bf16|compiler)|(native|avx512|can_pack|bf16).*skip", re.I)
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "tests").rglob("*.py")
        if path.name not in ("native.py", Path(__file__).name)
        for line in path.read_text(encoding="utf-8").splitlines()
        if words.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(("flags", "required"), [("avx2 avx512_bf16", True), ("avx2", False)])
def test_the_ci_requires_them_of_processors_that_have_all(tmp_path: Path, flags: str, required: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n", encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    script = script.replace('cd "$(dirname "$0")/.."', "").replace("/proc/cpuinfo", str(tmp_path / "cpuinfo"))
    nothing_is_installed = "apt-get() { false; }\napt-cache() { false; }\n"
    command = f"set -e\nunset REQUIRE_NATIVE\nmake() {{ env; }}\n{nothing_is_installed}{script}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ("REQUIRE_NATIVE=1" in ran.stdout.splitlines()) == required
