"""The machine and the software that figures were taken with, as they are printed beside them."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("smolora", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    threads: int
    memory: int  # bytes
    python: str
    compiler: str
    commit: str  # of this checkout; "" where there is no git
    packages: dict[str, str]
    cpu_family: str = ""  # "family 25, model 17": names such as "AMD EPYC" are of several; "" where it isn't told

    @classmethod
    def this(cls, threads: int) -> "Machine":
        packages = {name: version(name) for name in PACKAGES}
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(
            cpu_name(),
            os.cpu_count() or 1,
            threads,
            memory,
            platform.python_version(),
            _first_line("c++", "--version"),
            _commit(),
            packages,
            cpu_family(),
        )

    @property
    def processor(self) -> str:
        """Its name, and where that is known, of which family and model."""
        return f"{self.cpu} of {self.cpu_family}" if self.cpu_family else self.cpu

    @property
    def hardware(self) -> str:
        """The processor, the threads in use, and the commit."""
        found = f"{self.processor}, {self.threads} threads"
        return f"{found}; commit {self.commit}" if self.commit else found

    @property
    def software(self) -> str:
        """The cores, the memory, and the versions of Python, the packages and the compiler."""
        packages = [f"{name} {number}" for name, number in self.packages.items()]
        found = [f"{self.cores} cores, {self.memory / 2**30:.0f} GiB", f"Python {self.python}", *packages]
        return ", ".join([*found, *([self.compiler] if self.compiler else [])])

    def __str__(self) -> str:
        return f"{self.hardware}; {self.software}"


def cpu_name() -> str:
    if not (lines := _cpuinfo()):
        return platform.processor() or platform.machine()
    return _told(lines, "model name") or "unknown CPU"


def cpu_family() -> str:
    """The processor's family and model; "" where the system doesn't tell them."""
    lines = _cpuinfo()
    found = [(name, _told(lines, told)) for name, told in (("family", "cpu family"), ("model", "model"))]
    return ", ".join(f"{name} {number}" for name, number in found if number)


def has_feature(name: str) -> bool:
    """Whether the processor has what Linux calls so; False where the system doesn't tell."""
    return any(name in line.split() for line in _cpuinfo() if line.startswith("flags"))


def _told(lines: list[str], name: str) -> str:
    """What the first line of that name says; "" where there is none."""
    found = (line.partition(":") for line in lines)
    return next((told.strip() for given, _, told in found if given.strip() == name), "")


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def peak_rss(pid: int) -> int:
    """Bytes that a process has held at most, without its children; 0 where the system doesn't tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _commit() -> str:
    found = _first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")
    changed = _first_line("git", "-C", str(Path(__file__).parent), "status", "--porcelain", "-uno")
    return f"{found} with changes" if found and changed else found


def _first_line(*command: str) -> str:
    """What the command prints first; "" where there is no such program, or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
