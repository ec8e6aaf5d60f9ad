"""One compilation of a Triton kernel: what ``linconv/ops/<op>/triton.py`` launches, and ``shipped()`` lists.

``benchmarks/compile_ahead.py`` compiles every build of every ``shipped()``, for GPUs that are not there. A module that
launches through :func:`build_of` lists just what it launches.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}

# Multiply-adds are fused whatever Triton's default, which 3.10 is to change: registers and last bits depend on it.
DEFAULT_OPTIONS = {"enable_fp_fusion": True}


@dataclass
class Build:
    """A kernel with the types and the constants it is compiled for.

    Attributes:
        kernel: the ``triton.jit`` function.
        signature: type of each argument that is no constant, such as ``"*bf16"``, ``"i32"``, ``"i64"``, ``"fp32"``; of
            a tuple, a tuple of them, with ``"constexpr"`` for a constant.
        constants: value of each other argument: ``tl.constexpr`` ones, strides of 1, pointers that are None; of an
            element of a tuple by (name, index).
        aligned: arguments that are divisible by 16: pointers as torch allocates them, and most sizes and strides.
            None stands for every pointer and every integer.
        label: what tells this build from others of its kernel, in tables.
        stack: bytes of registers that a thread may spill, where a GPU was found to be faster so.
    """

    kernel: Any
    signature: dict[str, str | tuple]
    constants: dict[Any, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple | None = None
    label: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    stack: int = 0

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def compile(self, capability: int):
        """The kernel compiled for a GPU of a compute capability such as 90; nothing is loaded or run."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        missing = [n for n in names if n not in self.signature and n not in self.constants]
        if missing:
            raise ValueError(f"the build {self.name} {self.label} says nothing of {', '.join(missing)}")
        signature = {n: "constexpr" if n in self.constants else self.signature[n] for n in names}
        integers = ("i32", "i64")
        aligned = self.aligned
        if aligned is None:
            aligned = [n for n, t in signature.items() if isinstance(t, str) and (t.startswith("*") or t in integers)]

        def path(key):
            return (names.index(key),) if isinstance(key, str) else (names.index(key[0]), key[1])

        return triton.compile(
            ASTSource(
                self.kernel,
                signature,
                {path(n): value for n, value in self.constants.items()},
                {
                    path(n): [["tt.divisibility", 16]]
                    for n in aligned
                    if not isinstance(n, str) or signature[n] != "constexpr"
                },
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": self.num_warps, "num_stages": self.num_stages, **DEFAULT_OPTIONS, **self.options},
        )


def build_of(kernel, arguments: dict[str, Any], num_warps: int, num_stages: int, label: str = "", **options) -> Build:
    """The build that a launch with these arguments uses, as Triton itself specializes a kernel to its arguments.

    Tensors may be on the meta device: only their types are looked at, and memory is taken to be aligned to 16 bytes.
    """
    import triton.language as tl

    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    unspecialized = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constants, aligned = {}, {}, []

    def kind(key, value) -> str:
        if isinstance(value, torch.Tensor):
            aligned.append(key)
            return "*" + TYPES[value.dtype]
        if key in unspecialized:
            return "i32"
        if key in constexprs or value is None or (isinstance(value, int) and value == 1):
            constants[key] = value.value if isinstance(value, tl.constexpr) else value
            return "constexpr"
        if isinstance(value, int):
            if value % 16 == 0:
                aligned.append(key)
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, float):
            return "fp32"
        raise TypeError(f"{kernel.__name__}: {key} is {type(value).__name__}, wanted a tensor, a number or a tuple")

    for name, value in arguments.items():
        if isinstance(value, tuple):
            signature[name] = tuple(kind((name, i), v) for i, v in enumerate(value))
        else:
            signature[name] = kind(name, value)
    signature = {name: t for name, t in signature.items() if t != "constexpr"}
    return Build(kernel, signature, constants, num_warps, num_stages, tuple(aligned), label, options)
