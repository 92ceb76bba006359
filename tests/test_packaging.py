"""A wheel and an editable install, each in a fresh environment, hold the package whole."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Modules that are of use to, and import, what need not be installed.
OPTIONAL = {"rdkv.plugins.lm_eval.": "lm_eval", "rdkv.plugins.sglang.": "sglang"}
SOURCES = ("rdkv", "runtime", "allocators", "plugins", "kernels", "pyproject.toml", "README.md", "LICENSE")
# Offline and unprivileged: whatever the user's pip is set to must not matter.
PIP_FLAGS = ("--quiet", "--disable-pip-version-check", "--isolated", "--no-index", "--no-deps", "--no-build-isolation")


def modules_in_tree() -> set[str]:
    """Dotted names of every module that the folders hold, by the mapping in pyproject.toml."""
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    names: set[str] = set()
    for package, folder in mapping.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = (*package.split("."), *path.relative_to(ROOT / folder).with_suffix("").parts)
            names.add(".".join(parts).removesuffix(".__init__"))
    return names


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: building leaves folders behind, which must not lie in the tree."""
    copy = tmp_path_factory.mktemp("sources")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignore)
        else:
            shutil.copy(source, copy / name)
    return copy


def fresh_environment(folder: Path) -> Path:
    """Python of a new environment that sees the dependencies of this one, but nothing installed as editable."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    target = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    # A line in a .pth file adds a folder to the path without reading the .pth files in that folder.
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    (Path(target) / "dependencies.pth").write_text("\n".join(sorted(places)) + "\n")
    return python


def pip(python: Path, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def output(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RDKV_PLUGINS")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_installed(python: Path, home: Path) -> None:
    absent = tuple(prefix for prefix, package in OPTIONAL.items() if find_spec(package) is None)
    names = sorted(name for name in modules_in_tree() if not name.startswith(absent))
    output(python, "-c", f"import importlib; [importlib.import_module(name) for name in {names}]", cwd=home)
    assert output(python, "-m", "rdkv", "--version", cwd=home) == output(python.parent / "rdkv", "--version", cwd=home)
    listed = output(python.parent / "rdkv", "plugins", cwd=home)
    for name in ("attention-distortion", "waterfill", "mixed-bit", "snapkv"):
        assert name in listed
    typed = "import importlib.resources as r; assert r.files('rdkv').joinpath('py.typed').is_file()"
    output(python, "-c", typed, cwd=home)
    # Nothing of ours lies at the top, where `kernels` or `plugins` would hide somebody else's.
    stray = "import importlib.util as u; print([n for n in ('runtime', 'allocators', 'plugins') if u.find_spec(n)])"
    assert output(python, "-c", stray, cwd=home).strip() == "[]"


def test_wheel(sources: Path, tmp_path: Path) -> None:
    pip(Path(sys.executable), "wheel", *PIP_FLAGS, "--wheel-dir", tmp_path / "dist", sources)
    (wheel,) = (tmp_path / "dist").glob("rdkv-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name.removesuffix(".py").replace("/", ".") for name in archive.namelist() if name.endswith(".py")}
    assert {name.removesuffix(".__init__") for name in files} == modules_in_tree()
    python = fresh_environment(tmp_path / "environment")
    pip(python, "install", *PIP_FLAGS, wheel)
    check_installed(python, tmp_path)
    where = output(python, "-c", "import rdkv.runtime; print(rdkv.runtime.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(tmp_path / "environment")
    licences = list((tmp_path / "environment").rglob("rdkv-*.dist-info/licenses/LICENSE"))
    assert len(licences) == 1


def test_editable(sources: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(sources, tmp_path / "tree")
    python = fresh_environment(tmp_path / "environment")
    pip(python, "install", *PIP_FLAGS, "--editable", tree)
    check_installed(python, tmp_path)
    # A file that is added later is found: the folders themselves are on the path, not a copy.
    (tree / "runtime" / "added_later.py").write_text("ANSWER = 42\n")
    added = "from rdkv.runtime.added_later import ANSWER; print(ANSWER)"
    assert output(python, "-c", added, cwd=tmp_path).strip() == "42"
    # And from inside the tree, where the folder `rdkv` itself is found first.
    assert output(python, "-c", added, cwd=tree).strip() == "42"


def test_packages_are_listed() -> None:
    """setuptools is told every package by name; a new folder that is not would be missing from the wheel."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.rpartition(".")[0] for name in modules_in_tree()} - {""}
    assert packages <= set(table["packages"])
