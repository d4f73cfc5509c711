"""A changed byte in any file of a bundle is found, the manifest's own included."""

import json
import os
from pathlib import Path

import pytest

from holdfast.bundle import open_bundle, require_pass
from holdfast.errors import BundleError, BundleIntegrityError, ExitCode, NotVerifiedError
from holdfast.manifest import MANIFEST, Manifest, ModelEntry, StepEntry, read_manifest, seal


def manifest(verdict: str = "PASS") -> Manifest:
    model = ModelEntry(kind="checkpoint", name="m", files={"config.json": "00"})
    return Manifest(
        schema_version=1,
        holdfast_version="0",
        verdict=verdict,  # type: ignore[arg-type]
        seed=0,
        model=model,
        base=model,
        chat_digest="00",
        versions={"numpy": "1"},
        steps=(StepEntry(name="prune", settings={"method": "none"}, result={"zeros": 0}),),
        files={},
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "alignment").mkdir()
    (tmp_path / "model.onnx").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "alignment" / "report.json").write_text("{}")
    seal(tmp_path, manifest())
    return tmp_path


def test_a_sealed_bundle_opens(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert set(opened.manifest.files) == {"model.onnx", "alignment/report.json"}
    assert opened.manifest.files["model.onnx"].size_bytes == 2048


@pytest.mark.parametrize("name", ["model.onnx", "alignment/report.json", MANIFEST])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_changed_byte_is_found_in_every_file(bundle: Path, name: str, where: str) -> None:
    path = bundle / name
    content = bytearray(path.read_bytes())
    index = {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[where]
    content[index] ^= 1
    path.write_bytes(content)
    with pytest.raises((BundleIntegrityError, BundleError)):
        open_bundle(bundle)


def test_every_single_bit_of_the_manifest_is_covered(bundle: Path) -> None:
    path = bundle / MANIFEST
    original = path.read_bytes()
    for index in range(0, len(original), 7):
        content = bytearray(original)
        content[index] ^= 1 << (index % 7)
        path.write_bytes(content)
        with pytest.raises(BundleError):
            read_manifest(bundle)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda b: (b / "model.onnx").write_bytes(b"short"), "expected 2048 bytes, found 5"),
        (lambda b: (b / "model.onnx").unlink(), "it is missing"),
        (lambda b: (b / "extra.bin").write_bytes(b"x"), "the manifest does not list it"),
        (lambda b: os.symlink("/etc/hostname", b / "link"), "a bundle holds plain files only"),
        (lambda b: (b / MANIFEST).write_text("[]"), "it holds no JSON object"),
        (lambda b: (b / MANIFEST).write_text("{"), "it is not JSON any more"),
    ],
)
def test_what_is_wrong_is_said(bundle: Path, harm: object, sentence: str) -> None:
    harm(bundle)  # type: ignore[operator]
    with pytest.raises(BundleIntegrityError, match=sentence):
        open_bundle(bundle)


def test_another_schema_version_is_refused(bundle: Path) -> None:
    body = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(body | {"schema_version": 2}))
    with pytest.raises(BundleError, match="schema version 2, this Holdfast reads 1"):
        open_bundle(bundle)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a Holdfast bundle"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("verdict", ["FAIL", "INCONCLUSIVE"])
def test_only_pass_is_served(bundle: Path, verdict: str) -> None:
    seal(bundle, manifest(verdict))
    with pytest.raises(NotVerifiedError, match=f"is {verdict}, expected PASS") as caught:
        require_pass(open_bundle(bundle), allow_unverified=False)
    assert caught.value.exit_code == ExitCode.VERIFICATION_FAILED
    require_pass(open_bundle(bundle), allow_unverified=True)
