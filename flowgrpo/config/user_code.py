"""Functions of the user's own: "package.module:function", or "file.py:function"."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from flowgrpo.config.validation import path_text


def split_target(target: str) -> tuple[str, str]:
    """Split "module:function"; from the right, since the path of a file may have a drive."""
    module, _, function = target.rpartition(":")
    return module, function


def import_function(target: str) -> Any:
    """Import what "module:function" names; the module may raise anything, SystemExit too."""
    module, function = split_target(target)
    return getattr(import_module(module), function)


def source_of(target: str) -> Path | None:
    """Find the file that holds the function of a target that was imported; None without one."""
    module, _ = split_target(target)
    if module.endswith(".py"):
        return Path(path_text(module)).resolve()
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file).resolve() if file else None


def import_module(module: str) -> ModuleType:
    """Import a module by its name, or by the path of its file, which ends in .py."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = Path(path_text(module)).resolve()
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    # The same file under its module's name is not executed twice.
    unique = f"{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
    for name in (path.stem, unique):
        loaded = sys.modules.get(name)
        if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() == path:
            return loaded
    # Modules beside the file are found, as for a script; last, so that they shadow nothing.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    # Nor does the file: statistics.py is not what other modules mean by `import statistics`.
    name = path.stem if _finds(path.stem, path) else unique
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[name]
        raise
    return loaded


def _finds(name: str, path: Path) -> bool:
    """Tell whether `import name` would execute the file `path`."""
    if name in sys.modules or not name.isidentifier():
        return False
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and bool(spec.origin) and Path(spec.origin).resolve() == path


def advice(error: BaseException) -> str:
    """Say what to do about an error that an import raised."""
    if "relative import" in str(error):
        return "import its neighbours by their names, or name it as package.module:function"
    if isinstance(error, ModuleNotFoundError):
        return "check the name, or install what it needs"
    return "check the name, or correct the file"


def is_installed(package: str) -> bool:
    """Tell whether a package can be imported. A folder of that name, as wandb/ and datasets/ lie in
    many working directories, is none."""
    if package in sys.modules:
        module = sys.modules[package]
        is_folder = getattr(module, "__file__", None) is None and hasattr(module, "__path__")
        return module is not None and not is_folder
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
