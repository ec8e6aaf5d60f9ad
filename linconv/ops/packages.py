"""Optional packages whose own import may fail although the module that is needed works."""

import importlib
import importlib.util
import sys

__all__ = ["import_singly"]


def import_singly(module: str):
    """Import a module of a package; if the package's own import fails, without running it.

    mamba_ssm imports its CUDA extension, which its Triton kernels do not need.

    Raises:
        Exception: what the package's import raised, if the module alone fails too; a package built for another torch
            may raise any type.
    """
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except Exception as error:
        spec = importlib.util.find_spec(package) if package != module and package not in sys.modules else None
        if spec is None:
            raise
        sys.modules[package] = importlib.util.module_from_spec(spec)  # in sys.modules, but never run
        try:
            return importlib.import_module(module)
        except Exception:
            for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
                del sys.modules[name]
            raise error from None
