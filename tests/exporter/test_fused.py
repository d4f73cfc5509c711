"""The fused graph: padding of every kind, shared cache buffers, names, and the same bytes every time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from holdfast.errors import ExecutionError
from holdfast.exporter.export import save_graph
from holdfast.exporter.fused import SHARED_CACHE, fused_graph
from holdfast.exporter.parity import GraphDecoder, open_decoder
from holdfast.exporter.plain import write_plain
from holdfast.exporter.source import SourceModel, load_source
from tests.tiny import tiny_model

ATOL = 2e-5
LAYERS, HEADS, SIZE, BUFFER = 2, 2, 16, 32
ROWS, TOKENS = 3, 24


@dataclass(frozen=True)
class Exported:
    """A model and its fused graph, written to `folder`."""

    source: SourceModel
    folder: Path
    passes: dict[str, tuple[int, int]]

    @property
    def decoder(self) -> GraphDecoder:
        return open_decoder(self.folder / "model.onnx")

    @property
    def graph(self) -> onnx.GraphProto:
        return onnx.load(self.folder / "model.onnx").graph


def export(source: SourceModel, folder: Path) -> Exported:
    folder.mkdir()
    graph = fused_graph(source.model, opset=21, positions=128)
    save_graph(graph.model, folder)
    return Exported(source, folder, {step.name: (step.rewrites, step.left) for step in graph.passes})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("llama")
    source = load_source(tiny_model(folder / "model", "LlamaForCausalLM", hidden_size=64))
    return export(source, folder / "fused")


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Soft-capped attention with a window: the bias that hides padding has to come after the cap."""
    folder = tmp_path_factory.mktemp("gemma")
    settings = {"hidden_size": 64, "attn_logit_softcapping": 2.0, "sliding_window": 8}
    source = load_source(tiny_model(folder / "model", "Gemma2ForCausalLM", **settings))
    return export(source, folder / "fused")


# One chunk of tokens: for each row how many zeros of the mask, tokens, and zeros again.
Chunk = list[tuple[int, int, int]]
STEPS: list[Chunk] = [[(0, 1, 0)] * ROWS] * 4
PADDING: dict[str, Chunk] = {
    "none": [(0, 7, 0), (0, 7, 0), (0, 7, 0)],
    "left": [(0, 9, 0), (4, 5, 0), (8, 1, 0)],
    "right": [(0, 9, 0), (0, 5, 4), (0, 1, 8)],
    "left and right rows": [(0, 9, 0), (5, 4, 0), (0, 3, 6)],
    "both in a row": [(2, 5, 2), (1, 8, 0), (3, 1, 5)],
    "one token": [(0, 1, 0), (0, 1, 0), (0, 1, 0)],
}
IDS = torch.randint(4, 300, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))


