"""ORT format: the same logits, the same bytes every time, the operators it needs, and what it refuses."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from holdfast.errors import ExecutionError, ExportError, ParityError
from holdfast.exporter import ort_format
from holdfast.exporter.export import export_model
from holdfast.exporter.ort_format import OPERATORS_FILE, ORT_FILE, required_operators, write_ort_format
from holdfast.exporter.ort_resolver import in_order
from holdfast.exporter.parity import open_session
from holdfast.recipe import ExportConfig
from tests.tiny import tiny_llama

ATOL = 1e-6


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ort")
    (folder / "out").mkdir()
    export_model(tiny_llama(folder / "model"), folder / "out", ExportConfig())
    return folder / "out"


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_the_same_logits(folder: Path) -> None:
    report = write_ort_format(folder, atol=ATOL)
    assert report.parity.max_abs <= ATOL
    assert report.parity.positions == 23 + 9 + 2 * 3
    assert report.graph_bytes == (folder / ORT_FILE).stat().st_size
    assert report.onnxruntime == onnxruntime.__version__
    assert (folder / "model.onnx").is_file()


def test_the_same_file_every_time(folder: Path) -> None:
    """The size may differ by the padding of a table that ONNX Runtime writes in random order."""
    found = []
    for _ in range(2):
        write_ort_format(folder, atol=ATOL)
        found.append(((folder / OPERATORS_FILE).read_bytes(), (folder / ORT_FILE).stat().st_size))
    assert found[0][0] == found[1][0]
    assert abs(found[0][1] - found[1][1]) <= 64


def test_ordering_changes_only_the_order(folder: Path) -> None:
    """Files that ONNX Runtime wrote with tables in different orders become one file that it reads."""
    saved = {ort_format._converted(folder / "model.onnx", arm=True) for _ in range(4)}
    ordered = {in_order(content) for content in saved}
    assert len(ordered) <= min(2, len(saved) - 1)  # the old table may have taken a few bytes more room
    (folder / ORT_FILE).write_bytes(ordered.pop())
    names = [node.name for node in open_session(folder / ORT_FILE).get_inputs()]
    assert names == [node.name for node in open_session(folder / "model.onnx").get_inputs()]


def test_the_operator_list(folder: Path) -> None:
    report = write_ort_format(folder, atol=ATOL)
    listing = (folder / OPERATORS_FILE).read_text()
    assert listing.splitlines()[1:] == list(report.operators)
    assert str(folder) not in listing
    fields = [line.split(";", 2) for line in report.operators]
    assert {field[0] for field in fields} == {"ai.onnx", "com.microsoft"}
    assert any('MatMul{"inputs": {"0": ["float"]}}' in field[2] for field in fields)


def test_a_changed_graph_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison reads both files: one weight off by a hundredth fails it."""
    model = onnx.load(folder / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == "model.norm.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[5] *= 1.01
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, folder / "other.onnx")
    wrong = ort_format._converted(folder / "other.onnx", arm=True)
    monkeypatch.setattr(ort_format, "_converted", lambda graph, arm: wrong)
    with pytest.raises(ParityError, match=r"model\.ort and model\.onnx differ by up to"):
        write_ort_format(folder, atol=ATOL)


def test_weights_beyond_the_format(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    os.truncate(folder / "model.onnx_data", 2 << 30)  # sparse: takes no room
    with pytest.raises(ExportError) as caught:
        write_ort_format(folder, atol=ATOL)
    assert str(caught.value) == (
        "Expected a graph below 2 GiB, which is all that ORT format holds, found 2.0 GiB in "
        f"{folder}: quantize the model, or deploy model.onnx."
    )
    assert not (folder / ORT_FILE).exists()


def test_no_graph_and_a_graph_that_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match=r"Expected model\.onnx or model\.ort in"):
        write_ort_format(tmp_path, atol=ATOL)
    model = onnx.load(folder / "model.onnx")
    model.graph.node[0].op_type = "Nothing"
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(
        ExportError, match=r"could not convert .* to ORT format .*: deploy model.onnx instead"
    ):
        write_ort_format(folder, atol=ATOL)


def test_operators_of_another_file(folder: Path) -> None:
    with pytest.raises(ExportError, match="is not a file in ORT format"):
        required_operators(folder / "model.onnx")


def test_logging_is_left_alone(folder: Path) -> None:
    before = (logging.root.handlers[:], logging.root.manager.disable)
    write_ort_format(folder, atol=ATOL)
    assert (logging.root.handlers[:], logging.root.manager.disable) == before
