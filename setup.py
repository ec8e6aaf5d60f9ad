"""Builds the compiled libraries with CMake and packs them as plain files of the package.

They use torch's stable ABI and no Python.h: one wheel (py3-none-<platform>) serves every Python and torch >= 2.11.
"""

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).parent.resolve()


def tool(name: str) -> str:
    """The program as pip installed it beside this Python, else the one on PATH."""
    found = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    if found is None:
        raise SystemExit(f"linconv's build needs {name}: pip install {name}")
    return found


def torch_dir() -> Path:
    """The folder of the torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("linconv's build needs torch >= 2.11 in the environment that builds it: pip install torch")
    return Path(spec.origin).parent


def step(*command: str | Path) -> None:
    """Runs a step of the build. pip ends with the last line: behind a traceback nobody would look for the reason."""
    if subprocess.run(command).returncode:
        raise SystemExit(
            "linconv's build failed, for the reason above. It wants a C++20 compiler, GCC 11, Clang 14, or later, on "
            "PATH or in CXX."
        )


class build_native(Command):
    """Configure, build and install the compiled libraries into linconv/lib."""

    description = "build the compiled libraries (CMake)"
    user_options = [
        ("inplace", "i", "put the libraries into the source tree"),
        ("build-lib=", None, "build folder"),
        ("sanitize=", None, "value of -fsanitize=; the libraries then go to build/sanitize/lib only"),
    ]
    boolean_options = ["inplace"]

    def initialize_options(self) -> None:
        self.inplace = False
        self.editable_mode = False  # set by setuptools for `pip install -e`
        self.build_lib = None
        self.sanitize = ""

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def get_source_files(self) -> list[str]:
        files = [ROOT / "CMakeLists.txt", *(ROOT / "cmake").rglob("*"), *(ROOT / "csrc").rglob("*")]
        return [str(path.relative_to(ROOT)) for path in sorted(files) if path.is_file()]

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def run(self) -> None:
        in_tree = self.inplace or self.editable_mode
        work = ROOT / "build" / ("sanitize" if self.sanitize else "cmake")
        package = (ROOT if in_tree else Path(self.build_lib).resolve()) / "linconv"
        target = (work if self.sanitize else package) / "lib"
        work.mkdir(parents=True, exist_ok=True)
        cmake, ninja = tool("cmake"), tool("ninja")
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "TORCH_DIR": torch_dir(),
            "LINCONV_VERSION": self.distribution.get_version(),
            "LINCONV_SANITIZE": self.sanitize,
            "LINCONV_CUDA": os.environ.get("LINCONV_CUDA", "auto"),
            "LINCONV_QUICK_BUILD": os.environ.get("LINCONV_QUICK_BUILD", "0"),
            "LINCONV_WERROR": os.environ.get("LINCONV_WERROR", "0"),
        }
        if "LINCONV_CUDA_ARCHS" in os.environ:
            options["LINCONV_CUDA_ARCHS"] = os.environ["LINCONV_CUDA_ARCHS"]
        define = [f"-D{key}={value}" for key, value in options.items()]
        with open(work / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one tree wait for each other
            step(cmake, "-S", ROOT, "-B", work, "-G", "Ninja", *define)
            if options["LINCONV_CUDA"] != "auto":
                step(cmake, "--build", work)
            elif subprocess.run([cmake, "--build", work]).returncode:
                # Triton has the same kernels: no reason to fail. Where it was the CPU library, this ends in the reason.
                step(cmake, "-B", work, "-DLINCONV_CUDA=failed")
                step(cmake, "--build", work)
            step(cmake, "--install", work, "--prefix", target)


class build_with_native(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class platform_wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # A Python for both of Apple's processors builds for the one that it runs on.
        return "py3", "none", super().get_tag()[2].replace("universal2", platform.machine())


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:  # the wheel is for one platform
        return True


if sys.platform not in ("linux", "darwin"):
    raise SystemExit(f"linconv builds on Linux and macOS, not on {sys.platform}; Windows has Linux as WSL")
setup(
    distclass=BinaryDistribution,
    cmdclass={"build": build_with_native, "build_native": build_native, "bdist_wheel": platform_wheel},
)
