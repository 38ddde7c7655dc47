"""Maps the root folders to `plait.*`, subpackages found by discovery (pyproject.toml cannot express a renamed root)."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOTS = ("configs", "data", "kernels", "models", "train")


class BuildWithoutSetup(build_py):
    """The root is the package `plait`, but this file is no part of it."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


setup(
    packages=["plait", *(f"plait.{name}" for name in find_packages(include=[p for r in ROOTS for p in (r, f"{r}.*")]))],
    package_dir={"plait": "."},
    cmdclass={"build_py": BuildWithoutSetup},
)
