"""How the native library is found, made and done without."""

import hashlib
import platform
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server.model.base.weights import BaseModel
from server.model.native import build, library
from server.model.native.build import (
    FLAGS,
    INSTRUCTIONS,
    MACHINES,
    NativeUnavailable,
    compile_libraries,
    flags_for,
    library_name,
    source_digest,
)
from server.model.native.library import computed_by, instructions, load_library, why_unavailable
from server.model.native.load import load_native
from tests.kits.cache import CACHE
from tests.kits.native import native_library
from tests.server.model.native.build import is_own

pytestmark = pytest.mark.usefixtures("compiled")

COMPILING = "compiling the native code, once"
REAL_COMPILER = shutil.which("g++") or "c++"


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    said: list[str] = []
    load_library(CACHE / "native", said.append)
    assert said == []


def test_the_prebuilt_library_is_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Path
) -> None:
    monkeypatch.setattr(library, "PREBUILT", compiled.parent)
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler
    said: list[str] = []
    load_library(tmp_path / "unused", said.append)
    assert said == []
    assert not (tmp_path / "unused").exists()
    assert why_unavailable(tmp_path / "unused") is None


def test_group_writable_prebuilt_libraries_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Path
) -> None:
    """A umask of 002 is some distributions' default. Our Python code is in the same directory."""
    monkeypatch.setattr(library, "PREBUILT", tmp_path)
    shutil.copy2(compiled, tmp_path)
    for place in (tmp_path, tmp_path / compiled.name):
        place.chmod(0o775)
    said: list[str] = []
    load_library(tmp_path / "unused", said.append)
    assert said == []


def test_a_prebuilt_library_that_does_not_load_is_compiled_in_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """For example, it was built with a newer C library."""
    monkeypatch.setattr(library, "PREBUILT", tmp_path / "prebuilt")
    unresolved = "int puts_of_a_later_libc(); int f() { return puts_of_a_later_libc(); }"
    stub(tmp_path / "prebuilt" / library_name(instructions()), unresolved, "-Wl,-z,now")
    said: list[str] = []
    load_library(tmp_path / "home", said.append)
    assert said[0].startswith(f"native code is not taken from {tmp_path / 'prebuilt'}: it can't be loaded: ")
    assert said[1:] == [COMPILING]


def test_a_prebuilt_library_of_another_source_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Path
) -> None:
    monkeypatch.setattr(library, "PREBUILT", tmp_path)
    shutil.copy2(compiled, tmp_path / "smolora-0123456789abcdef.so")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler"):
        load_library(tmp_path / "home")


def test_it_is_made_under_its_name_alone(tmp_path: Path, quick: None) -> None:
    """The real compiler made the one of `compiled`."""
    said: list[str] = []
    load_library(tmp_path / "made", said.append)
    assert said == [COMPILING]
    assert [path.name for path in (tmp_path / "made").iterdir()] == [library_name(instructions())]


def test_without_a_compiler_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler"):
        load_library(tmp_path / "made")


