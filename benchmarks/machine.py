"""The machine and software of a run, as printed with its figures."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from server.system.messages import plural

PACKAGES = ("smolora", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    threads: int
    memory: int  # bytes
    python: str
    compiler: str
    commit: str  # of this checkout; "" without git
    packages: dict[str, str]
    cpu_family: str = ""  # "family 25, model 17"; names such as "AMD EPYC" cover several; "" if unknown

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
        """The processor's name, with family and model if known."""
        return f"{self.cpu} of {self.cpu_family}" if self.cpu_family else self.cpu

    @property
    def hardware(self) -> str:
        """The processor, the threads in use, and the commit."""
        found = f"{self.processor}, {plural(self.threads, 'thread')}"
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
    return _value_of(lines, "model name") or "unknown CPU"


def cpu_family() -> str:
    """Return the processor's family and model, or "" if the system doesn't report them."""
    lines = _cpuinfo()
    found = [(name, _value_of(lines, key)) for name, key in (("family", "cpu family"), ("model", "model"))]
    return ", ".join(f"{name} {number}" for name, number in found if number)


def has_feature(name: str) -> bool:
    """Return whether the processor has the feature of this Linux name; False if the system doesn't report
    features."""
    return any(name in line.split() for line in _cpuinfo() if line.startswith("flags"))


def _value_of(lines: list[str], name: str) -> str:
    """Return the first value of that name in /proc/cpuinfo, or "" if there is none."""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for given, _, value in found if given.strip() == name), "")


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def peak_rss(pid: int) -> int:
    """Return a process's peak resident bytes without its children, or 0 if the system doesn't report them."""
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
    """Return the first line that the command prints, or "" if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
