"""Nothing half-written, nothing overwritten unasked, a full disk in one sentence."""

import errno
import os
from pathlib import Path

import pytest

from holdfast.errors import DiskFullError, OutputExistsError
from holdfast.files import atomic_folder, sha256_file, to_json, write_text


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as fresh:
        (fresh / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failed_folder_leaves_nothing_and_keeps_the_old_one(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("kept")
    with pytest.raises(failure), atomic_folder(target, overwrite=True) as fresh:
        (fresh / "new").write_text("lost")
        raise failure
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "old").read_text() == "kept"


def test_overwriting_replaces_everything(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("gone")
    with atomic_folder(target, overwrite=True) as fresh:
        (fresh / "new").write_text("there")
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_existing_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists already: choose another --out, or pass"):
        with atomic_folder(tmp_path):
            pass


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="is full: free some space"):
        write_text(tmp_path / "file", "text")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_really_full_device_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError), atomic_folder(tmp_path / "out"):
        with open("/dev/full", "w") as stream:
            stream.write("x" * (1 << 20))
    assert os.listdir(tmp_path) == []


def test_sha256_of_a_known_text(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_text("abc")  # FIPS 180-2, appendix B.1
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_is_canonical_and_refuses_nan() -> None:
    assert to_json({"b": 1, "a": "é"}) == '{\n  "a": "é",\n  "b": 1\n}\n'
    with pytest.raises(ValueError):
        to_json({"a": float("nan")})