def test_a_compiler_that_fails(tmp_path: Path, compiler: Callable[[str], None]) -> None:
    compiler("echo it is broken >&2; exit 3")
    with pytest.raises(NativeUnavailable, match="it is broken"):
        compile_libraries(tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


def test_what_compiles_ends_with_who_waits_for_it(tmp_path: Path, compiler: Callable[[str], None]) -> None:
    """At once: SIGTERM, before a server is ready, is an exception like this one."""

    class Told(Exception):
        pass

    def tell(*_: object) -> None:
        raise Told

    compiler(f"sleep 20; touch {tmp_path}/went-on")
    before = signal.signal(signal.SIGALRM, tell)
    started = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(Told):
            compile_libraries(tmp_path / "made")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 10
    assert list((tmp_path / "made").iterdir()) == []


def test_what_is_needed_for_a_while_is_beside_the_library(
    tmp_path: Path, compiler: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """/tmp may be a few megabytes of memory."""
    monkeypatch.setenv("TMPDIR", "/nowhere")
    compiler('test "${last#"$TMPDIR"/}" != "$last" && echo it is there >&2; exit 3')
    with pytest.raises(NativeUnavailable, match="it is there"):
        compile_libraries(tmp_path / "made")


def test_a_system_without_the_static_library(
    tmp_path: Path, compiled: Path, compiler: Callable[[str], None]
) -> None:
    """Fedora's and RHEL's compiler: libstdc++-static is a package of its own there."""
    (tmp_path / "whole").write_bytes(compiled.read_bytes()[:-32])
    compiler(
        f"""case "$*" in *-static-libstdc++*) echo ld: cannot find -lstdc++ >&2; exit 1 ;; esac
        cp {tmp_path}/whole "$last\""""
    )
    load_library(tmp_path / "made")


def test_a_checkout_in_a_folder_with_any_name(
    tmp_path: Path, compiler: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The linker gets the file of exports by the name that it has; what it links is empty here."""
    place = tmp_path / "a, b" / "native"
    shutil.copytree(build.SOURCE, place)
    monkeypatch.setattr(build, "SOURCE", place)
    compiler(f"""case "$*" in *" -c "*) exec {REAL_COMPILER} -x c -c /dev/null -o "$last" ;; esac
        exec {REAL_COMPILER} "$@\"""")
    compile_libraries(tmp_path / "made")
    assert (tmp_path / "made" / library_name(instructions())).exists()


@pytest.mark.parametrize("size", [0, 10, 3000, -1])
def test_half_a_file_is_made_anew(tmp_path: Path, compiled: Path, quick: None, size: int) -> None:
    """Loading a part of a library may end the process: it is known before that."""
    (tmp_path / library_name(instructions())).write_bytes(compiled.read_bytes()[:size])
    said: list[str] = []
    load_library(tmp_path, said.append)
    reason = "it can't be loaded: a part of the file is missing or damaged"
    assert said == [f"native code is not taken from {tmp_path}: {reason}", COMPILING]
    assert (tmp_path / library_name(instructions())).read_bytes() == compiled.read_bytes()


def test_a_damaged_file_is_made_anew(tmp_path: Path, compiled: Path, quick: None) -> None:
    content = bytearray(compiled.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / library_name(instructions())).write_bytes(content)
    said: list[str] = []
    load_library(tmp_path, said.append)
    assert [line.rpartition(": ")[2] for line in said] == ["a part of the file is missing or damaged", COMPILING]


def stub(path: Path, source: str, *options: str) -> None:
    """A library of our name with other contents, whole."""
    path.parent.mkdir(exist_ok=True)
    command = [REAL_COMPILER, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path), *options]
    subprocess.run(command, input=source, text=True, check=True)
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


def entries(source: str) -> str:
    """C of all entries, which do nothing; the library says that it was compiled from `source`."""
    header = (build.SOURCE / "seam/abi.h").read_text()
    names = set(re.findall(r"smolora_\w+(?=\()", header)) - {"smolora_source"}
    assert len(names) == 16
    return f'const char *smolora_source() {{ return "{source}"; }}\n' + "".join(
        f"int {name}() {{ return 1; }}\n" for name in names
    )


def test_a_library_of_this_source_is_taken(tmp_path: Path) -> None:
    """The stub, so that the test below fails for what it changes."""
    stub(tmp_path / library_name(instructions()), entries(source_digest(instructions())))
    said: list[str] = []
    load_library(tmp_path, said.append)
    assert said == []


def test_a_library_of_another_source_is_compiled_again(tmp_path: Path, quick: None) -> None:
    stub(tmp_path / library_name(instructions()), entries(source_digest(instructions())[::-1]))
    said: list[str] = []
    loaded = load_library(tmp_path, said.append)
    reason = "it was compiled from another source"
    assert said == [f"native code is not taken from {tmp_path}: {reason}", COMPILING]
    assert loaded.smolora_compiler(), "what was compiled is loaded, though the other one had its name"


def test_a_library_that_lacks_an_entry_is_refused(tmp_path: Path) -> None:
    lacking = entries(source_digest(instructions())).replace("smolora_draw", "smolora_drawn")
    stub(tmp_path / library_name(instructions()), lacking)
    with pytest.raises(NativeUnavailable, match="undefined symbol: smolora_draw"):
        library._load(tmp_path / library_name(instructions()))


@pytest.mark.parametrize(
    "source", ["int smolora_source;", "int puts_of_a_later_libc(); int f() { return puts_of_a_later_libc(); }"]
)
def test_what_does_not_load_is_made_anew(tmp_path: Path, compiled: Path, quick: None, source: str) -> None:
    """Another library, or one that needs symbols that this system's libraries don't have."""
    stub(tmp_path / library_name(instructions()), source, "-Wl,-z,now")
    said: list[str] = []
    load_library(tmp_path, said.append)
    assert len(said) == 2
    assert "it can't be loaded: " in said[0]
    assert "undefined symbol" in said[0]
    assert (tmp_path / library_name(instructions())).read_bytes() == compiled.read_bytes()


