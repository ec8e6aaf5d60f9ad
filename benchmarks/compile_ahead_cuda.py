"""Compiles csrc/*/cuda.cu for every architecture and writes what ptxas says of each kernel: no GPU is needed.

    python benchmarks/compile_ahead_cuda.py                    # all, into docs/kernels/cuda_builds.md
    python benchmarks/compile_ahead_cuda.py --only conv --archs 90a   # some, to standard output alone

A kernel that spills registers is an error, and the table is left as it was. Needs nvcc and an installed torch (its
headers).
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from source_digest import ROOT, digest

TABLE = ROOT / "docs/kernels/cuda_builds.md"
SOURCES = ("csrc/*/cuda.cu",)
ARCHS = ("80", "90a", "100", "120")
KERNEL = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
INTRODUCTION = """# CUDA kernels as compiled

Written by `python benchmarks/compile_ahead_cuda.py` ({compiler}, sources `{sources}`); no GPU took part. For each
kernel of `csrc/*/cuda.cu` and each architecture: registers of a thread. None spills a register (that is an error of the
script). Shared memory is dynamic, and given where the kernel is launched; "static" is what a kernel has besides.
"""


def flags() -> list[str]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("compile_ahead_cuda.py needs an installed torch (2.11 or later) for its headers")
    definitions = ["-DUSE_CUDA", "-DLINCONV_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    include = [f"-I{ROOT / 'csrc'}", "-isystem", str(Path(spec.origin).parent / "include")]
    warnings = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC"]
    return ["-std=c++20", "-O3", *definitions, *include, *warnings]


def compiled(source: Path, archs: list[str]) -> str:
    """What ptxas says of one source on all architectures, names as in C++."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *flags(), *targets, "-Xptxas", "-v", "-c", str(source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{source.relative_to(ROOT)} does not compile:\n{done.stderr}")
    return subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout


def kernels(report: str) -> dict[str, dict[str, tuple[int, int, int]]]:
    """name: architecture: registers, spilled bytes, static shared memory."""
    found: dict[str, dict[str, tuple[int, int, int]]] = {}
    report = re.sub(r"'void ([^']*)'", lambda m: "'" + m[1].replace(" ", "_") + "'", report)
    name = arch = ""
    spilled = 0
    for line in report.splitlines():
        if match := KERNEL.search(line):
            name, arch = match.groups()
        elif match := STACK.search(line):
            spilled = int(match[2]) + int(match[3])
        elif (match := USED.search(line)) and name:
            found.setdefault(readable(name), {})[arch] = (int(match[1]), spilled, int(match[2] or 0))
            name = ""
    return found


def readable(name: str) -> str:
    """A kernel's name without what all of them have: namespaces, arguments and casts of template parameters."""
    name = re.sub(r"linconv::|\(anonymous_namespace\)::|\(int\)", "", name)
    return re.sub(r",_?", ", ", name.split("(")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), help="compute capabilities, such as 80 90a")
    parser.add_argument("--only", default="", help="operators whose name has this in it")
    arguments = parser.parse_args()
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    text = INTRODUCTION.format(compiler="nvcc " + re.search(r"V([\d.]+)", version)[1], sources=digest(*SOURCES))
    sources = [path for path in sorted((ROOT / "csrc").glob("*/cuda.cu")) if arguments.only in path.parent.name]
    spills = []
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda source: compiled(source, arguments.archs), sources))
    for source, report in zip(sources, reports):
        op, columns = source.parent.name, [*(f"sm_{arch}" for arch in arguments.archs), "static"]
        text += f"\n## {op}\n\n| kernel | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
        for name, builds in kernels(report).items():
            registers = [str(builds[arch][0]) for arch in arguments.archs]
            spills += [f"{op}: {name} on sm_{arch}, {build[1]} bytes" for arch, build in builds.items() if build[1]]
            text += f"| `{name}` | {' | '.join(registers)} | {max(build[2] for build in builds.values())} |\n"
    if arguments.only or tuple(arguments.archs) != ARCHS:
        print(text)
    elif not spills:
        TABLE.write_text(text)
    if spills:
        sys.exit("registers spilled:\n" + "\n".join(spills))


if __name__ == "__main__":
    main()
