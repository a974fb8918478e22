"""Puts the native code into a wheel, compiled for every instruction set of this kind of machine; and its commit.

Nothing is compiled without a C++ compiler, or for an editable install: the server compiles at its first start.
"""

import logging
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from server.model.native.build import NativeUnavailable, compile_libraries
from server.system.version import FILE, commit

PREBUILT = "server/model/native/prebuilt"


class BuildWithNative(build_py):
    """Compile the native libraries next to the copied modules."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        built = os.environ.get("COMMIT") or commit() or ""  # an image is built without Git's files
        Path(self.build_lib, "server", FILE).write_text(built, encoding="ascii")
        directory = Path(self.build_lib, PREBUILT)
        shutil.rmtree(directory, ignore_errors=True)  # an earlier build's
        try:
            compile_libraries(directory)
        except NativeUnavailable as reason:
            logging.warning("the wheel contains no native code: %s", reason)


class Wheel(bdist_wheel):
    """A wheel whose tag names the machine if it contains native code."""

    def get_tag(self) -> tuple[str, str, str]:
        build_lib = self.get_finalized_command("build").build_lib
        self.root_is_pure = not any(Path(build_lib, PREBUILT).glob("*.so"))
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": BuildWithNative, "bdist_wheel": Wheel})