def test_one_that_was_just_made_and_does_not_load_gets_no_name(
    tmp_path: Path, compiler: Callable[[str], None]
) -> None:
    compiler('echo nothing >"$last"')
    with pytest.raises(NativeUnavailable, match="can't be loaded"):
        load_library(tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


def test_all_of_its_source_decides_its_name() -> None:
    """A file that is left out would leave an old library in use."""
    found = (path for path in build.SOURCE.rglob("*") if path.suffix in (".cpp", ".h", ".map"))
    files = {str(path.relative_to(build.SOURCE)) for path in found}
    assert {*build.UNITS, *build.HEADERS, build._EXPORTS} == files


@pytest.mark.parametrize("instruction_set", ["avx512.h", "avx2.h", "neon.h"])
def test_no_two_structs_have_one_name(instruction_set: str) -> None:
    """In one library, which has the vectors of one instruction set."""
    others = {f"simd/{name}" for name in ("avx512.h", "avx2.h", "neon.h") if name != instruction_set}
    source = "".join((build.SOURCE / name).read_text() for name in {*build.UNITS, *build.HEADERS} - others)
    names = re.findall(r"^ *(?:struct|class)(?: alignas\(\d+\))? (\w+)[^;]*\{", source, re.MULTILINE)
    assert len(names) == len(set(names)) > 30


def test_only_its_entries_are_seen(compiled: Path) -> None:
    listed = subprocess.run(["nm", "-D", "--defined-only", compiled], capture_output=True, text=True, check=True)
    seen = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert seen == set(re.findall(r"smolora_\w+(?=\()", (build.SOURCE / "seam/abi.h").read_text()))


def test_a_threads_first_use_needs_no_memory(compiled: Path) -> None:
    """glibc ends the process where it has none for a thread's variables, or for their destructors."""
    command = ["readelf", "--wide", "--dynamic", "--relocs", str(compiled)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert ("R_AARCH64_TLS_TPREL64" if is_own("neon") else "STATIC_TLS") in told
    needed = subprocess.run(["nm", "-D", "--undefined-only", compiled], capture_output=True, text=True, check=True)
    assert "thread_atexit" not in needed.stdout


def test_it_says_what_computes() -> None:
    said = computed_by(native_library())
    assert said.startswith(source_digest(instructions()))
    assert re.search(r"\((g\+\+|.*[Cc]lang) \d+\.\d+", said)
    assert " ".join(flags_for(instructions())) in said
    assert "-ffp-contract=off" in FLAGS


def test_each_of_the_instructions_is_some_machines() -> None:
    assert {name for names in MACHINES.values() for name in names} == set(INSTRUCTIONS)
    assert not [flag for flag in flags_for("neon") if flag.startswith(("-mavx", "-mamx"))]
    assert not [flag for flag in flags_for("avx2") if "arm" in flag]


@pytest.mark.parametrize(
    ("machine", "wanted", "reason"),
    [
        ("riscv64", None, "it is written for Linux on x86-64 and 64-bit Arm"),
        ("x86_64", "neon", "NATIVE_INSTRUCTIONS must be one of avx512_bf16, avx512, avx2, not 'neon'"),
        ("aarch64", "avx2", "NATIVE_INSTRUCTIONS must be one of neon, not 'avx2'"),
    ],
)
def test_where_there_can_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, wanted: str | None, reason: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    if wanted is not None:
        monkeypatch.setenv("NATIVE_INSTRUCTIONS", wanted)
    with pytest.raises(NativeUnavailable, match=reason):
        load_library(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another kind of machine has what Arm has")
def test_a_processor_without_the_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(NativeUnavailable, match="this processor has no NEON"):
        load_library(tmp_path)


def test_other_dtypes_are_torchs_and_nothing_is_said_of_it(tiny_base: BaseModel, tmp_path: Path) -> None:
    said: list[str] = []
    assert load_native(tiny_base, tmp_path, 64, said.append) is None
    assert said == []
    assert list(tmp_path.iterdir()) == []
