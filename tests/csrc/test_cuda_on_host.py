"""csrc/*/cuda.cu without a GPU: compiled for the host (cuda_on_host.h), the operators' own tests judge its kernels."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linconv import __version__
from linconv.ops import dispatch

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
MARCH = ["-march=x86-64-v3"] if os.uname().machine == "x86_64" else []  # what converts fp16

pytestmark = pytest.mark.skipif(
    COMPILER is None or not dispatch.build_info(), reason="needs a C++ compiler, and a machine of our instruction sets"
)

# The tests of each operator that hold for what its cuda.cu has. Left out: instruction sets, which CUDA has none of;
# lengths outside the tensor, which only a host can refuse; gradients of the scan, which are Triton's; of Linformer
# attention what judges the reference, and the largest sizes, which take a host without vectors too long; of the losses
# what CPU caches are for, and what the same code of another dtype goes through.
TESTS = {
    "short_conv": "not instruction_set and not outside_the_tensor",
    "gated_rms_norm": "not instruction_set",
    "linformer": "not instruction_set and not number_of_threads and not drops_that_share and not 256-512",
    "distillation_loss": "not instruction_set and not outside_the_tensor and not past_the_caches "
    "and not number_of_threads and not gradcheck and not (strides and not dtype1)",
    "ssd": "forward or padding_is_never_read or handed_over",
}

# Results and gradients of each operator, to compare bit by bit.
RESULTS = """
import sys, torch
sys.path.insert(0, "tests/ops")
from scan_cases import scan_arguments, split
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
tensors, rest = split(scan_arguments(2, 9, 4, 40, 2, 33, dtype=dtype))
found["ssd"] = ops.ssd(*tensors, **rest, return_final_states=True)
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
    flags = ["-std=c++20", "-O2", "-g1", "-fPIC", *MARCH, "-DLINCONV_ISA=host", "-ffp-contract=fast"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [f'-DLINCONV_VERSION="{__version__}"', '-DLINCONV_CUDA_STATUS="on the host"', f"-I{ROOT / 'csrc'}"]
    flags += [f"-I{Path(__file__).parent}", "-isystem", torch_dir / "include"]
    sources = [ROOT / "csrc" / name for name in ("library.cpp", "common/isa.cpp", "common/tensor.cpp")]
    sources += [Path(__file__).with_name("cuda_on_host.cpp"), *sorted((ROOT / "csrc").glob("*/cuda.cu"))]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            objects = [folder / f"{i}.o" for i in range(len(sources))]
            for source, target in zip(sources, objects):
                subprocess.run([COMPILER, *flags, "-x", "c++", "-c", source, "-o", target], check=True)
            link = ["-shared", *objects, torch_dir / "lib" / "libtorch_cpu.so", "-Wl,--allow-shlib-undefined"]
            subprocess.run([COMPILER, *link, "-o", folder / "new.so"], check=True)
            (folder / "new.so").rename(built)
    return folder


def run(library, *command, **variables):
    environment = {**os.environ, "LINCONV_LIBRARY_PATH": str(library), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("op", TESTS)
def test_kernels_pass_the_operators_tests(library, op):
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-k", TESTS[op]]
    done = run(library, "-m", "pytest", *options, f"tests/ops/test_{op}.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


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
