"""The wheel, an editable install and a plain clone all work, and none of them claims the top-level name `kernels`."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import initperf

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = "initperf/kernels/__init__.py"  # the wheel has the real one, from kernels/
LOCATE = """
import importlib.util, initperf, initperf.kernels.cpu as cpu
print(initperf.__file__)
print(cpu.__file__)
print(importlib.util.find_spec("initperf.kernels.cpu.core.jit").origin)
print(importlib.util.find_spec("kernels"))
"""
IMPORT_ALL = """
import importlib, pkgutil, initperf
names = [m.name for m in pkgutil.walk_packages(initperf.__path__, "initperf.") if m.ispkg]
for name in names:
    print(name, importlib.import_module(name).__file__)
"""


def run(*command, cwd, **environment) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}
    done = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The project's files, copied: building leaves traces in its folder."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("initperf", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(clone, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", cwd=source)
    (built,) = (source / "dist").iterdir()
    return built


@pytest.fixture
def environment(tmp_path) -> Path:
    """The Python of a new virtual environment that sees this one's packages, but not what is installed here as editable."""
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    (site,) = (tmp_path / "env").glob("[Ll]ib/**/site-packages")
    (site / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"


def install(python: Path, *what: str) -> None:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", str(python), "install", *options, *what, cwd=python.parent)


def test_the_wheel_is_pure_python(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel, clone):
    """A new package that setup.py does not find shows here."""
    files = [p.relative_to(clone).as_posix() for name in ("initperf", "kernels") for p in (clone / name).rglob("*.py")]
    expected = {f"initperf/{f}" if f.startswith("kernels/") else f for f in files if f != STAND_IN}
    expected |= {"initperf/py.typed", "initperf/experiments/data/digits.csv.gz", "initperf/experiments/data/README.md"}
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == expected


def test_the_wheel_holds_the_device_code_itself(wheel, clone):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(STAND_IN) == (clone / "kernels/__init__.py").read_bytes()
        assert "initperf/kernels/cpu/core/jit.py" in archive.namelist()


def test_the_wheel_claims_no_other_top_level_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (top_level,) = (n for n in archive.namelist() if n.endswith("/top_level.txt"))
        assert archive.read(top_level).decode().split() == ["initperf"]
        assert {n.split("/")[0].split("-")[0] for n in archive.namelist()} == {"initperf"}


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_requires_four_packages_and_leaves_the_rest_to_extras(metadata):
    required = metadata.get_all("Requires-Dist")
    always = [line for line in required if "extra ==" not in line]
    assert {re.split("[<>]", line)[0] for line in always} == {"torch", "numpy", "numba", "safetensors"}
    assert "torch<2.16,>=2.11" in required
    assert set(metadata.get_all("Provides-Extra")) == {"cli", "report", "gpu", "all", "dev"}
    triton = [line for line in required if line.startswith("triton")]
    assert all('extra == "gpu"' in line and 'platform_system == "Linux"' in line for line in triton)
    assert len(triton) == 1  # neither required nor in `all`: beside ROCm's torch it would overwrite its Triton


def test_the_wheel_says_what_it_is(metadata):
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)} <= set(classifiers)
    assert metadata["Keywords"]
    assert initperf.__version__ == metadata["Version"]


def test_every_package_of_the_installed_wheel_is_imported_from_it(wheel, clone, environment, tmp_path):
    install(environment, str(wheel))
    found = dict(line.split() for line in run(environment, "-c", IMPORT_ALL, cwd=tmp_path).splitlines())
    folders = [p.parent.relative_to(clone) for n in ("initperf", "kernels") for p in (clone / n).rglob("__init__.py")]
    expected = {".".join(f.parts if f.parts[0] == "initperf" else ("initperf", *f.parts)) for f in folders} - {
        "initperf"
    }
    assert found.keys() == expected
    assert {"initperf.kernels.cpu", "initperf.core"} <= found.keys()
    assert all(tmp_path in Path(file).parents for file in found.values())


def test_the_installed_wheel_finds_its_kernels_inside_itself(wheel, environment, tmp_path):
    install(environment, str(wheel))
    package, cpu, jit, top = run(environment, "-c", LOCATE, cwd=tmp_path).split("\n")[:4]
    site = Path(package).parents[1]
    assert site.name == "site-packages"
    assert tmp_path in site.parents
    assert Path(cpu) == site / "initperf/kernels/cpu/__init__.py"
    assert Path(jit) == site / "initperf/kernels/cpu/core/jit.py"
    assert top == "None"
    assert run(environment.parent / "initperf", "--version", cwd=tmp_path).startswith("initperf ")


def test_an_editable_install_finds_the_kernels_of_the_source_tree(clone, environment, tmp_path):
    source = tmp_path / "tree"
    shutil.copytree(clone, source)
    install(environment, "-e", str(source))
    package, cpu, jit, _ = run(environment, "-c", LOCATE, cwd=tmp_path).split("\n")[:4]
    assert Path(package) == source / "initperf/__init__.py"
    assert Path(cpu) == source / "kernels/cpu/__init__.py"
    assert Path(jit) == source / "kernels/cpu/core/jit.py"


def test_a_plain_clone_works_uninstalled_from_its_root(clone, environment):
    package, cpu, jit, _ = run(environment, "-c", LOCATE, cwd=clone, PYTHONDONTWRITEBYTECODE="1").split("\n")[:4]
    assert Path(package) == clone / "initperf/__init__.py"
    assert Path(cpu) == clone / "kernels/cpu/__init__.py"
    assert Path(jit) == clone / "kernels/cpu/core/jit.py"
