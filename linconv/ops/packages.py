"""Optional packages whose own import may fail while the one module that is wanted works."""

import importlib
import importlib.util
import sys

__all__ = ["import_singly"]


def import_singly(module: str):
    """A module of a package, without what the package itself imports if that fails.

    mamba_ssm imports its CUDA extension, which its Triton kernels do without.

    Raises:
        Exception: what the package's import raised, where the module by itself fails too; a package built for another
            torch fails in ways of its own.
    """
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except Exception as error:
        spec = importlib.util.find_spec(package) if package != module and package not in sys.modules else None
        if spec is None:
            raise
        sys.modules[package] = importlib.util.module_from_spec(spec)  # known, and never run
        try:
            return importlib.import_module(module)
        except Exception:
            for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
                del sys.modules[name]
            raise error from None
