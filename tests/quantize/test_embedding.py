"""The quantized embedding gathers exactly the simulation's rows, in every form; and what it saves."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from holdfast.errors import QuantizationError
from holdfast.exporter.export import export_model, read_export
from holdfast.exporter.source import load_source
from holdfast.quantize.artifact.embedding import (
    EmbeddingReport,
    embedding_codes,
    fake_quantize_embedding,
    quantize_embedding,
    read_embedding,
)
from holdfast.quantize.graph import Graph
from holdfast.quantize.simulate import graph_logits, torch_logits
from holdfast.quantize.weights.codes import WeightCodes, pack
from holdfast.recipe import ExportConfig
from tests.tiny import tiny_llama, tiny_model

ROWS, COLUMNS = 7, 48
IDS = np.array([[0, 6, 3], [3, 1, 0]])


def table(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> NDArray[np.float32]:
    """Half precision, so that values lie on ties; one row of zeros."""
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float16).astype(np.float32)
    values[2] = 0
    return values


def lookup(weight: NDArray[np.float32], head: WeightCodes | None = None) -> onnx.ModelProto:
    """`rows = weight[ids]`, and with a head `logits = rows @ head^T` in MatMulNBits."""
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("Gather", ["embed", "ids"], ["rows"], "embed/Gather")]
    tensors = [numpy_helper.from_array(weight, "embed")]
    outputs = [info("rows", onnx.TensorProto.FLOAT, ["rows", "tokens", weight.shape[1]])]
    if head is not None:
        packed = pack(head)
        sizes = {"N": ROWS, "K": weight.shape[1], "bits": head.bits, "block_size": head.block_size}
        names = ["rows", "B", "scales"]
        nodes.append(
            helper.make_node("MatMulNBits", names, ["logits"], "head", domain="com.microsoft", **sizes)
        )
        tensors += [
            numpy_helper.from_array(packed.packed.numpy(), "B"),
            numpy_helper.from_array(packed.scales.numpy(), "scales"),
        ]
        outputs.append(info("logits", onnx.TensorProto.FLOAT, ["rows", "tokens", ROWS]))
    inputs = [info("ids", onnx.TensorProto.INT64, ["rows", "tokens"])]
    graph = helper.make_graph(nodes, "lookup", inputs, outputs, tensors)
    versions = [helper.make_opsetid("", 17), *([helper.make_opsetid("com.microsoft", 1)] if head else [])]
    return helper.make_model(graph, opset_imports=versions, ir_version=8)


def run(model: onnx.ModelProto) -> list[NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": IDS})


@pytest.mark.parametrize(
    ("bits", "block_size", "portable"),
    [(bits, size, form) for bits, form in [(8, False), (4, False), (8, True)] for size in (16, 32, 64)],
)
def test_rows_are_the_simulations_bit_for_bit(bits: int, block_size: int, portable: bool) -> None:
    """48 columns: whole blocks of 16, a shorter last one of 32, a single one of 64."""
    weight = table()
    model = lookup(weight)
    report = quantize_embedding(model, "embed", bits=bits, block_size=block_size, portable=portable)
    onnx.checker.check_model(model, full_check=True)
    expected = fake_quantize_embedding(torch.from_numpy(weight), bits, block_size).numpy()
    np.testing.assert_array_equal(run(model)[0], expected[IDS])
    assert not np.array_equal(expected, weight)
    np.testing.assert_array_equal(expected[2], 0)
    domains = {node.domain for node in model.graph.node}
    assert domains == ({""} if portable else {"com.microsoft"})
    assert report == read_embedding(Graph(model), "embed")
    assert (report.bits, report.rows, report.columns) == (bits, ROWS, COLUMNS)
    assert report.block_size == (min(block_size, COLUMNS) if portable else block_size)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block_size", [16, 32])
def test_codes_are_those_of_onnxruntimes_own_quantizer(bits: int, block_size: int) -> None:
    weight = table(ROWS, 64)
    weight[2] = 1.0  # a block of zeros has scale 0 there, and 1 here
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "head")],
        "head",
        [info("x", onnx.TensorProto.FLOAT, ["t", 64])],
        [info("y", onnx.TensorProto.FLOAT, ["t", ROWS])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    settings = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, bits=bits)
    quantizer = MatMulNBitsQuantizer(model, algo_config=settings)
    quantizer.process()
    packed, scales = (numpy_helper.to_array(t) for t in quantizer.model.model.graph.initializer[-2:])
    found = pack(embedding_codes(torch.from_numpy(weight), bits, block_size))
    np.testing.assert_array_equal(found.packed.numpy(), packed)
    np.testing.assert_array_equal(found.scales.numpy(), scales.reshape(-1))


def test_an_8_bit_row_by_hand() -> None:
    """The extreme 4 becomes code -128, so the scale is -1/32; 1/64 is a tie, -0.5, and goes up to 0."""
    weight = torch.zeros(1, 16)
    weight[0, :4] = torch.tensor([4.0, 1.0, -0.5, 1 / 64])
    codes = embedding_codes(weight, 8, 16)
    assert codes.scales.item() == -1 / 32
    assert codes.codes[0, :5].tolist() == [-128, -32, 16, 0, 0]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_tied_head_and_the_embedding_share_one_table(bits: int) -> None:
    weight = table()
    codes = embedding_codes(torch.from_numpy(weight), bits, 16)
    model = lookup(weight, codes)
    before = len(model.SerializeToString())
    report = quantize_embedding(model, "embed", bits=bits, block_size=16)
    onnx.checker.check_model(model, full_check=True)
    assert (report.shared_with, report.bytes_after) == ("head", 0)
    assert report == read_embedding(Graph(model), "embed")
    assert before - len(model.SerializeToString()) > 0.5 * report.bytes_before
    rows, logits = run(model)
    expected = codes.dequantized().numpy()
    np.testing.assert_array_equal(rows, expected[IDS])
    np.testing.assert_allclose(logits, rows @ expected.T, rtol=1e-3, atol=1e-3)
    tables = [
        tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.UINT8
    ]
    assert tables == ["B"]


def test_another_table_or_other_blocks_are_not_shared() -> None:
    weight = table()
    other = embedding_codes(torch.from_numpy(table(seed=1)), 8, 16)
    wider = embedding_codes(torch.from_numpy(weight), 8, 32)
    for head in (other, wider):
        model = lookup(weight, head)
        report = quantize_embedding(model, "embed", bits=8, block_size=16)
        assert (report.shared_with, report.bytes_after) == (None, ROWS * COLUMNS + 4 * ROWS * 3)
        expected = fake_quantize_embedding(torch.from_numpy(weight), 8, 16).numpy()
        np.testing.assert_array_equal(run(model)[0], expected[IDS])


def test_codes_of_another_algorithm_can_be_taken_over() -> None:
    weight = table()
    found = embedding_codes(torch.from_numpy(weight), 4, 16)
    nudged = WeightCodes((found.codes + 1).clamp(-8, 7), found.scales, None, 4, 16)
    model = lookup(weight, nudged)
    report = quantize_embedding(model, "embed", bits=4, block_size=16, codes=nudged)
    assert report.shared_with == "head"
    np.testing.assert_array_equal(run(model)[0], nudged.dequantized().numpy()[IDS])


def test_four_bits_need_no_attribute_that_older_runtimes_lack() -> None:
    """ONNX Runtime 1.22's GatherBlockQuantized has no `bits`: it refuses the node."""
    model = lookup(table())
    quantize_embedding(model, "embed", bits=4, block_size=16)
    assert {a.name for a in model.graph.node[0].attribute} == {"block_size", "gather_axis", "quantize_axis"}