def laid_out(chunks: list[Chunk]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, mask) int64 [row, column] of each chunk; the tokens of a row go on from chunk to chunk."""
    seen, found = [0] * len(chunks[0]), []
    for chunk in chunks:
        ids = torch.zeros(len(chunk), sum(chunk[0]), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (left, tokens, _) in enumerate(chunk):
            ids[row, left : left + tokens] = IDS[row, seen[row] : seen[row] + tokens]
            mask[row, left : left + tokens] = 1
            seen[row] += tokens
        found.append((ids, mask))
    return found


def graph_logits(decoder: GraphDecoder, chunks: list[Chunk]) -> list[np.ndarray]:
    """Logits [token, vocabulary] of each row, padding left out."""
    rows = len(chunks[0])
    cache, mask = decoder.empty_cache(rows), torch.zeros(rows, 0, dtype=torch.int64)
    found: list[list[np.ndarray]] = [[] for _ in range(rows)]
    for ids, shown in laid_out(chunks):
        mask = torch.cat([mask, shown], dim=1)
        logits, cache = decoder.step(ids, mask, cache)
        for row in range(rows):
            found[row].append(logits[row][shown[row].bool().numpy()])
    return [np.concatenate(parts) for parts in found]


@torch.inference_mode()
def torch_logits(model: Any, row: int, tokens: int) -> np.ndarray:
    """One row alone, without padding or cache."""
    logits: np.ndarray = model(input_ids=IDS[row : row + 1, :tokens]).logits[0].numpy()
    return logits


def assert_torch(exported: Exported, found: list[np.ndarray]) -> None:
    for row, logits in enumerate(found):
        expected = torch_logits(exported.source.model, row, len(logits))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("padding", PADDING)
def test_padding_changes_nothing(padding: str, llama: Exported, capped: Exported) -> None:
    for exported in (llama, capped):
        assert_torch(exported, graph_logits(exported.decoder, [PADDING[padding], *STEPS]))


@pytest.mark.parametrize("chunks", [[(0, 4, 0)], [(3, 4, 0)], [(0, 4, 2)], [(1, 2, 2)]])
def test_a_prompt_in_chunks(chunks: Chunk, llama: Exported) -> None:
    several = [chunks, [(0, 3, 0)], [(0, 1, 0)], [(0, 2, 0)]]
    assert_torch(llama, graph_logits(llama.decoder, several))


def test_chunks_of_several_rows_are_refused_and_not_wrong(llama: Exported) -> None:
    with pytest.raises(ExecutionError, match="batch_size must be 1 when sequence_length > 1"):
        graph_logits(llama.decoder, [PADDING["none"], [(0, 2, 0)] * ROWS])


def test_a_row_of_padding_alone(llama: Exported) -> None:
    alone = graph_logits(llama.decoder, [[(0, 6, 0)], *[[(0, 1, 0)]] * 2])
    cache, mask = llama.decoder.empty_cache(2), torch.tensor([[1] * 6, [0] * 6])
    ids, found = torch.stack([IDS[0, :6], torch.zeros(6, dtype=torch.int64)]), []
    for step in range(3):
        logits, cache = llama.decoder.step(ids, mask, cache)
        assert np.isfinite(logits).all()
        found.append(logits[0])
        ids = torch.stack([IDS[0, 6 + step : 7 + step], torch.zeros(1, dtype=torch.int64)])
        mask = torch.cat([mask, torch.tensor([[1], [0]])], dim=1)
    np.testing.assert_allclose(np.concatenate(found), alone[0], rtol=0, atol=ATOL)


@pytest.mark.parametrize("padding", ["left", "right", "both in a row"])
def test_one_buffer_for_past_and_present(padding: str, llama: Exported) -> None:
    chunks = [PADDING[padding], *STEPS]
    expected = graph_logits(llama.decoder, chunks)
    session = llama.decoder.session
    buffers = [
        (
            f"{layer}.{part}",
            ort.OrtValue.ortvalue_from_numpy(np.full((ROWS, HEADS, BUFFER, SIZE), 9.0, np.float32)),
        )
        for layer in range(LAYERS)
        for part in ("key", "value")
    ]
    mask = np.zeros((ROWS, 0), np.int64)
    found: list[list[np.ndarray]] = [[] for _ in range(ROWS)]
    for ids, shown in laid_out(chunks):
        mask = np.concatenate([mask, shown.numpy()], axis=1)
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids.numpy())
        binding.bind_cpu_input("attention_mask", mask)
        for name, buffer in buffers:
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()
        for row in range(ROWS):
            found[row].append(logits[row][shown[row].bool().numpy()])
    for row in range(ROWS):
        np.testing.assert_allclose(np.concatenate(found[row]), expected[row], rtol=0, atol=ATOL)


def test_logits_of_the_last_positions(llama: Exported) -> None:
    decoder, (ids, mask) = llama.decoder, laid_out([PADDING["left"]])[0]
    every, _ = decoder.step(ids, mask, decoder.empty_cache(ROWS))
    for keep in (1, 3):
        last, _ = decoder.step(ids, mask, decoder.empty_cache(ROWS), keep=keep)
        np.testing.assert_allclose(last, every[:, -keep:], rtol=0, atol=1e-6)


def test_the_same_bytes_every_time(llama: Exported, tmp_path: Path) -> None:
    again = export(load_source(llama.source.folder), tmp_path / "again")
    data = (llama.folder / "model.onnx").read_bytes()
    assert (again.folder / "model.onnx").read_bytes() == data
    for trace in (b"/work", b"/tmp", b"/home", b"site-packages", b'File "', b".py", b"pkg.torch"):
        assert trace not in data
    model = onnx.load_from_string(data)
    assert {prop.key for prop in model.metadata_props} <= {SHARED_CACHE}
    assert not model.doc_string and not model.graph.doc_string and not model.graph.metadata_props
    for node in model.graph.node:
        assert not node.doc_string and not node.metadata_props


def dimensions(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_inputs_and_outputs_are_called_as_optimum_calls_them(llama: Exported, tmp_path: Path) -> None:
    write_plain(llama.source, tmp_path / "model.onnx", opset=17)
    plain, fused = onnx.load(tmp_path / "model.onnx").graph, llama.graph
    inputs = {value.name for value in fused.input}
    assert inputs - {"logits_to_keep"} == {value.name for value in plain.input} - {"position_ids"}
    assert [value.name for value in fused.output] == [value.name for value in plain.output]
    rows, new, past, total = (
        "batch_size",
        "sequence_length",
        "past_sequence_length",
        "total_sequence_length",
    )
    found = {value.name: dimensions(value) for value in [*fused.input, *fused.output]}
    assert found["input_ids"] == [rows, new]
    assert found["attention_mask"] == [rows, total]
    assert found["past_key_values.1.value"] == [rows, HEADS, past, SIZE]
    assert found["present.1.value"] == [rows, HEADS, total, SIZE]
    assert found["logits"][0] == rows and found["logits"][2] == 300


def test_what_is_in_the_graph_of_a_llama(llama: Exported) -> None:
    layer = [node.op_type for node in llama.graph.node if node.name.startswith("/model/layers.0/")]
    assert Counter(layer) == {
        "SimplifiedLayerNormalization": 1,
        "GroupQueryAttention": 1,
        "SkipSimplifiedLayerNormalization": 1,
        "MatMul": 4,
        "Split": 1,
        "QuickGelu": 1,
        "Mul": 1,
    }
    assert len(llama.graph.node) <= 40  # 15 of them for the mask
    assert all(left == 0 for _, left in llama.passes.values())
    names = {tensor.name for tensor in llama.graph.initializer}
    assert {"rotary.0.cos", "rotary.0.sin", "model.embed_tokens.weight", "lm_head.weight_T"} <= names
    assert not any("rotary.1" in name for name in names)  # layers share their angles
