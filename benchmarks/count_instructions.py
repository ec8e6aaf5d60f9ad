"""Counts the instructions of compiled kernels, by kind, in all and for each loop: no GPU is needed.

    python benchmarks/count_instructions.py cuda bidirectional_ssd --only 'BFloat16, 128'
    python benchmarks/count_instructions.py triton bidirectional_ssd --only 'chunk_outputs.*dstate 128: hydra'

A multiprocessor of sm_80 to sm_120 issues at most four instructions a cycle, each for a warp. So the instructions of a
warp for some work, times the number of warps, over 4, are a floor in cycles besides those of bytes and products;
waiting warps take longer. A loop's count includes its inner loops once. Needs a disassembler, nvdisasm,
which Triton has, and nvcc for csrc/*/cuda.cu.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from compile_ahead import assembly, builds_of
from compile_ahead_cuda import ROOT, flags, readable

# What an instruction is for, by how its name begins; the first that fits. The rest are sums on addresses and the like.
KINDS = {
    "products": "HMMA|HGMMA|IMMA|UTC.*MMA|QGMMA|DMMA",
    "float": "FADD|FMUL|FFMA|FMNMX|HADD2|HFMA2|HMUL2",
    "double": "DADD|DMUL|DFMA|DSETP",
    "special": "MUFU",
    "convert": "F2F|F2FP|I2F|I2FP|F2I|PRMT|FRND",
    "select": "FSEL|SEL|FSETP|ISETP|PLOP3|FCHK|P2R|R2P",
    "shared": "LDS|STS|LDSM|STSM|ATOMS",
    "global": "LDG|STG|LD|ST|UBLKCP|UTMA|RED|ATOM",
    "local": "LDL|STL",
    "exchange": "SHFL|VOTE|REDUX|MATCH",
    "wait": "BAR|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|SYNCS|MEMBAR|FENCE|CCTL|ERRBAR|NOP",
    "branch": "BRA|BRX|EXIT|END|CALL|RET|BSSY|BSYNC|BREAK|ENDCOLLECTIVE|NANOSLEEP",
}
ORDER = (*KINDS, "integer")


def kind_of(name: str) -> str:
    # LDGSTS copies from global memory, LDS and LDL are no LD.
    for kind in ("local", "shared", *KINDS):
        if re.match(rf"(?:{KINDS[kind]})(?:\.|$)", name):
            return kind
    return "global" if name.startswith(("LDG", "STG")) else "integer"


def listing(cubin: bytes) -> dict[str, list[str]]:
    """Lines of assembly by kernel."""
    parts = re.split(r"\.section\s+\.text\.(\S+?),.*\n", assembly(cubin))
    names = subprocess.run(["c++filt"], input="\n".join(parts[1::2]), capture_output=True, text=True, check=True).stdout
    names = [readable(name.removeprefix("void ").replace(" ", "_")) for name in names.splitlines()]
    return {name: part.splitlines() for name, part in zip(names, parts[2::2])}


def counts(lines: list[str]) -> list[tuple[str, Counter]]:
    """(what, instructions by kind): of the whole kernel, then of each loop in the order in which they end."""
    labels: dict[str, int] = {}
    names: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in lines:
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?(\S+?)[\s;](.*)", line):
            condition, name, operands = found.groups()
            if name == "BRA" and (to := re.search(r"`\((\.L_\S+)\)", operands)):
                first = labels.get(to[1], len(names))
                # A jump back over the kernel's end comes from code moved behind it and is no loop.
                if first < len(names) and "END" not in names[first:]:
                    loops.append((first, len(names) + 1))
            names.append("END" if name == "EXIT" and not condition else name)
    kinds = [kind_of(name) for name in names]
    whole = [("in all", Counter(kinds))]
    return whole + [(f"loop {first}-{end - 1}", Counter(kinds[first:end])) for first, end in loops]


def compiled_cuda(operator: str, arch: str, only: str):
    source = ROOT / "csrc" / operator / "cuda.cu"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", *flags(), f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", source, "-o", cubin]
        subprocess.run(command, check=True)
        kernels = listing(cubin.read_bytes())
    yield from ((name, lines) for name, lines in kernels.items() if re.search(only, name))


def compiled_triton(operator: str, arch: str, only: str):
    capability = int(arch.rstrip("a"))
    for build in builds_of(f"linconv.ops.{operator}.triton", capability):
        if re.search(only, f"{build.name} {build.label}"):
            for lines in listing(build.compile(capability).asm["cubin"]).values():
                yield f"{build.name} {build.label}, {build.num_warps} warps", lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("language", choices=("cuda", "triton"))
    parser.add_argument("operator", help="as in csrc/ and linconv/ops/")
    parser.add_argument("--arch", default="90a", help="(default: %(default)s)")
    parser.add_argument("--only", default="", help="a regular expression that a kernel's name or label has in it")
    options = parser.parse_args()
    compiled = compiled_cuda if options.language == "cuda" else compiled_triton
    for name, lines in compiled(options.operator, options.arch, options.only):
        print(f"\n## {name}, sm_{options.arch}\n")
        print("| | all | " + " | ".join(ORDER) + " |\n|" + "---|" * (len(ORDER) + 2))
        for what, by_kind in counts(lines):
            cells = [what, by_kind.total(), *(by_kind[kind] for kind in ORDER)]
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
