"""Launches that compiled code does: the CUDA driver is given what Triton's own launcher would give it.

No kernel runs here, and no GPU is needed: cuda_driver.py stands in for the driver.
"""

import ctypes
import json
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cuda_driver  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime import driver  # noqa: E402

from linconv.ops import dispatch, triton_program  # noqa: E402
from linconv.ops.triton_program import Address, Launch, Program  # noqa: E402

pytestmark = pytest.mark.skipif(dispatch.cpu_library() is None, reason="the compiled library runs programs")


load = triton_program._cuda.__wrapped__


def built(folder, name):
    try:
        return cuda_driver.build(folder, name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Not by the name of NVIDIA's, which other tests of this process may use."""
    return built(tmp_path_factory.mktemp("driver"), "driver.so")


@pytest.fixture
def stub(library, monkeypatch):
    """The driver that programs are made for."""
    stub = cuda_driver.Stub(library)
    stub.launches()
    found = load(str(library))
    assert found is not None
    monkeypatch.setattr(triton_program, "_cuda", lambda: found)
    monkeypatch.setattr(driver, "_active", types.SimpleNamespace(get_current_stream=lambda device: 1000 + device))
    return stub


METADATA = dict(
    num_warps=8, num_ctas=1, shared=4096, launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0,
    profile_scratch_size=0,
)  # fmt: skip
SIGNATURE = {
    "x": "*bf16", "n": "i32", "strides": ("i64", "constexpr", ("i32", "*i64")), "BLOCK": "constexpr", "eps": "fp32",
    "wide": "fp64", "flag": "i1",
}  # fmt: skip
SIZES = [8, 4, 8, 4, 8, 4, 8, 1]


def a_launch(stub, sizes=(*SIZES, 8, 8), grid=(5, 6, 1), signature=SIGNATURE, **metadata):
    """Of a kernel with parameters of these sizes, the last two for scratch memory."""
    stub.next_function(list(sizes))
    function = ctypes.c_void_p()
    assert stub.library.cuModuleGetFunction(ctypes.byref(function), None, None) == 0
    compiled = types.SimpleNamespace(
        function=function.value,
        src=types.SimpleNamespace(signature=signature),
        metadata=types.SimpleNamespace(**{**METADATA, **metadata}),
    )
    values = [Address(1, 32), -3, (2**40, 1, (-7, None)), 64, 0.1, 0.1, True]
    return Launch(compiled, grid, values)


def words_of(launch, address, stream):
    tenth = int.from_bytes(torch.tensor(0.1).numpy().tobytes(), "little")
    wide = int.from_bytes(torch.tensor(0.1, dtype=torch.float64).numpy().tobytes(), "little")
    parameters = [address, 2**32 - 3, 2**40, 2**32 - 7, 0, tenth, wide, 1, 0, 0]
    return [launch.compiled.function, *launch.grid, 256, 1, 1, 4096, stream, 0, len(parameters), *parameters]


def test_launches_with_the_addresses_of_the_call(stub):
    launches = [a_launch(stub), a_launch(stub, grid=(7, 1, 2))]
    program = Program.of(launches)
    for start in (10_000, 20_000):  # a call leaves the program as it was
        assert program.run([5, start], device=3)
        wanted = [words_of(launch, start + 32, 1003) for launch in launches]
        assert stub.launches() == [word for words in wanted for word in words]


def test_scratch_parameters_may_be_absent(stub):
    """Some versions of Triton have two, some one, some none."""
    for count in (0, 1, 2):
        program = Program.of([a_launch(stub, sizes=(*SIZES, *[8] * count))])
        assert program.run([0, 0], device=0)
        assert stub.launches()[10] == len(SIZES) + count


@pytest.mark.parametrize(
    "change",
    [
        dict(num_ctas=2),
        dict(launch_cooperative_grid=True),
        dict(launch_pdl=True),
        dict(global_scratch_size=128),
        dict(profile_scratch_size=128),
        dict(tensordesc_meta=[{}]),
        dict(shared=229 * 1024),
        dict(signature={**SIGNATURE, "eps": "bf16"}),
        dict(sizes=SIZES[:-1]),
        dict(sizes=[*SIZES, 8, 8, 8]),
        dict(sizes=[*SIZES, 4]),
        dict(sizes=[*SIZES[:5], 8, *SIZES[6:], 8, 8]),
    ],
)
def test_other_kernels_are_left_to_triton(stub, change):
    assert Program.of([a_launch(stub), a_launch(stub, **change)]) is None


def test_without_the_driver_or_the_library_triton_launches(stub, library, monkeypatch):
    assert load("libnot-there.so.1") is None
    assert load(str(dispatch.cpu_library())) is None  # which has none of the driver's functions
    monkeypatch.setattr(dispatch, "cpu_library", lambda: None)
    assert load(str(library)) is None
    monkeypatch.setattr(triton_program, "_cuda", lambda: None)
    assert Program.of([a_launch(stub)]) is None


def test_whoever_listens_to_tritons_launches_hears_them(stub, monkeypatch):
    program = Program.of([a_launch(stub)])
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            chain = type(getattr(knobs.runtime, name))()
            chain.add(print)
            patch.setattr(knobs.runtime, name, chain)
            assert not program.run([0, 0], device=0)
    assert not stub.launches()
    assert program.run([0, 0], device=0)


def test_a_thread_without_a_context_is_left_to_triton(stub):
    """It makes one. An autograd thread may have none."""
    program = Program.of([a_launch(stub)])
    stub.error_of_next.value = triton_program.INVALID_CONTEXT
    assert not program.run([0, 0], device=0)
    assert not stub.launches()


def test_an_error_of_the_driver_is_raised(stub):
    program = Program.of([a_launch(stub)])
    stub.error_of_next.value = 700
    with pytest.raises(RuntimeError, match="launch 1 of 1 of a replayed call: CUDA error 700"):
        program.run([0, 0], device=0)


def test_more_parameters_than_there_is_room_for(stub, monkeypatch):
    """They are left to Triton, and compiled code does not write beyond its memory."""
    signature = {f"x{i}": "i32" for i in range(129)}
    launch = a_launch(stub, sizes=[4] * 129, signature=signature)
    launch = Launch(launch.compiled, launch.grid, [1] * 129)
    assert Program.of([launch]) is None
    monkeypatch.setattr(triton_program, "MOST_PARAMETERS", 129)
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        Program.of([launch]).run([0], device=0)
    assert not stub.launches()


def test_floats_beyond_the_range_of_a_parameter_are_infinite(stub):
    launch = a_launch(stub)
    launch.values[4] = 1e39
    assert Program.of([launch]).run([0, 0], device=0)
    assert stub.launches()[11 + 5] == 0x7F800000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and another driver")
def test_every_operator_launches_what_tritons_launcher_does(tmp_path):
    """Functions, grids, threads, shared memory, stream and parameters, of kernels compiled for sm_90, whose own files
    say what the sizes of their parameters are."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("Triton's launcher is compiled with Python.h")
    command = [sys.executable, __file__, str(built(tmp_path, "libcuda.so.1"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    from test_triton_replay import CASES

    assert found.keys() == CASES.keys()
    for name, (ours, of_triton) in found.items():
        assert ours and ours == of_triton, name


def launches_by_both(library):
    """Of each operator, on the same addresses: what the program launches, and what Triton does."""
    from test_triton_replay import CASES

    from linconv.ops.triton_replay import Calls

    stub = cuda_driver.Stub(Path(library))
    cuda_driver.make_triton_use(stub)
    found = {}
    for name, (function, arguments) in CASES.items():
        calls = Calls(function.__wrapped__)
        for _ in range(2):
            calls((), tuple(arguments()))
        (call,) = calls.known.values()
        starts = [2**36 + 4096 * i for i in range(64)]
        stub.launches()
        assert call.program.run(starts, 0)
        ours = stub.launches()
        for launch, values, addresses in call.launches:
            at = {i: starts[address.start] + address.offset for i, address in addresses}
            launch(*(at.get(i, value) for i, value in enumerate(values)))
        found[name] = ours, stub.launches()
    print(json.dumps(found))


if __name__ == "__main__":
    launches_by_both(sys.argv[1])
