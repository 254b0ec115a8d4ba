"""Import every module of the installed package while what it must not need cannot be imported."""

import importlib
import pkgutil
import sys

UNNEEDED = (
    "decord", "lpips", "matplotlib", "IPython", "ipykernel", "jupyter_client", "jupyterlab",
    "papermill", "nbdev", "fastcore", "execnb", "pytest",
)

if __name__ == "__main__":
    for name in UNNEEDED:
        sys.modules[name] = None
    package = importlib.import_module("versvideo")
    names = [module.name for module in pkgutil.walk_packages(package.__path__, "versvideo.")]
    for name in names:
        importlib.import_module(name)
    print(f"{len(names)} modules of {package.__path__[0]} import without {', '.join(UNNEEDED)}")
