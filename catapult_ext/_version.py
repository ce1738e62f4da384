"""The version, in its one place: pyproject.toml, CMake and build_info read it from here."""

__version__ = "0.1.0"
