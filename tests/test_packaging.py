"""What is installed is what is in the tree, and importing the kernels and models needs nothing but the base packages."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("configs", "data", "kernels", "models", "train")
BESIDE = ("benchmarks", "docs", "tests")  # folders with Python files that are not installed
BASES = ("codec", "components", "domains", "errors", "files", "outside")
"""Modules of the configs that models and data may import too: they need the standard library and each other alone."""
MAY_IMPORT = {  # imports run one way, and data stands alone; the base of all configs is for all but kernels
    "kernels": {"kernels"},
    "data": {"data"},
    "models": {"kernels", "models"},
    "configs": {"kernels", "models", "configs", "data"},
    "train": {"kernels", "models", "configs", "data", "train"},
}
NOT_IN_BASE = {
    "torch",
    "transformers",
    "einops",
    "fla",
    "lm-eval",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "mypy",
    "wandb",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts]


def imports(path: Path) -> Iterator[tuple[int, str, int]]:
    """`(line, module, level)` of every import of a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "plait.configs":
            yield from ((node.lineno, f"plait.configs.{alias.name}", 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "", node.level
            if node.module == "plait":
                yield from ((node.lineno, f"plait.{alias.name}", 0) for alias in node.names)


def is_base(module: str) -> bool:
    """Whether a module is one that all but kernels may import."""
    return module.startswith("plait.configs.") and module.split(".")[2] in BASES


def packages_of(root: Path, monkeypatch) -> dict:
    """What setup.py gives for the tree at `root`."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(root)
    runpy.run_path(str(root / "setup.py"))
    return given


def test_setup_lists_the_packages_of_the_tree(monkeypatch):
    given = packages_of(ROOT, monkeypatch)
    folders = {path.parent.relative_to(ROOT) for path in python_files(*PACKAGES)}
    expected = {"plait"} | {f"plait.{'.'.join(folder.parts)}" for folder in folders}
    missing, extra = expected - set(given["packages"]), set(given["packages"]) - expected
    assert not missing, f"not installed: {sorted(missing)}"
    assert not extra, f"installed without Python files: {sorted(extra)}"
    assert given["package_dir"]["plait"] == "."


def test_setup_finds_a_strangers_file_in_a_new_folder(tmp_path, monkeypatch):
    """Also where the folder has no `__init__.py`; folders without Python files, or beside the packages, stay out."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    for file in (
        "models/__init__.py",
        "models/mixers/odd/new/strange.py",
        "models/notes/README.md",
        "tests/test_odd.py",
        "runs/a.py",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    assert packages_of(tmp_path, monkeypatch)["packages"] == ["plait", "plait.models", "plait.models.mixers.odd.new"]


def test_every_folder_of_python_files_is_installed_or_known():
    found = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_", "build", "dist"))}
    found = {name for name in found if name not in ("runs", "sweeps") and python_files(name)}
    assert found <= {*PACKAGES, *BESIDE}, f"name {sorted(found - {*PACKAGES, *BESIDE})} in setup.py (ROOTS) and here"


def test_base_dependencies_hold_no_test_eval_or_torch_package():
    names = {re.split(r"[\s<>=!~;\[]", requirement)[0].lower() for requirement in PROJECT["dependencies"]}
    assert not names & NOT_IN_BASE, f"{sorted(names & NOT_IN_BASE)} belong in an extra"


def test_every_third_party_import_is_a_dependency():
    """Every package that installed code imports is declared, optional ones in an extra."""
    requirements = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    declared = {re.split(r"[\s<>=!~;\[]", requirement)[0].lower().replace("-", "_") for requirement in requirements}
    provided = {"orbax": "orbax_checkpoint", "tensorboardx": "tensorboardx", "yaml": "pyyaml"}
    implied = {"numpy": "jax", "jaxlib": "jax", "setuptools": "build"}  # comes with every version of a declared one
    for path in [*python_files(*PACKAGES), ROOT / "launch.py"]:
        for line, module, _ in imports(path):
            name = module.split(".")[0].lower()
            if name and name not in ("plait", "__future__") and name not in {m.lower() for m in sys.stdlib_module_names}:
                assert provided.get(name, name) in declared or name in implied, (
                    f"{path.relative_to(ROOT)}:{line} imports {module}; declare its package in pyproject.toml"
                )


def test_no_torch_outside_tests():
    for path in [*python_files(*PACKAGES), ROOT / "launch.py"]:
        for line, module, _ in imports(path):
            assert module.split(".")[0] not in ("torch", "transformers", "fla"), (
                f"{path.relative_to(ROOT)}:{line} imports {module}"
            )


def test_own_modules_are_imported_as_plait():
    """`import models` would load a second copy with a second registry, and so may a relative import."""
    for path in [*python_files(*PACKAGES, *BESIDE), ROOT / "launch.py"]:
        for line, module, level in imports(path):
            where = f"{path.relative_to(ROOT)}:{line}"
            assert level == 0 or path.is_relative_to(ROOT / "tests"), f"{where} imports relatively; write plait.{module}"
            assert level or module.split(".")[0] not in (*PACKAGES, "launch"), f"{where} imports {module}; write plait.{module}"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    for path in python_files(package):
        for line, module, _ in imports(path):
            root, _, rest = module.partition(".")
            target = rest.split(".")[0]
            base_of_configs = is_base(module) and package != "kernels"
            if root == "plait" and target and not base_of_configs:
                assert target in MAY_IMPORT[package], f"{path.relative_to(ROOT)}:{line}: plait.{package} may not import {module}"


def test_what_all_may_import_imports_nothing():
    for name in BASES:
        found = [module for _, module, _ in imports(ROOT / "configs" / f"{name}.py")]
        assert all(module.split(".")[0] in sys.stdlib_module_names or is_base(module) for module in found), found


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        (
            "import plait.kernels, plait.models.lm; from plait.models.mixers.base import MIXERS; MIXERS.all()",
            ("grain", "tensorboardX", "matplotlib", "wandb", "tokenizers", "tyro", "torch", "pytest"),
        ),
        ("import plait.launch", ("jax", "grain", "matplotlib", "torch")),
    ],
    ids=["kernels and models", "launch"],
)
def test_import_does_not_load(code, unwanted):
    listing = f"import sys; {code}; print([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]", f"`{code}` also loads {done.stdout.strip()}"
