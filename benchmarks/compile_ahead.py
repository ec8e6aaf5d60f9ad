"""Compiles every Triton kernel that linconv ships, for GPUs that need not be there, and tells what each takes.

    python benchmarks/compile_ahead.py                       # all, into docs/kernels/triton_builds_<Triton>.md
    python benchmarks/compile_ahead.py --arch 90 --only ssd  # some, to standard output alone

Registers and spills come from the compiled code (cuobjdump), shared memory from Triton, lost matrix products from the
assembly (nvdisasm): ptxas 12.8, which Triton 3.6 brings, deletes some of sm_90's warpgroup products (wgmma) without a
word, and the kernel takes their results for zero. A kernel that spills more registers than it may, loses a matrix
product or takes more shared memory than the GPU has is an error: exit status 1, and the table is left as it was.
"""

import argparse
import importlib
import inspect
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from source_digest import digest

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90, 100)
SOURCES = ("linconv/ops/*/triton*.py", "linconv/ops/triton_*.py")
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # that a block may have
HEAD = """# Triton kernels as compiled

Written by `python benchmarks/compile_ahead.py` (Triton {version}, sources `{sources}`), without a GPU: every build that
`linconv/ops/*/triton.py` ships. Registers are of a thread, of 255; stack is what it spills, in bytes, and at most may,
where a GPU was found to be faster so; shared memory is of a block.
"""


def table_of(version: str) -> Path:
    """The committed table of a Triton version such as 3.6.0."""
    return ROOT / f"docs/kernels/triton_builds_{'.'.join(version.split('.')[:2])}.md"


def modules(only: str = "") -> list[str]:
    """Names of the modules that hold Triton kernels."""
    found = sorted((ROOT / "linconv/ops").glob("*/triton.py"))
    return [f"linconv.ops.{path.parent.name}.triton" for path in found if only in path.parent.name]


def builds_of(name: str, capability: int):
    """What a module ships for a compute capability, which its ``shipped`` may or may not tell apart; each once."""
    shipped, found = importlib.import_module(name).shipped, {}
    for build in shipped(capability) if inspect.signature(shipped).parameters else shipped():
        found.setdefault(str(replace(build, label="")), build)
    return list(found.values())


def told(cubin: bytes, *command: str) -> str:
    """What a tool, which reads files, says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread of the one kernel in a cubin."""
    from triton import knobs

    usage = told(cubin, knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


def disassembler() -> str:
    found = shutil.which("nvdisasm")
    if found:
        return found
    from triton import knobs

    return knobs.nvidia.nvdisasm.path


def assembly(cubin: bytes) -> str:
    return told(cubin, disassembler(), "-c")


def loses_product(code: str) -> bool:
    """Whether ptxas has deleted a whole group of warpgroup products.

    What waits for the group then waits for an empty product in its place, into no register. Where nobody needs the
    result that is right, but then the kernel should not ask for it. The number of products would not tell: a loop that
    ptxas unrolls has more of them than the PTX.
    """
    return re.search(r"\bHGMMA\S*\s+RZ,\s*gdesc\[URZ\]", code) is not None


def compiled(build, capability: int) -> tuple[int, int, int, bool, float]:
    """(registers, stack, shared bytes, whether it loses a matrix product, seconds it took) of a build."""
    begun = time.perf_counter()
    kernel = build.compile(capability)
    cubin = kernel.asm["cubin"]
    # Only where it can be, since a large kernel takes half a second to disassemble.
    loses = "wgmma.mma_async" in kernel.asm["ptx"] and loses_product(assembly(cubin))
    return *resources(cubin), kernel.metadata.shared, loses, time.perf_counter() - begun


_work: list = []  # what processes that are forked compile: a build is no message


def _compiled(number: int):
    return compiled(*_work[number])


def all_compiled(builds, capability: int, jobs: int):
    """Each build's :func:`compiled`, in their order, as soon as it is there."""
    if jobs == 1:
        yield from (compiled(build, capability) for build in builds)
        return
    _work[:] = [(build, capability) for build in builds]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_compiled, range(len(builds)))


def rows(builds, capability: int, progress=sys.stderr, jobs: int = 1):
    """(name, label, warps, stages, registers, stack, stack it may have, shared bytes, problem or "") for each build."""
    builds = list(builds)
    for build, (registers, stack, shared, loses, seconds) in zip(builds, all_compiled(builds, capability, jobs)):
        problems = {
            "spills": stack > build.stack,
            "loses a matrix product": loses,
            "too much shared memory": shared > SHARED_BYTES[capability],
        }
        problem = ", ".join(name for name, found in problems.items() if found)
        if progress:
            print(
                f"sm_{capability} {build.name} {build.label}: {registers} registers, {stack} bytes of stack, "
                f"{shared} of shared memory {problem.upper()} ({seconds:.1f} s)",
                file=progress,
                flush=True,
            )
        yield (
            build.name, build.label, build.num_warps, build.num_stages, registers, stack, build.stack, shared, problem,
        )  # fmt: skip


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="operators whose name has this in it")
    parser.add_argument("--label", default="", help="a regular expression that name and label of a build have in them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    options = parser.parse_args(argv)
    import triton

    sections, failed = [], []
    for name in modules(options.only):
        for capability in options.arch:
            builds = [b for b in builds_of(name, capability) if re.search(options.label, f"{b.name} {b.label}")]
            titles = ("kernel", "for", "warps", "stages", "registers", "stack", "at most", "shared")
            lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
            for *cells, problem in rows(builds, capability, jobs=options.jobs):
                lines.append("| " + " | ".join(map(str, cells)) + " |")
                if problem:
                    failed.append(f"sm_{capability} {cells[0]} {cells[1]}: {problem}")
            if builds:
                sections.append(f"## {name}, sm_{capability}\n\n" + "\n".join(lines) + "\n")
    text = HEAD.format(version=triton.__version__, sources=digest(*SOURCES)) + "\n" + "\n".join(sections)
    if (options.arch, options.only, options.label) != (ARCHITECTURES, "", ""):
        print(text)
    elif not failed:
        table_of(triton.__version__).write_text(text)
    for failure in failed:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