@pytest.fixture(scope="module", params=["fused", "plain", "scaled", "projected"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a tiny model and of its export."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("exported")
    architectures: dict[str, tuple[str, dict[str, Any]]] = {
        "scaled": ("Gemma2ForCausalLM", {}),
        "projected": ("OPTForCausalLM", {"word_embed_proj_dim": 48}),
    }
    if request.param in architectures:
        name, settings = architectures[request.param]
        tiny_model(source, name, **settings)
    else:
        tiny_llama(source, tied=request.param == "plain")
    target = "cpu-x86" if request.param == "fused" else "portable"
    export_model(source, out, ExportConfig(target=target))
    return source, out


@pytest.mark.parametrize(("bits", "portable"), [(8, False), (4, False), (8, True)])
def test_the_graph_computes_what_torch_does_with_the_rounded_table(
    exported: tuple[Path, Path], tmp_path: Path, bits: int, portable: bool
) -> None:
    """Positions, projections and the scale of an embedding stay float32."""
    source, name = load_source(exported[0]), read_export(exported[1]).embedding
    model = onnx.load(exported[1] / "model.onnx")
    before = {tensor.name: tensor for tensor in model.graph.initializer}
    report = quantize_embedding(model, name, bits=bits, block_size=16, portable=portable)
    onnx.save(model, tmp_path / "model.onnx")
    after = {tensor.name: tensor for tensor in model.graph.initializer}
    assert all(after[key] == tensor for key, tensor in before.items() if key != name)
    assert report.bytes_after < {8: 0.4, 4: 0.2}[bits] * report.bytes_before * 1.3

    prompts = np.random.default_rng(0).integers(0, 300, (3, 9)).tolist()
    found = graph_logits(tmp_path / "model.onnx", prompts, pad_id=0)
    untie(source.model, fake_quantize_embedding(source.model.get_input_embeddings().weight, bits, 16))
    np.testing.assert_allclose(found, torch_logits(source, prompts), atol=5e-3, rtol=1e-3)
    plain = graph_logits(exported[1] / "model.onnx", prompts, pad_id=0)
    assert np.abs(plain - found).max() > 1e-2


def untie(model: Any, rows: torch.Tensor) -> None:
    """Give the embedding rows of its own; the head keeps the parameter that they shared."""
    model.get_input_embeddings().weight = torch.nn.Parameter(rows)


def test_a_float_embedding_reads_back_as_such() -> None:
    expected = EmbeddingReport("embed", ROWS, COLUMNS, 32, 0, "Gather", None, 1344, 1344)
    assert read_embedding(Graph(lookup(table())), "embed") == expected
    assert msgspec.json.decode(msgspec.json.encode(expected), type=EmbeddingReport) == expected
    with pytest.raises(QuantizationError, match="no token embedding `other`"):
        read_embedding(Graph(lookup(table())), "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 2}, "Expected 8 or 4 bits for the token embedding, found 2"),
        ({"block_size": 24}, "power of two, 16 or more, found 24"),
        ({"bits": 4, "portable": True}, "`portable` has none: use `embedding_bits: 8`"),
        (
            {"name": "rows"},
            "Expected the token embedding `rows` as a float32 matrix in the graph, found none",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(changes: dict[str, Any], message: str) -> None:
    settings = {"name": "embed", "bits": 8, "block_size": 16, **changes}
    with pytest.raises(QuantizationError, match=message):
        quantize_embedding(lookup(table()), **settings)


def test_odd_rows_of_four_bits_are_refused() -> None:
    with pytest.raises(QuantizationError, match="whole bytes, and a row has 41 columns"):
        quantize_embedding(lookup(table(columns=41)), "embed", bits=4, block_size=16)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_table_that_is_not_finite_is_refused(value: float) -> None:
    weight = table()
    weight[3, 5] = value
    with pytest.raises(QuantizationError, match="token embedding holds NaN or infinity"):
        quantize_embedding(lookup(weight), "embed", bits=8, block_size=16)


def test_a_table_that_others_read_is_left_alone() -> None:
    model = lookup(table())
    model.graph.node.append(helper.make_node("Identity", ["embed"], ["copy"]))
    with pytest.raises(QuantizationError, match=r"one Gather of its rows, found \['Gather', 'Identity'\]"):
        quantize_embedding(model, "embed", bits=8, block_size=16)


def test_codes_that_do_not_fit_are_refused() -> None:
    codes = embedding_codes(torch.from_numpy(table()), 8, 32)
    with pytest.raises(QuantizationError, match="Expected codes of the token embedding"):
        quantize_embedding(lookup(table()), "embed", bits=8, block_size=16, codes=codes)


def test_large_vocabularies_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.from_numpy(table(50))
    whole = embedding_codes(weight, 4, 16)
    monkeypatch.setattr("holdfast.quantize.artifact.embedding.ROUNDED_VALUES", 7 * COLUMNS)
    parts = embedding_codes(weight, 4, 16)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)
