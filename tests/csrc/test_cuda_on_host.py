"""csrc/*/cuda.cu without a GPU: compiled for the host (cuda_on_host.h), the operators' own tests judge its kernels."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from linconv import __version__
from linconv.ops import dispatch

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
MARCH = ["-march=x86-64-v3"] if os.uname().machine == "x86_64" else []  # what converts fp16
SANITIZE = os.environ.get("LINCONV_HOST_SANITIZE", "")  # value of -fsanitize=, whose runtime is then preloaded
if SANITIZE:
    INSTRUMENT = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr"]
else:  # Memory that is not aligned ends the process, as a GPU would end the kernel, and a number that overflows does.
    INSTRUMENT = ["-fsanitize=alignment,signed-integer-overflow,shift,bounds", "-fsanitize-undefined-trap-on-error"]

pytestmark = pytest.mark.skipif(
    COMPILER is None or not dispatch.build_info() or sys.platform != "linux",
    reason="needs Linux, a C++ compiler, and a machine of our instruction sets",
)

# The tests of each operator that hold for what its cuda.cu has. Left out: lengths outside the tensor, which only a host
# can refuse; gradients of the scan, which are Triton's; of Linformer attention what judges the reference, and what only
# CPU has; of the losses what CPU caches are for, and what the same code of another dtype goes through; the longest of
# some sequences. Of all: instruction sets and threads, which CUDA has none of, and how operators are registered and
# compiled, which is the same.
TESTS = {
    "linformer": "and not drops_that_share and not fewer_splits and not at_once and not a_padded_row and not 256-512",
    "short_conv": "and not outside_the_tensor",
    "gated_rms_norm": "",
    "bidirectional_ssd": "and fused and not tritons",
    "distillation_loss": "and not outside_the_tensor and not past_the_caches and not gradcheck "
    "and not (strides and not dtype1)",
    "selective_scan": "and not the_cpu_kernel",
    "ssd": "and (forward or padding_is_never_read or handed_over)",
}
OF_NONE = ("instruction_set", "number_of_threads", "opcheck", "test_compile", "and_compiled")
OPERATORS = list(TESTS)

# Results and gradients of each operator, to compare bit by bit.
RESULTS = """
import sys, torch
sys.path.insert(0, "tests/ops")
from scan_cases import REGIMES, scan_arguments, split
from linconv import ops
torch.manual_seed(0)
lens, dtype = torch.tensor([300, 37]), torch.bfloat16
x, weight = torch.randn(2, 300, 200).to(dtype), torch.randn(2, 200, 4).to(dtype)
found = {}
def keep(name, run, *inputs):
    inputs = [t.clone().requires_grad_() for t in inputs]
    y = run(*inputs)
    found[name] = [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]
keep("conv", lambda *t: ops.bidirectional_short_conv(*t, seq_lens=lens), x, weight)
keep("norm", lambda *t: ops.gated_rms_norm(*t, seq_lens=lens, group_size=100), x, torch.randn(2, 2, 300, 200).to(dtype),
     torch.randn(2, 200).to(dtype))
lens = torch.tensor([600, 37])
keep("linformer", lambda *t: ops.linformer_attention(*t, seq_lens=lens, dropout_p=0.1),
     *torch.randn(3, 2, 2, 600, 72).to(dtype), torch.randn(700, 70).to(dtype))
def loss(s, t, a, b):
    masks = dict(mask=mask, logits_mask=mask)
    return ops.distillation_loss([s, s], [t, t.float()], a, b, **masks, layer_norm=True)
