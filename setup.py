"""Maps the root folders to `plait.*`, subpackages found by discovery (setuptools cannot express a renamed root in pyproject.toml)."""

from setuptools import find_packages, setup

ROOTS = ("configs", "data", "kernels", "models", "train")

setup(
    packages=["plait"] + [f"plait.{name}" for name in find_packages(include=[p for r in ROOTS for p in (r, f"{r}.*")])],
    package_dir={"plait": "."} ,
)
