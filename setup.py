"""Everything about the package is in settings.ini; pyproject.toml holds what pip reads first."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


def requirements(key: str) -> list[str]:
    return [line.strip() for line in settings[key].splitlines() if line.strip()]


readme = Path("README.md")
setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
    ],
    python_requires=f">={settings['min_python']}",
    install_requires=requirements("requirements"),
    extras_require={
        name: requirements(f"{name}_requirements")
        for name in ("control", "hed", "metrics", "data", "notebooks", "dev")
    },
    # The run notebooks ship as data: `versvideo run 20_train_unet` works without a clone.
    packages=[*find_packages(include=["versvideo", "versvideo.*"]), "versvideo.notebooks"],
    package_dir={"versvideo.notebooks": "nbs"},
    entry_points={"console_scripts": ["versvideo = versvideo.cli:main"]},
    package_data={"versvideo.notebooks": ["[0-9]*.ipynb"], "versvideo": ["weights/**/*", "data/*.json"]},
    zip_safe=False,
)
