"""The package as a whole: what importing it costs, how it bears a library that is missing, what the library is."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

import processes
import pytest
import torch

import linconv
from linconv import environment
from linconv.ops import dispatch

ROOT = Path(__file__).parents[1]
LIBRARY = dispatch.LIBRARIES / "liblinconv_cpu.so"
ISAS = [isa for isa, supported in dispatch.build_info().get("isas", {}).items() if supported]
needs_library = pytest.mark.skipif(not dispatch.build_info(), reason="needs the CPU library")

# Calls one operator twice; prints its distance from the reference, and every warning.
CALL = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import linconv
    x, weight = torch.randn(2, 37, 24), torch.randn(24, 4)
    for _ in range(2):
        got = linconv.ops.short_conv(x, weight)
expected = linconv.ops.short_conv(x, weight, backend="reference")
print("difference", (got - expected).abs().max().item())
for warning in caught:
    print(warning.category.__name__, warning.message)
"""


@pytest.fixture(scope="module", autouse=True)
def imported_once():
    with processes.importing("torch"):
        yield


def python(code, check=True, **variables):
    """The code's output, and its errors, in a process that has imported torch alone."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        done = processes.finished(processes.start(log, variables, exec, code, {"__name__": "__main__"}), log)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def difference(output):
    return float(re.search(r"^difference (\S+)$", output, re.MULTILINE)[1])


def test_import_is_lean():
    code = "import sys, torch; had = set(sys.modules); import linconv; print(*sorted(set(sys.modules) - had))"
    added = {name.split(".")[0] for name in python(code).stdout.split()}
    assert "linconv" in added
    assert not added & {"transformers", "triton", "matplotlib", "accelerate", "soundfile", "pandas", "tqdm"}


def test_every_public_name_exists():
    pytest.importorskip("transformers")
    for name in linconv.__all__:
        assert getattr(linconv, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        linconv.nonsense  # noqa: B018


def test_missing_library_is_one_warning_and_the_reference(tmp_path):
    output = python(CALL, LINCONV_LIBRARY_PATH=str(tmp_path)).stdout
    assert difference(output) == 0
    (warning,) = [line for line in output.splitlines() if "LinconvPerformanceWarning" in line]
    assert str(tmp_path) in warning and "pip install" in warning and "linconv env" in warning


def test_broken_library_is_one_warning_and_the_reference(tmp_path):
    (tmp_path / "liblinconv_cpu.so").write_bytes(b"not a library")
    output = python(CALL, LINCONV_LIBRARY_PATH=str(tmp_path)).stdout
    assert difference(output) == 0
    (warning,) = [line for line in output.splitlines() if "LinconvPerformanceWarning" in line]
    assert "cannot be loaded" in warning and "pip install" in warning


@needs_library
def test_library_of_another_version_is_one_warning_and_the_reference():
    other = (
        "import sys, types; v = types.ModuleType('v'); v.__version__ = '9.9.9'; sys.modules['linconv._version'] = v\n"
    )
    output = python(other + CALL).stdout
    assert difference(output) == 0
    (warning,) = [line for line in output.splitlines() if "LinconvPerformanceWarning" in line]
    assert linconv.__version__ in warning and "9.9.9" in warning and "pip install" in warning


@needs_library
def test_the_library_is_used_without_a_warning():
    output = python(CALL).stdout
    assert "Warning" not in output
    assert difference(output) < 1e-5


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set_can_be_chosen(isa):
    code = CALL + "print('isa', linconv.ops.dispatch.build_info()['isa'])"
    output = python(code, LINCONV_CPU_ISA=isa).stdout
    assert f"isa {isa}" in output.splitlines()
    assert "Warning" not in output
    assert difference(output) < 1e-5


@needs_library
def test_unknown_instruction_set_is_an_error_of_the_call_not_of_the_import():
    done = python("import linconv; print('imported')\n" + CALL, check=False, LINCONV_CPU_ISA="v9")
    assert done.returncode != 0 and "imported" in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: LINCONV_CPU_ISA='v9'")
    assert all(isa in last for isa in dispatch.build_info()["isas"])
    report = python("import linconv.environment as e; print(e.report())", LINCONV_CPU_ISA="v9").stdout
    assert "backend cpu:            LINCONV_CPU_ISA='v9'" in report


def test_forced_backends():
    cpu = torch.device("cpu")
    assert dispatch.pick("short_conv", cpu, "reference") == "reference"
    with pytest.raises(ValueError, match="backend='fpga': wants one of cpu, triton, cuda, mamba_ssm, reference"):
        dispatch.pick("short_conv", cpu, "fpga")
    with pytest.raises(ValueError, match=r"backend='cuda' cannot run short_conv: it takes CUDA tensors, got cpu"):
        dispatch.pick("short_conv", cpu, "cuda")
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run short_conv: it takes CPU tensors, got cuda"):
        dispatch.pick("short_conv", torch.device("cuda"), "cpu")
    with pytest.raises(ValueError, match=r"backend='triton' cannot run short_conv: it takes CUDA tensors, got cpu"):
        dispatch.pick("short_conv", cpu, "triton")


@pytest.mark.parametrize(
    "capability, built, runs",
    [
        ((9, 0), "80-real 90a-real 100-real 120-real 120-virtual", True),
        ((8, 9), "80-real 90a-real 100-real 120-real 120-virtual", True),
        ((12, 1), "80-real 90a-real 100-real 120-real 120-virtual", True),
        ((7, 5), "80-real 90a-real 100-real 120-real 120-virtual", False),
        ((10, 3), "80-real 90a-real 80-virtual", True),
        ((10, 0), "80-real 90a-real", False),
        ((8, 0), "90a-real", False),
        ((8, 0), "86-real", False),
    ],
)
def test_the_cuda_library_runs_where_it_has_code_for_the_gpu(capability, built, runs, monkeypatch):
    dispatch._gpu_problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "some GPU")
    monkeypatch.setattr(dispatch, "_cuda_problem", None)
    monkeypatch.setattr(dispatch, "_cuda_kernels", {"short_conv"})
    monkeypatch.setattr(dispatch, "_build_info", {"cuda_architectures": built})
    monkeypatch.setattr(dispatch, "_triton_problem", lambda: None)
    monkeypatch.setattr(dispatch, "_warned", set())
    gpu = torch.device("cuda:0")
    if runs:
        assert dispatch.pick("short_conv", gpu, "cuda") == "cuda"
    else:
        told = rf"some GPU has compute capability {capability[0]}.{capability[1]}, wanted {built}: rebuild linconv"
        with pytest.raises(ValueError, match=told):
            dispatch.pick("short_conv", gpu, "cuda")
        if capability >= (8, 0):
            assert dispatch.pick("short_conv", gpu) == "triton"
        else:
            with pytest.warns(
                linconv.LinconvPerformanceWarning, match="has compute capability 7.5, wanted 8.0 or later"
            ):
                assert dispatch.pick("short_conv", gpu) == "reference"
    dispatch._gpu_problem.cache_clear()


def test_another_accelerator_is_told_that_it_has_no_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    with pytest.warns(linconv.LinconvPerformanceWarning) as caught:
        assert dispatch.pick("short_conv", torch.device("mps")) == "reference"
    (message,) = {str(warning.message) for warning in caught}
    assert "got mps" in message and "kernels for CPU and CUDA tensors" in message and "reinstall" not in message


def test_backends_say_what_is_there_and_why_not():
    found = linconv.ops.backends()
    assert found["reference"] == "available"
    assert list(found) == ["cpu", "triton", "cuda", "mamba_ssm", "reference"]
    assert all(reason for reason in found.values())


def test_environment_report():
    report = environment.report()
    for line in (
        f"linconv:                {linconv.__version__}",
        f"torch:                  {torch.__version__}",
        *(f"{f'backend {name}:':<23} {state}" for name, state in linconv.ops.backends().items()),
    ):
        assert line in report.splitlines()


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("readelf") is None, reason="needs binutils")
class TestBinary:
    def test_needs_no_python_and_no_particular_torch(self):
        """It links against libtorch_cpu's C interface and the C++ runtime, by name; no path, nothing of Python's."""
        dynamic = subprocess.run(["readelf", "-dW", LIBRARY], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic))
        system = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "libasan.so.8"}
        system |= {"libubsan.so.1", "ld-linux-aarch64.so.1"}
        assert "libtorch_cpu.so" in needed
        assert needed - {"libtorch_cpu.so"} <= system
        assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
        undefined = subprocess.run(["nm", "-D", "-u", LIBRARY], capture_output=True, text=True, check=True).stdout
        names = {line.split()[-1] for line in undefined.splitlines()}
        assert not {name for name in names if re.match(r"_?Py[A-Z_]|_ZNK?2at|_ZNK?3c10|_ZNK?5torch", name)}
        assert {name for name in names if name.startswith(("aoti_torch_", "torch_"))}

    @pytest.mark.parametrize("isa", dispatch.build_info().get("isas", {}))
    def test_kernels_leave_nothing_to_be_merged_across_instruction_sets(self, isa):
        """A weak symbol outside the ISA's own namespace could be kept from the v4 object and crash a v3 machine."""
        objects = sorted((ROOT / "build" / "cmake" / "CMakeFiles" / f"linconv_kernels_{isa}.dir").rglob("*.o"))
        if not objects:
            pytest.skip("needs the build tree")
        for file in objects:
            listed = subprocess.run(["nm", "-C", "--defined-only", file], capture_output=True, text=True, check=True)
            for line in listed.stdout.splitlines():
                _, kind, name = line.split(" ", 2)
                assert kind not in "WVu" or f"linconv::{isa}::" in name, f"{file.name}: {name}"
            undefined = subprocess.run(["nm", "-C", "-u", file], capture_output=True, text=True, check=True).stdout
            assert "std::" not in undefined and "torch" not in undefined, file.name


