"""Maps the root folders to `plait.*`, with every folder of Python files in them (pyproject.toml cannot express a renamed root)."""

from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

ROOTS = ("configs", "data", "kernels", "models", "train")


class BuildWithoutSetup(build_py):
    """The root is the package `plait`, but this file is no part of it."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


folders = find_namespace_packages(include=[pattern for root in ROOTS for pattern in (root, f"{root}.*")])
setup(
    packages=["plait", *(f"plait.{name}" for name in folders if any(Path(*name.split(".")).glob("*.py")))],
    package_dir={"plait": "."},
    package_data={"plait": ["py.typed"]},
    cmdclass={"build_py": BuildWithoutSetup},
)