wide, logits, mask = torch.randn(2, 40, 1400).to(dtype), torch.randn(2, 40, 3000).to(dtype), torch.rand(2, 40) < 0.5
keep("loss", loss, wide, wide.flip(0), logits, logits.flip(0))
x, dt, z = torch.randn(3, 2, 150, 70).to(dtype)
B, C = torch.randn(2, 2, 150, 1, 16).to(dtype)
options = dict(dt_softplus=True, seq_lens=torch.tensor([150, 37]))
keep("selective_scan", lambda *t: ops.selective_scan(*t[:5], z=t[5], **options), x, dt, -torch.rand(70, 16), B, C, z)
tensors, rest = split(scan_arguments(2, 9, 4, 40, 2, 33, dtype=dtype))
found["ssd"] = ops.ssd(*tensors, **rest, return_final_states=True)
for name, regime in REGIMES.items():
    tensors, rest = split(scan_arguments(1, 70, 1, 64, 1, 64, per_direction=regime, dtype=dtype))
    found[name] = [ops.bidirectional_ssd(*tensors, **rest, dt_softplus=True)]
torch.save(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The folder of a library whose operators are those of csrc/*/cuda.cu; test processes share it."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "cuda_on_host"
    folder.mkdir(exist_ok=True)
    built = folder / "liblinconv_cpu.so"
    torch_dir = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", *MARCH, "-DLINCONV_ISA=host"]
    flags += ["-ffp-contract=fast"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [f'-DLINCONV_VERSION="{__version__}"', '-DLINCONV_CUDA_STATUS="on the host"', '-DLINCONV_CUDA_BUILT=""']
    flags += [f"-I{ROOT / 'csrc'}"]
    flags += [f"-I{Path(__file__).parent}", "-isystem", torch_dir / "include"]
    flags += INSTRUMENT
    if SANITIZE:  # stack frames without redzones: fibers leave theirs by longjmp
        flags += ["--param", "asan-stack=0", "-fno-omit-frame-pointer", "-O1", "-Wno-error=maybe-uninitialized"]
    sources = [ROOT / "csrc" / name for name in ("library.cpp", "common/isa.cpp", "common/tensor.cpp")]
    sources += [Path(__file__).with_name(f"{name}.cpp") for name in ("cuda_on_host", "tensor_cores_probe")]
    sources += sorted((ROOT / "csrc").glob("*/cuda.cu"))
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            objects = [folder / f"{i}.o" for i in range(len(sources))]
            header = folder / "header.h"  # compiled once for all sources
            header.write_text('#include "common/cuda.h"\n')

            def compile_one(source, target, language="c++"):
                subprocess.run([COMPILER, *flags, "-x", language, "-c", source, "-o", target], check=True)

            compile_one(header, f"{header}.gch", "c++-header")
            flags += ["-include", header]
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # another process of the tests may be waiting
                list(pool.map(compile_one, sources, objects))
            link = ["-shared", *INSTRUMENT, *objects, torch_dir / "lib" / "libtorch_cpu.so"]
            subprocess.run([COMPILER, *link, "-Wl,--allow-shlib-undefined", "-o", folder / "new.so"], check=True)
            (folder / "new.so").rename(built)
    return folder


def run(library, *command, **variables):
    environment = {**os.environ, "LINCONV_LIBRARY_PATH": str(library), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("operators", [OPERATORS[:4], OPERATORS[4:]], ids="-".join)  # two: to start takes seconds
def test_kernels_pass_the_operators_tests(library, operators):
    chosen = " or ".join(f"(test_{op} {TESTS[op]})" for op in operators)
    chosen = f"({chosen}) and not ({' or '.join(OF_NONE)})"
    files = [f"tests/ops/test_{op}.py" for op in operators]
    done = run(library, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen, *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout
    for file in files:  # something of each file passed
        assert re.search(rf"{file} [^\n]*\.", done.stdout), done.stdout


def test_tensor_cores(library):
    options = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    done = run(library, "-m", "pytest", *options, "tests/csrc/tensor_cores.py")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_gradients_of_the_fused_scan_are_tritons(library):
    """The same bits as on backend "triton": they are made of the arguments, not of what forward gave."""
    pytest.importorskip("triton")
    code = """
import sys, torch
sys.path.insert(0, "tests/ops")
import interpreter
from scan_cases import scan_arguments, split
from linconv import ops
from linconv.ops import dispatch
dispatch._cuda_kernels = dispatch._cpu_kernels  # the tensors' device is the GPU here
torch.manual_seed(0)
operator = dispatch.operator
dispatch.operator = lambda op, backend: operator(op, "cuda" if backend == "cpu" else backend)
leaves = {n: t.requires_grad_() for n, t in scan_arguments(1, 20, 1, 64, 1, 64, dtype=torch.bfloat16).items()}
tensors, rest = split(leaves)
found = []
for backend in ("cpu", "triton"):
    y = ops.bidirectional_ssd(*tensors, **rest, dt_softplus=True, backend=backend)
    found.append(torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y)))
assert len(found[0]) == 7 and all(a.any() and torch.equal(a, b) for a, b in zip(*found))
"""
    done = run(library, "-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_the_order_of_threads_does_not_show(library, tmp_path):
    results = []
    for order in ("forward", "backward"):
        file = tmp_path / order
        done = run(library, "-c", RESULTS, file, LINCONV_HOST_ORDER=order)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(file))
    for name, tensors in results[0].items():
        for ours, others in zip(tensors, results[1][name]):
            assert ours.isfinite().all() and torch.equal(ours, others), name


def test_every_cuda_source_is_judged():
    assert {path.parent.name for path in (ROOT / "csrc").glob("*/cuda.cu")} == set(TESTS)


def test_lengths_outside_the_tensor_touch_nothing_outside(library):
    code = """
import torch, linconv
x, weight = torch.ones(1, 1, 5, 3), torch.ones(1, 3, 4)
def conv(**lens):
    return torch.ops.linconv.short_conv(x, weight, None, False, False, 0, lens.get("seq_lens"), lens.get("cu_seqlens"))
whole = conv()
assert torch.equal(conv(seq_lens=torch.tensor([900])), whole)
assert not conv(seq_lens=torch.tensor([-3])).any()
for bounds in ([0, 900], [-7, 5], [3, 3, 1], [5, 0], [0]):
    assert conv(cu_seqlens=torch.tensor(bounds)).isfinite().all()
"""
    done = run(library, "-c", code)
    assert done.returncode == 0, done.stderr


def test_the_fused_scan_checks_what_it_reads(library):
    code = """
import sys, pytest, torch
sys.path.insert(0, "tests/ops")
from scan_cases import scan_arguments
import linconv

def call(change=(), seq_lens=None, cu_seqlens=None, **sizes):
    size = {"batch": 1, "length": 5, "heads": 2, "headdim": 64, "groups": 2, "dstate": 64, **sizes}
    arguments = scan_arguments(**size, dtype=torch.bfloat16)
    torch.manual_seed(0)
    arguments.update({n: f(arguments[n]) for n, f in dict(change).items()})
    return torch.ops.linconv.bidirectional_ssd(*arguments.values(), True, 0.0, 1.0, "both", seq_lens, cu_seqlens)

for message, sizes in {
    "headdim is 32, the CUDA kernel wants 64": {"headdim": 32},
    "dstate is 96, the CUDA kernel wants 64 or 128": {"dstate": 96},
    "x has dtype Float, the CUDA kernel wants BFloat16 or Half": {"change": {"x": torch.Tensor.float}},
    "B and C are not of x's dtype": {"change": {"C": torch.Tensor.half}},
    "A is not of the math dtype": {"change": {"A": torch.Tensor.half}},
    "dt has size 4 in dimension 2, wanted 5": {"change": {"dt": lambda t: t[:, :4]}},
    "x has size 3 in dimension 0, wanted 2": {"change": {"x": lambda t: t.expand(3, -1, -1, -1, -1)}},
    "B has 3 groups": {"groups": 3},
}.items():
    with pytest.raises(RuntimeError, match=message):
        call(**sizes)
# Bounds outside of the tensor touch nothing outside.
assert not call(seq_lens=torch.tensor([-3])).any() and call(seq_lens=torch.tensor([900])).isfinite().all()
for bounds in ([0, 900], [0, 900, 5], [0, 3, 1], [0]):
    assert call(cu_seqlens=torch.tensor(bounds)).isfinite().all()
"""
    done = run(library, "-c", code)
    assert done.returncode == 0, done.stderr