CUDA_LIBRARY = dispatch.LIBRARIES / "liblinconv_cuda.so"


@pytest.mark.skipif(not CUDA_LIBRARY.exists() or shutil.which("readelf") is None, reason="needs the CUDA library")
class TestCudaBinary:
    def test_needs_torch_by_name_and_no_cuda_runtime(self):
        dynamic = subprocess.run(["readelf", "-dW", CUDA_LIBRARY], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic))
        assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= needed
        assert not {name for name in needed if name.startswith(("libcuda", "libc10", "libpython"))}
        assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)

    def test_every_symbol_it_needs_is_torchs_interface_or_the_systems(self):
        listed = subprocess.run(["nm", "-D", "-u", CUDA_LIBRARY], capture_output=True, text=True, check=True).stdout
        names = {line.split()[-1] for line in listed.splitlines()}
        weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
        others = {n for n in names - weak if "@" not in n and not n.startswith(("aoti_torch_", "torch_"))}
        assert not others

    def test_it_loads_beside_stand_ins_and_registers_its_operators(self, tmp_path):
        """Without a GPU's torch: an empty libtorch_cuda.so with the few functions that it calls."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None or torch.cuda.is_available():
            pytest.skip("needs a C compiler and a CPU-only torch")
        listed = subprocess.run(["nm", "-D", "-u", CUDA_LIBRARY], capture_output=True, text=True, check=True).stdout
        cuda_only = [n for n in listed.split() if n.startswith(("aoti_torch_get_current_cuda", "torch_c10_cuda"))]
        (tmp_path / "stand_in.c").write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in cuda_only))
        stand_in = tmp_path / "libtorch_cuda.so"
        flags = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
        subprocess.run([compiler, *flags, tmp_path / "stand_in.c", "-o", stand_in], check=True)
        code = f"""
