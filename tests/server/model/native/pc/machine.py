"""Bochs emulates a PC whose processor has instructions that this one lacks; Linux runs a program on it.

This shows the results on one core, but not the speed. It needs Debian's packages bochs, bochs-term, isolinux,
syslinux-common and xorriso, and a Linux kernel: the file of linux-image-cloud-amd64, which needn't be installed
(.ci/run has the commands).
"""

import os
import pty
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kits.cache import CACHE
from tests.server.model.native.build import WARNINGS, run

KERNELS = CACHE / "kernel"
"""Where a vmlinuz-… may be, besides /boot."""
PROCESSORS = {"avx512_bf16": 'tigerlake, add_features="avx512bf16"', "avx512": "corei7_skylake_x"}
"""Bochs's processors, by the instruction set that native code is compiled for."""
_LOADER = (Path("/usr/lib/ISOLINUX/isolinux.bin"), Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"))
_FIRMWARE = (Path("/usr/share/bochs/BIOS-bochs-latest"), Path("/usr/share/bochs/VGABIOS-lgpl-latest"))
_OPTIONS = "console=ttyS0 quiet nokaslr mitigations=off tsc=reliable no_timer_check panic=0"
_TIME = "idle=halt nohz=off highres=off lapic=notscdeadline"  # otherwise an idle machine may not wake up
_CHARACTER_DEVICES = {"dev/console": (5, 1), "dev/ttyS0": (4, 64)}


@dataclass(frozen=True)
class Ended:
    """The outcome of a program: its output, and its status as returned by waitpid."""

    output: str
    status: int


def missing() -> list[str]:
    """Return what this machine lacks for emulation."""
    commands = [name for name in ("bochs-bin", "xorriso") if shutil.which(name) is None]
    files = [str(path) for path in (*_LOADER, *_FIRMWARE) if not path.exists()]
    return [*commands, *files, *([] if _kernel() is not None else ["a kernel for x86-64 in " + str(KERNELS)])]


def emulate(processor: str, program: Path, names: Sequence[str], *, timeout: float) -> dict[str, Ended]:
    """Run the statically linked program once with each of the names as its argument.

    Return the outcomes. Raise TimeoutError, with the outcomes so far, after `seconds`.
    """
    kernel = _kernel()
    assert kernel is not None, missing()
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        init = scratch / "init"
        source = Path(__file__).with_name("init.cpp")
        run(["g++", "-O1", "-static", *WARNINGS, str(source), "-o", str(init)])
        disk, serial = scratch / "disk.iso", scratch / "serial.txt"
        files = {"init": init.read_bytes(), "program": program.read_bytes(), "names": "\n".join(names).encode()}
        _make_disk(disk, kernel, b"".join(_archive(files)), scratch / "disk")
        settings = scratch / "bochsrc"
        settings.write_text(_settings(processor, disk, serial, scratch / "log.txt"), encoding="ascii")
        _boot(settings, serial, timeout)
        return dict(_parse(serial.read_text(encoding="utf-8", errors="replace")))


def _kernel() -> Path | None:
    found = sorted([*KERNELS.glob("vmlinuz-*"), *Path("/boot").glob("vmlinuz-*-amd64")])
    return found[-1] if found else None


def _archive(files: dict[str, bytes]) -> Iterator[bytes]:
    """Yield an initial file system for the kernel in cpio's new format, as in Linux's
    early-userspace/buffer-format."""
    entries = [("dev", stat.S_IFDIR | 0o755, (0, 0), b"")]
    entries += [(name, stat.S_IFCHR | 0o600, device, b"") for name, device in _CHARACTER_DEVICES.items()]
    entries += [(name, stat.S_IFREG | 0o755, (0, 0), data) for name, data in files.items()]
    for inode, (name, mode, (major, minor), data) in enumerate([*entries, ("TRAILER!!!", 0, (0, 0), b"")]):
        numbers = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % number for number in numbers) + name.encode() + b"\0"
        for part in (head, data):
            yield part + bytes(-len(part) % 4)


def _make_disk(disk: Path, kernel: Path, archive: bytes, directory: Path) -> None:
    directory.mkdir()
    for path in (kernel, *_LOADER):
        shutil.copyfile(path, directory / ("linux" if path is kernel else path.name))
    (directory / "archive").write_bytes(archive)
    started = f"KERNEL /linux\n APPEND initrd=/archive {_OPTIONS} {_TIME}"
    (directory / "isolinux.cfg").write_text(f"DEFAULT it\nPROMPT 0\nLABEL it\n {started}\n", encoding="ascii")
    boot = ("-b", _LOADER[0].name, "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table")
    run(["xorriso", "-as", "mkisofs", "-quiet", "-o", str(disk), *boot, str(directory)])


def _settings(processor: str, disk: Path, serial: Path, log: Path) -> str:
    return f"""cpu: model={processor}, count=1, ips=100000000, reset_on_triple_fault=0
memory: guest=1024, host=1024
romimage: file={_FIRMWARE[0]}
vgaromimage: file={_FIRMWARE[1]}
ata0-master: type=cdrom, path={disk}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={serial}
clock: sync=none
log: {log}
panic: action=fatal
error: action=ignore
info: action=ignore
display_library: term
"""


def _boot(settings: Path, serial: Path, timeout: float) -> None:
    """Boot, and wait until the machine is off."""
    screen, terminal = pty.openpty()  # on which `term` draws
    command = ["bochs-bin", "-q", "-f", str(settings), "-rc", "/dev/null"]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env={**os.environ, "TERM": "xterm"}
    )
    os.close(terminal)
    os.set_blocking(screen, False)
    deadline = time.monotonic() + timeout
    try:
        while process.poll() is None:
            if time.monotonic() > deadline or "Kernel panic" in _text(serial):
                raise TimeoutError(f"the machine isn't off after {timeout:.0f} s:\n{_text(serial)[-4000:]}")
            try:
                os.read(screen, 1 << 16)
            except OSError:  # nothing was drawn, or the terminal is closed
                time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
        os.close(screen)


def _text(serial: Path) -> str:
    return serial.read_text(encoding="utf-8", errors="replace") if serial.exists() else ""


def _parse(text: str) -> Iterator[tuple[str, Ended]]:
    output = ""
    for line in text.splitlines(keepends=True):
        if line.startswith("begun "):
            output = ""
        elif line.startswith("ended "):
            _, name, status = line.split()
            yield name, Ended(output, int(status))
        else:
            output += line
