"""genai_config.json: what it says, and what it refuses. test_runtimes.py runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from holdfast.errors import ExportError, ModelSourceError
from holdfast.exporter.export import export_model
from holdfast.exporter.genai import genai_config, write_genai_config
from holdfast.recipe import ExportConfig
from tests.tiny import tiny_llama, tiny_model

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "bos_token_id": None,
}
INPUTS = [
    "input_ids",
    "attention_mask",
    "position_ids",
    *(f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")),
]


def made(inputs: list[str] = INPUTS, shared: bool = False, **changes: Any) -> dict[str, Any]:
    return genai_config(
        CONFIG | changes, eos_ids=(3, 7), pad_id=0, graph_inputs=inputs, shared_cache=shared
    )


def test_sizes_ids_and_greedy_search() -> None:
    found = made()
    model, decoder = found["model"], found["model"]["decoder"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("llama", 300, 128)
    assert (model["eos_token_id"], model["pad_token_id"]) == ([3, 7], 0)
    assert "bos_token_id" not in model
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (
        4,
        2,
        8,
    )
    assert decoder["inputs"]["past_value_names"] == "past_key_values.%d.value"
    assert decoder["outputs"]["present_key_names"] == "present.%d.key"
    assert found["search"] == {
        "do_sample": False,
        "num_beams": 1,
        "max_length": 128,
        "past_present_share_buffer": False,
    }


@pytest.mark.parametrize(
    ("model_type", "kind"), [("qwen3", "qwen3"), ("phi3", "decoder"), ("gpt_neox", "decoder")]
)
def test_type(model_type: str, kind: str) -> None:
    assert made(model_type=model_type)["model"]["type"] == kind


def test_stated_and_derived_head_sizes() -> None:
    assert made(head_dim=16)["model"]["decoder"]["head_size"] == 16
    assert made(head_dim=None)["model"]["decoder"]["head_size"] == 8
    assert made(num_key_value_heads=None)["model"]["decoder"]["num_key_value_heads"] == 4


def test_begin_token_shared_cache_and_no_positions() -> None:
    assert made(bos_token_id=5)["model"]["bos_token_id"] == 5
    assert made(shared=True)["search"]["past_present_share_buffer"] is True
    inputs = made([name for name in INPUTS if name != "position_ids"])["model"]["decoder"]["inputs"]
    assert "position_ids" not in inputs
    assert "attention_mask" in inputs


@pytest.mark.parametrize("wrong", [None, 0, "32", True])
def test_a_missing_size_is_refused(wrong: Any) -> None:
    with pytest.raises(ModelSourceError) as caught:
        made(hidden_size=wrong)
    assert str(caught.value) == (
        f"Expected `hidden_size` in config.json to be a positive number, found {wrong!r}: copy the model's "
        "config.json again."
    )


def test_another_layout_is_refused() -> None:
    with pytest.raises(
        ExportError, match=r"without \['past_key_values.1.value'\] and with \['token_type_ids'\]"
    ):
        made([*INPUTS[:-1], "token_type_ids"])


class TestWriting:
    def test_from_an_export(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        export_model(tiny_llama(tmp_path / "model"), tmp_path / "out", ExportConfig())
        path = write_genai_config(tmp_path / "out")
        found = json.loads(path.read_text())
        assert found["model"]["eos_token_id"] == [3]
        assert found["model"]["decoder"]["filename"] == "model.onnx"
        first = path.read_bytes()
        assert write_genai_config(tmp_path / "out").read_bytes() == first

    def test_without_a_graph_or_a_config(self, tmp_path: Path) -> None:
        tiny_llama(tmp_path)
        with pytest.raises(ExportError, match=r"model\.onnx is not a readable ONNX graph"):
            write_genai_config(tmp_path)
        (tmp_path / "config.json").write_text("[")
        with pytest.raises(ModelSourceError, match=r"config\.json is not readable JSON"):
            write_genai_config(tmp_path)


def test_heads_of_the_cache_are_the_graphs(tmp_path: Path) -> None:
    """Falcon caches another number of heads than its config says."""
    (tmp_path / "out").mkdir()
    model = tiny_model(
        tmp_path / "model", "FalconForCausalLM", multi_query=True, new_decoder_architecture=False
    )
    export_model(model, tmp_path / "out", ExportConfig())
    decoder = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    past = next(value for value in graph.input if value.name == "past_key_values.0.key")
    sizes = [dimension.dim_value for dimension in past.type.tensor_type.shape.dim]
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (sizes[1], sizes[3])
    assert decoder["num_key_value_heads"] == 1 < decoder["num_attention_heads"]
