"""Virtual environments under CACHE/peers for the peers that can't share ours.

    python -m benchmarks.peers make llama.cpp      (about 8 minutes on 2 cores: it is compiled)
    python -m benchmarks.peers make openvino       (about 2 GB)
    python -m benchmarks.peers make scikit-learn

A peer is complete if it has a mark, which is written last.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.command import Say, cores

MARK = "made.json"
LLAMA_CPP, OPENVINO, SCIKIT_LEARN = "llama.cpp", "openvino", "scikit-learn"
LLAMA_CPP_PACKAGE = "llama-cpp-python==0.3.36"
OPENVINO_PACKAGES = ("openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "torch>=2.9,<3")
SCIKIT_LEARN_PACKAGE = "scikit-learn==1.7.2"
BUILD_PACKAGES = ("cmake>=3.21", "ninja")
BUILD_FLAGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",  # all instructions of this processor
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
_AVX2_FLAGS = {"GGML_NATIVE": "OFF", "GGML_AVX2": "ON", "GGML_FMA": "ON", "GGML_F16C": "ON", "GGML_BMI2": "ON"}
INSTRUCTION_FLAGS: Mapping[str, Mapping[str, str]] = {
    "avx2": _AVX2_FLAGS,
    "avx512": {**_AVX2_FLAGS, "GGML_AVX512": "ON"},
}
"""llama.cpp's build flags that restrict its instructions, as NATIVE_INSTRUCTIONS restricts our server's."""
PROGRAMS = ("llama-server", "llama-quantize")


@dataclass(frozen=True)
class MadePeer:
    """An installed peer."""

    directory: Path  # its virtual environment
    version: str

    @property
    def python(self) -> Path:
        return self.program("python")

    def program(self, name: str) -> Path:
        return self.directory / "bin" / name


def find(cache: Path, name: str) -> MadePeer | None:
    """Return the peer, or None if it isn't completely installed."""
    directory = cache.resolve() / "peers" / name
    try:
        return MadePeer(directory, str(json.loads((directory / MARK).read_bytes())["version"]))
    except FileNotFoundError:
        return None


def make(cache: Path, name: str, say: Say) -> MadePeer:
    """Install the peer from scratch. Raise CalledProcessError if a step fails."""
    directory = cache.resolve() / "peers" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    say(f"making a virtual environment for {name}")
    _run(sys.executable, "-m", "venv", directory)
    version = MAKERS[name](directory, say)
    (directory / MARK).write_text(json.dumps({"version": version}) + "\n", encoding="utf-8")
    say(f"made {name}: {version}")
    return MadePeer(directory, version)


def restricted(instructions: str) -> str:
    """Return the name of llama.cpp restricted to these instructions."""
    return f"{LLAMA_CPP}-{instructions}"


def _make_llama_cpp(directory: Path, say: Say, instructions: str | None = None) -> str:
    """Build llama.cpp's server and quantizer from the source distribution of the Python package."""
    sources = directory / "sources"
    _install(directory, *BUILD_PACKAGES)
    say(f"downloading the source of {LLAMA_CPP_PACKAGE}")
    package = LLAMA_CPP_PACKAGE.partition("=")[0]
    _pip(directory, "download", "--no-deps", "--no-binary", package, "--dest", sources, LLAMA_CPP_PACKAGE)
    (archive,) = sources.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(sources, filter="data")
    (source,) = sources.glob("*/vendor/llama.cpp")
    say("compiling llama.cpp: about 8 minutes on 2 cores")
    build = directory / "build"
    chosen = {**BUILD_FLAGS, **(INSTRUCTION_FLAGS[instructions] if instructions else {})}
    flags = [f"-D{key}={value}" for key, value in chosen.items()]
    # llama.cpp takes its version from git, which must not find our own checkout.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(sources)}
    environment["PATH"] = f"{directory / 'bin'}{os.pathsep}{environment['PATH']}"
    _run(directory / "bin/cmake", "-S", source, "-B", build, "-G", "Ninja", *flags, env=environment)
    threads = str(cores())
    _run(directory / "bin/cmake", "--build", build, "-j", threads, "--target", *PROGRAMS, env=environment)
    for program in PROGRAMS:
        shutil.copy2(build / "bin" / program, directory / "bin" / program)
    shutil.rmtree(build)
    shutil.rmtree(sources)
    limits = f" for {instructions}" if instructions else ""
    return f"llama.cpp of {LLAMA_CPP_PACKAGE}, built with {_compiler()}{limits}"


def _make_openvino(directory: Path, say: Say) -> str:
    say(f"installing {', '.join(OPENVINO_PACKAGES)}")
    _install(directory, *OPENVINO_PACKAGES)
    return OPENVINO_PACKAGES[0]


def _make_scikit_learn(directory: Path, say: Say) -> str:
    say(f"installing {SCIKIT_LEARN_PACKAGE}")
    _install(directory, SCIKIT_LEARN_PACKAGE)
    return SCIKIT_LEARN_PACKAGE


MAKERS: dict[str, Callable[[Path, Say], str]] = {
    LLAMA_CPP: _make_llama_cpp,
    OPENVINO: _make_openvino,
    SCIKIT_LEARN: _make_scikit_learn,
    **{restricted(name): partial(_make_llama_cpp, instructions=name) for name in INSTRUCTION_FLAGS},
}


def _install(directory: Path, *packages: str) -> None:
    _pip(directory, "install", "--quiet", *packages)


def _pip(directory: Path, *arguments: str | Path) -> None:
    _run(
        directory / "bin/python", "-m", "pip", *arguments, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    )


def _compiler() -> str:
    done = subprocess.run(("c++", "--version"), capture_output=True, text=True, check=True)
    return done.stdout.partition("\n")[0]


def _run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    subprocess.run(tuple(map(str, command)), check=True, env=env)
