"""The package version: the one place that states it (setup.py, CMake and the compiled library take it from here)."""

__version__ = "0.1.0"
