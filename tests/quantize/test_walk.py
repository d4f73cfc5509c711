"""Walking through a decoder block by block, in memory and from disk; what cannot be streamed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.chat import user
from holdfast.errors import CalibrationError, ModelSourceError
from holdfast.exporter.architectures import ROWS, block_paths
from holdfast.exporter.source import load_source
from holdfast.exporter.streamed import ShardWriter, StreamedModel
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.exporter.walk import first_inputs
from holdfast.quantize.walk import (
    WholeModel,
    greedy_answers,
    next_tokens,
    padded_batch,
    walk_blocks,
    walked_logits,
)
from tests.tiny import LINES, tiny_llama, tiny_model

# Seventeen tokens and more are past the sliding window of the tiny models that have one.
KEEP = 20


def prompts(source: Any) -> list[list[int]]:
    return [source.tokenizer.encode_chat(user(line)) for line in LINES]


def plain_logits(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch.inputs(), use_cache=False).logits[:, -KEEP:]


@pytest.mark.parametrize("architecture", sorted(ROWS))
def test_the_walk_gives_the_models_logits(tmp_path: Path, architecture: str) -> None:
    """In memory and streamed; the sum of rotary arguments, masks, windows, soft caps and scalings."""
    source = load_source(tiny_model(tmp_path, architecture))
    streamed = StreamedModel(tmp_path)
    batch = padded_batch(prompts(source), 0)
    assert int((batch.mask == 0).sum()) > 0
    shown = batch.mask[:, -KEEP:].bool()
    expected = plain_logits(source.model, batch)[shown]
    for decoder in (WholeModel(source.model), streamed):
        (found,) = walked_logits(decoder, [batch], KEEP)
        torch.testing.assert_close(found[shown], expected, rtol=0.0, atol=1e-6)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    assert torch.equal(plain_logits(source.model, batch)[shown], expected)  # the model is as it was


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"])
def test_a_folder_written_part_by_part_is_the_same_model(tmp_path: Path, architecture: str) -> None:
    """Tied and untied heads, and linears that the checkpoint holds the other way round."""
    tied = architecture != "OPTForCausalLM"
    model = tiny_model(tmp_path / "model", architecture, tie_word_embeddings=tied)
    streamed, out = StreamedModel(model), tmp_path / "out"
    out.mkdir()
    writer = ShardWriter(out, len(streamed.blocks) + 1)
    for index in range(len(streamed.blocks)):
        with streamed.block(index):
            writer.write(streamed.stored(streamed.block_names(index)))
    with streamed.outside():
        writer.write(streamed.stored(streamed.outside_names()))
    writer.finish(streamed)
    expected, found = load_source(model), load_source(out)
    state = found.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.model.state_dict().items())
    assert found.tokenizer.eos_ids == expected.tokenizer.eos_ids
    assert StreamedModel(out).blocks == block_paths(expected.model)


def test_blocks_come_and_go(tmp_path: Path) -> None:
    streamed = StreamedModel(tiny_llama(tmp_path))
    with streamed.block(1) as block:
        assert not any(parameter.is_meta for parameter in block.parameters())
        loaded = [name for name, value in streamed.model.named_parameters() if not value.is_meta]
        assert sorted(loaded) == sorted(streamed.block_names(1))
    with streamed.outside():
        loaded = [name for name, value in streamed.model.named_parameters() if not value.is_meta]
        assert loaded == ["model.embed_tokens.weight", "model.norm.weight"]
        assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    streamed, name = StreamedModel(tmp_path), "model.layers.0.mlp.up_proj.weight"
    with streamed.block(0):
        value = streamed.model.get_parameter(name)
        assert value.dtype == torch.float32
        assert torch.equal(value, load_source(tmp_path).model.get_parameter(name))


def test_arguments_are_those_of_a_whole_forward(tmp_path: Path) -> None:
    """Gemma 2 alternates windows: the masks of the two blocks differ."""
    source = load_source(tiny_model(tmp_path, "Gemma2ForCausalLM", sliding_window=4))
    entered: list[dict[str, Any]] = []
    handles = [
        source.model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs: entered.append(dict(kwargs)), with_kwargs=True
        )
        for path in block_paths(source.model)
    ]
    batch = padded_batch(prompts(source), 0)
    plain_logits(source.model, batch)
    for handle in handles:
        handle.remove()
    found = first_inputs(source.model, batch.inputs())
    masks = [kwargs["attention_mask"] for kwargs in entered]
    assert not torch.equal(*masks)
    for mask, arguments in zip(masks, found.arguments, strict=True):
        assert torch.equal(arguments["attention_mask"], mask)


def test_greedy_answers_are_those_of_the_cached_model(tmp_path: Path) -> None:
    source, streamed = load_source(tiny_llama(tmp_path)), StreamedModel(tmp_path)
    rows = prompts(source)
    model = TorchLanguageModel(source.model, source.tokenizer, "whole", 4)
    expected = model.generate(rows, max_new_tokens=5)
    settings: dict[str, Any] = {"max_new_tokens": 5, "pad_id": 0, "batch_size": 4}
    assert greedy_answers(streamed, rows, eos_ids=source.tokenizer.eos_ids, **settings) == expected
    stop = expected[0][2]
    cut = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert greedy_answers(streamed, rows, eos_ids=[stop], **settings) == cut


def test_next_tokens_keep_the_order_of_the_rows(tmp_path: Path) -> None:
    source = load_source(tiny_llama(tmp_path))
    rows = prompts(source)
    decoder = WholeModel(source.model)
    alone = [next_tokens(decoder, [row], pad_id=0, batch_size=1)[0] for row in rows]
    assert next_tokens(decoder, rows, pad_id=0, batch_size=4) == alone


def test_nan_names_the_block(tmp_path: Path) -> None:
    source = load_source(tiny_llama(tmp_path))
    source.model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    batch = padded_batch(prompts(source), 0)
    with pytest.raises(CalibrationError) as caught:
        for _ in walk_blocks(WholeModel(source.model), [first_inputs(source.model, batch.inputs())]):
            pass
    assert str(caught.value).startswith("The output of `model.layers.1` holds NaN or infinity")


def test_weights_that_are_not_finite_are_named_as_they_are_read(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(state, tmp_path / "model.safetensors")
    streamed = StreamedModel(tmp_path)
    with pytest.raises(ModelSourceError, match=r"`model.layers.1.mlp.up_proj.weight` in .* not finite"):
        with streamed.block(1):
            pass
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors")


def _with(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {name: torch.ones(2)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_as_pickle, "convert it to safetensors"),
        (lambda folder: _change_config(folder, auto_map={"AutoModel": "code.Model"}), "`auto_map`"),
        (lambda folder: _without(folder, "model.layers.1.mlp.up_proj.weight"), "lack tensors"),
        (lambda folder: _with(folder, "model.layers.1.mlp.other.weight"), "does not know"),
        (lambda folder: _change_config(folder, num_hidden_layers=0), "no decoder blocks|does not know"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "PEFT adapter"),
    ],
)
def test_what_cannot_be_streamed(tmp_path: Path, damage: Any, said: str) -> None:
    damage(tiny_llama(tmp_path))
    with pytest.raises(ModelSourceError, match=said) as caught:
        StreamedModel(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_shape_that_the_config_contradicts(tmp_path: Path) -> None:
    _change_config(tiny_llama(tmp_path), intermediate_size=60)
    streamed = StreamedModel(tmp_path)
    with pytest.raises(ModelSourceError, match=r"is \[64, 32\] in the file and \[60, 32\] by the config"):
        with streamed.block(0):
            pass