import ctypes, torch, linconv
ctypes.CDLL({str(stand_in)!r}, mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(CUDA_LIBRARY)!r})
print(*sorted(torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")))
"""
        registered = python(code).stdout
        for op in ("short_conv", "short_conv_backward", "gated_rms_norm", "gated_rms_norm_backward", "ssd"):
            assert f"linconv::{op}" in registered.split()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_is_not_loaded_and_the_reason_given(self):
        assert linconv.ops.backends()["cuda"] == "torch sees no CUDA device"


@pytest.fixture
def source_tree(tmp_path):
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("cmake", "csrc", "linconv", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return tmp_path


def set_up(tree, *command, **variables):
    words = [sys.executable, "setup.py", "--quiet", *command]
    return subprocess.run(words, cwd=tree, env={**os.environ, **variables}, capture_output=True, text=True)


# Where pip installs them, as setup.py looks for them, and on PATH.
TOOLS = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
CMAKE, NINJA = (shutil.which(name, path=TOOLS) for name in ("cmake", "ninja"))
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(CMAKE is None or NINJA is None, reason="needs cmake and ninja")
def test_a_build_without_a_compiler_ends_in_what_it_wants(source_tree):
    done = set_up(source_tree, "build_native", "--build-lib=built", CXX="no-such-compiler")
    assert done.returncode != 0 and "no-such-compiler" in done.stderr  # cmake's own words
    assert "Traceback" not in done.stderr and "C++20 compiler" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(None in (CMAKE, NINJA, NVCC), reason="needs cmake, ninja and nvcc")
@pytest.mark.parametrize(
    "release, told",
    [
        ("12.4", "80-real;90a-real;80-virtual"),
        ("11.8", "not built: nvcc is 11.8, wanted 12.0 or later"),
        ("broken", "not built: nvcc was not found, or does not work with the C++ compiler"),
    ],
)
def test_an_nvcc_that_is_older_or_does_not_work_fails_no_build(release, told, tmp_path):
    """Configured only. The stand-in is the machine's own, but for what it says of itself and takes."""
    stand_in = tmp_path / "nvcc"
    stand_in.write_text(f"""#!/bin/sh
for argument in "$@"; do
  case "$argument" in
    --version) "{NVCC}" --version | sed "s/release [0-9.]*/release {release}/"; exit ;;
    *compute_100*|*compute_120*) exit 1 ;;
  esac
done
test {release} != broken && exec "{NVCC}" "$@"
""")
    stand_in.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "LINCONV_CUDA_ARCHS"} | {"CUDACXX": str(stand_in)}
    options = [f"-DCMAKE_MAKE_PROGRAM={NINJA}", f"-DTORCH_DIR={Path(torch.__file__).parent}"]
    command = [CMAKE, "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout


def test_source_distribution_is_what_a_build_needs(source_tree):
    done = set_up(source_tree, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (source_tree / "dist").iterdir()
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"setup.py", "LICENSE", "CMakeLists.txt", "cmake/cuda.cmake", "csrc/library.cpp"} <= names
    assert {"linconv/conversion/layer_fits.json", "linconv/demo/recipe.yaml"} <= names
    assert not {name for name in names if name.startswith(("tests", "linconv/lib"))}


def test_wheel_serves_every_python():
    # The source tree's egg-info may stand before the installed distribution.
    installed = [found.read_text("WHEEL") for found in importlib.metadata.distributions(name="linconv")]
    installed = [text for text in installed if text is not None]
    if not installed:
        pytest.skip("linconv is not installed")
    wheel = installed[0]
    (tag,) = re.findall(r"^Tag: (.+)$", wheel, re.MULTILINE)
    assert re.fullmatch(r"py3-none-(linux_(x86_64|aarch64)|macosx_\d+_\d+_arm64)", tag)
    assert "Root-Is-Purelib: false" in wheel
    assert importlib.metadata.version("linconv") == linconv.__version__
