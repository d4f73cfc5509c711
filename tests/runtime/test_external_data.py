"""Where a graph's weights may lie: beside the graph, wherever in the graph they are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, TensorProto, helper

from holdfast.errors import ExecutionError
from holdfast.exporter.ort_format import write_ort_format
from holdfast.runtime.external_data import external_locations, graph_files
from holdfast.runtime.graph import DecoderGraph
from holdfast.runtime.session import OnnxLanguageModel


def external(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", "16")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def in_initializer(location: str) -> GraphProto:
    return helper.make_graph([], "g", [], [], [external("w", location)])


def in_constant(location: str) -> GraphProto:
    node = helper.make_node("Constant", [], ["w"], value=external("w", location))
    return helper.make_graph([node], "g", [], [])


def in_branch(location: str) -> GraphProto:
    branch = in_constant(location)
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    return helper.make_graph([node], "g", [], [])


def in_sparse(location: str) -> GraphProto:
    graph = helper.make_graph([], "g", [], [])
    graph.sparse_initializer.add().values.CopyFrom(external("w", location))
    return graph


PLACES = [in_initializer, in_constant, in_branch, in_sparse]


def write(folder: Path, graph: GraphProto) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


@pytest.mark.parametrize("place", PLACES)
def test_locations_are_found_wherever_they_are(tmp_path: Path, place: Callable[[str], GraphProto]) -> None:
    assert external_locations(write(tmp_path, place("weights.bin"))) == {"weights.bin"}


def test_locations_in_functions_are_found(tmp_path: Path) -> None:
    node = helper.make_node("Constant", [], ["w"], value=external("w", "weights.bin"))
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("here", "F", [], ["w"], [node], opsets)
    model = ModelProto(ir_version=8)
    model.functions.append(function)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert external_locations(tmp_path / "model.onnx") == {"weights.bin"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["../secret.bin", "sub/../../secret.bin", "ABSOLUTE", "link"])
def test_a_location_outside_the_folder_is_refused(
    tmp_path: Path, place: Callable[[str], GraphProto], location: str
) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret.bin"
    folder.mkdir()
    np.zeros(4, np.float32).tofile(secret)
    (folder / "link").symlink_to(secret)
    write(folder, place(str(secret) if location == "ABSOLUTE" else location))
    with pytest.raises(ExecutionError, match="outside its folder"):
        graph_files(folder)


def test_a_graph_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder, other = tmp_path / "model", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (folder / "model.onnx").symlink_to(write(other, in_constant("w.bin")))
    with pytest.raises(ExecutionError, match="outside its folder"):
        graph_files(folder)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    write(tmp_path, in_initializer("weights.bin"))
    with pytest.raises(ExecutionError, match=r"from weights\.bin, which is missing"):
        graph_files(tmp_path)


def test_a_model_with_its_weights_beside_it_runs(
    exported: Path, model: OnnxLanguageModel, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (exported / name).is_file():
            (tmp_path / name).write_bytes((exported / name).read_bytes())
    onnx.save(
        onnx.load(exported / "model.onnx"),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
    )
    assert [path.name for path in graph_files(tmp_path)] == ["model.onnx", "model.onnx_data"]
    other = OnnxLanguageModel.open(tmp_path, threads=1)
    prompts = [[20, 21, 22], [9]]
    assert (other.next_token_logits(prompts) == model.next_token_logits(prompts)).all()


def test_ort_format_runs_where_there_is_no_other_graph(fused: Path, tmp_path: Path) -> None:
    """Metadata and optional inputs survive the conversion: buffer and last positions work as before."""
    folder = Path(shutil.copytree(fused, tmp_path / "mobile"))
    write_ort_format(folder, atol=1e-3, arm=False)
    both = OnnxLanguageModel.open(folder, threads=1)
    assert both.graph.path.name == "model.onnx"
    (folder / "model.onnx").unlink()
    assert [path.name for path in graph_files(folder)] == ["model.ort"]
    alone = OnnxLanguageModel.open(folder, threads=1)
    assert alone.graph.path.name == "model.ort"
    assert alone.graph.shares_cache
    assert alone.graph.takes_keep
    prompts = [[20, 21, 22], [9]]
    assert alone.generate(prompts, max_new_tokens=12) == both.generate(prompts, max_new_tokens=12)


@pytest.mark.parametrize("content", [b"", b"ORTM", b"\x08\x0a onnx, really"])
def test_a_file_that_is_not_in_ort_format_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.ort").write_bytes(content)
    with pytest.raises(ExecutionError, match=r"model\.ort is not a file in ORT format"):
        graph_files(tmp_path)


def test_a_damaged_file_in_ort_format_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.ort").write_bytes(b"\x24\0\0\0ORTM" + bytes(200))
    with pytest.raises(ExecutionError, match=r"could not load .*model\.ort") as caught:
        DecoderGraph.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_ort_format_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "other.ort").write_bytes(b"\x24\0\0\0ORTM")
    (folder / "model.ort").symlink_to(tmp_path / "other.ort")
    with pytest.raises(ExecutionError, match="outside its folder"):
        graph_files(folder)


@given(noise=st.binary(min_size=1, max_size=60), at=st.integers(0, 120))
def test_changed_bytes_are_locations_or_an_error_but_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.onnx"
    graph = in_branch("weights.bin").SerializeToString()
    path.write_bytes(graph[:at] + noise + graph[at:])
    with suppress(ExecutionError):
        assert all(isinstance(location, str) for location in external_locations(path))
