"""Copy the page's libraries from their npm packages: `make vendor`, after a change of server/web/package.json.

The packages' licences and `manifest.json` are stored with the files: for each file the package, its version, and
the SHA-256 of the original and of the vendored file. Changes are declared in `_CHANGES`.
"""

import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
VENDOR = ROOT / "server" / "web" / "vendor"
PACKAGES = ROOT / ".cache" / "web" / "node_modules"
MANIFEST = "manifest.json"

_FILES = {
    "preact.mjs": ("preact", "dist/preact.mjs"),
    "hooks.mjs": ("preact", "hooks/dist/hooks.mjs"),
    "preact.LICENSE": ("preact", "LICENSE"),
    "htm.mjs": ("htm", "dist/htm.mjs"),
    "htm.LICENSE": ("htm", "LICENSE"),
    "uplot.mjs": ("uplot", "dist/uPlot.iife.min.js"),
    "uplot.css": ("uplot", "dist/uPlot.min.css"),
    "uplot.LICENSE": ("uplot", "LICENSE"),
}
_CHANGES = {
    "hooks.mjs": 'imports "./preact.mjs": a browser knows no bare names without an inline import map',
    "preact.mjs": "without the link to its source map",
    "uplot.mjs": "a module: the package has no small one",
}


def adapted(file: str, original: bytes) -> bytes:
    """Return the vendored text of the package's file."""
    if file.endswith(".LICENSE"):
        return original
    text = re.sub(r"\n//# sourceMappingURL=\S+\s*$", "\n", original.decode())
    if file == "hooks.mjs":
        assert text.count('from"preact"') == 1
        text = text.replace('from"preact"', 'from"./preact.mjs"')
    if file == "uplot.mjs":
        text = text.rstrip() + "\nexport default uPlot;\n"
    return text.encode()


def sources() -> dict[str, bytes]:
    """Return each vendored file as its package has it. Raise FileNotFoundError if the packages aren't
    installed."""
    return {file: (PACKAGES / package / path).read_bytes() for file, (package, path) in _FILES.items()}


def manifest(originals: dict[str, bytes]) -> dict[str, dict[str, str]]:
    """Return the manifest of the installed packages."""
    versions = {
        package: json.loads((PACKAGES / package / "package.json").read_text())["version"]
        for package, _ in _FILES.values()
    }
    return {
        file: {
            "package": f"{_FILES[file][0]}@{versions[_FILES[file][0]]}",
            "path": _FILES[file][1],
            "original": hashlib.sha256(original).hexdigest(),
            "sha256": hashlib.sha256(adapted(file, original)).hexdigest(),
            **({"change": _CHANGES[file]} if file in _CHANGES else {}),
        }
        for file, original in originals.items()
    }


def main() -> None:
    originals = sources()
    for file, original in originals.items():
        (VENDOR / file).write_bytes(adapted(file, original))
    (VENDOR / MANIFEST).write_text(json.dumps(manifest(originals), indent=2) + "\n")


if __name__ == "__main__":
    main()
