"""The wheel holds what the folders hold, under one namespace."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "core": "holdfast",
    "evals": "holdfast/evals",
    "exporter": "holdfast/exporter",
    "prune": "holdfast/prune",
    "quantize": "holdfast/quantize",
    "runtime": "holdfast/runtime",
}


def tracked(folder: str) -> set[str]:
    """Files of a folder as they are installed, caches left out."""
    return {
        f"{FOLDERS[folder]}/{path.relative_to(ROOT / folder).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):  # a build here would leave its files
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_exactly_the_folders(wheel_names: set[str]) -> None:
    expected = set().union(*(tracked(folder) for folder in FOLDERS))
    assert wheel_names == expected


def test_nothing_is_installed_outside_the_namespace(wheel_names: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel_names} == {"holdfast"}
