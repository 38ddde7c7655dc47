"""Components that lie outside the package: modules of installed packages, and files and folders that the user names."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path

GROUP = "plait.components"
"""Entry points of this group are modules that register components."""

VARIABLE = "PLAIT_COMPONENTS"
"""Files and folders whose modules register components, parted as in PATH."""

_imported: set[str] = set()


def import_outside() -> None:
    """Imports what entry points and the environment name, each once.

    Raises:
        ValueError: there is no such file, or it cannot be imported; the message begins with what names it.
    """
    for origin, module, folder in (*_installed(), *_named()):
        if origin not in _imported:
            try:
                if folder is not None and folder not in sys.path:
                    sys.path.append(folder)  # last, so that a file hides no package of its name
                found = importlib.import_module(module)
            except Exception as error:
                raise ValueError(
                    f"{origin} cannot be imported ({type(error).__name__}: {error}); correct it, or name it no more"
                ) from error
            file = getattr(found, "__file__", None)
            if folder is not None and file is not None and not Path(file).resolve().is_relative_to(folder):
                raise ValueError(f"{origin} has the name of another module, {file}; rename it")
            _imported.add(origin)


def _installed() -> Iterator[tuple[str, str, None]]:
    for point in sorted(importlib.metadata.entry_points(group=GROUP)):
        yield f"the entry point {point.name!r} of {GROUP!r}", point.module, None


def _named() -> Iterator[tuple[str, str, str]]:
    for given in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        path = Path(given).expanduser().resolve()
        if not path.exists():
            raise ValueError(
                f"{VARIABLE} names {given!r}, which is not there; give files or folders, with {os.pathsep!r} between them"
            )
        for file in sorted(path.glob("[!_]*.py")) if path.is_dir() else [path]:
            if file.suffix != ".py" or not file.stem.isidentifier():
                raise ValueError(f"{VARIABLE} names {str(file)!r}, which is no module; use a name such as my_mixer.py")
            yield f"{VARIABLE}: {file}", file.stem, str(file.parent)
