"""transformers' own tests as a package, from its source distribution or a checkout. Nothing of them is kept here."""

import fcntl
import importlib
import os
import subprocess
import sys
import tarfile
import types
from importlib.metadata import version
from pathlib import Path

import pytest

PACKAGE = "transformers_tests"
CHECKOUT = "MOONWHALE_TRANSFORMERS_CHECKOUT"
# What these tests import from files that only the repository has. Without a checkout, mixins have no tests.
REPOSITORY_ONLY = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def suite(module: str) -> types.ModuleType:
    """Import a module of transformers' tests. Skip the importing test module if they can't be downloaded."""
    if PACKAGE not in sys.modules:
        folder = _tests_folder()
        _package(PACKAGE, folder)
        for name, contents in REPOSITORY_ONLY.items():
            parent, _, child = name.partition(".")
            if not (folder / parent / f"{child}.py").is_file():
                _package(f"{PACKAGE}.{parent}", folder / parent)
                vars(_package(f"{PACKAGE}.{name}", folder / parent)).update(contents)
            sys.modules[f"tests.{name}"] = importlib.import_module(f"{PACKAGE}.{name}")  # some import it absolutely
    return importlib.import_module(f"{PACKAGE}.{module}")


def _package(name: str, folder: Path) -> types.ModuleType:
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [str(folder)]
    return package


def _tests_folder() -> Path:
    if checkout := os.environ.get(CHECKOUT):
        return Path(checkout, "tests")
    wanted = f"transformers-{version('transformers')}"
    cache = Path(os.environ.get("MOONWHALE_CACHE") or "~/.cache/moonwhale").expanduser() / "contracts"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:  # pytest-xdist's workers start together
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / wanted / "tests").is_dir():
            _download(wanted, cache)
    return cache / wanted / "tests"


def _download(wanted: str, cache: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--retries=1"]
    command += ["--no-binary", ":all:", "--dest", str(cache), wanted.replace("-", "==")]
    try:
        subprocess.run(command, check=True, timeout=120, capture_output=True)
    except subprocess.SubprocessError:
        pytest.skip("transformers' source distribution cannot be downloaded", allow_module_level=True)
    with tarfile.open(cache / f"{wanted}.tar.gz") as archive:
        members = [member for member in archive if member.name.startswith(f"{wanted}/tests/")]
        archive.extractall(cache / f"{wanted}.part", members, filter="data")
    (cache / f"{wanted}.part" / wanted / "tests" / "__init__.py").touch()  # which the distribution lacks
    (cache / f"{wanted}.part" / wanted).rename(cache / wanted)
    (cache / f"{wanted}.part").rmdir()
    (cache / f"{wanted}.tar.gz").unlink()
