"""Model folders: what loads, and the exact sentence for what does not."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from holdfast.chat import ChatTokenizer, user
from holdfast.errors import (
    HoldfastError,
    ModelSourceError,
    TokenizerError,
    UnsupportedArchitectureError,
    VocabularyMismatchError,
)
from holdfast.exporter import architectures
from holdfast.exporter.source import (
    check_same_vocabulary,
    load_base,
    load_source,
    save_source,
    source_digests,
)
from holdfast.exporter.weights import INDEX
from tests.tiny import tiny_llama, write_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_loads_frozen_float32_in_eval_mode(llama: Path) -> None:
    source = load_source(llama)
    assert source.architecture == "LlamaForCausalLM"
    assert {parameter.dtype for parameter in source.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in source.model.parameters())
    assert not source.model.training
    assert source.tokenizer.encode_chat(user("Hello"))[-1] == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("max_shard_size", "files"), [("1GB", 1), ("20KB", 4)])
def test_half_precision_weights_become_the_same_values_in_float32(
    folder: Path, dtype: torch.dtype, max_shard_size: str, files: int
) -> None:
    half = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    (folder / "model.safetensors").unlink()
    half.save_pretrained(folder, max_shard_size=max_shard_size)
    assert len(list(folder.glob("*.safetensors"))) == files
    state, expected = load_source(folder).model.state_dict(), half.state_dict()
    assert {value.dtype for value in expected.values()} == {dtype}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value.float()) for name, value in expected.items())


@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_gives_back_every_bit(tmp_path: Path, tied: bool) -> None:
    source = load_source(tiny_llama(tmp_path / "model", tied=tied))
    save_source(source, tmp_path / "out")
    again = load_source(tmp_path / "out")
    before, after = source.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.tokenizer.digest() == source.tokenizer.digest()


def test_shards_are_loaded_and_a_lost_one_is_named(folder: Path) -> None:
    source = load_source(folder)
    (folder / "model.safetensors").unlink()
    source.model.save_pretrained(folder, max_shard_size="20KB")
    again = load_source(folder)
    assert torch.equal(again.model.lm_head.weight, source.model.lm_head.weight)
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    (folder / shards[1]).unlink()
    index = folder / "model.safetensors.index.json"
    expect(
        ModelSourceError,
        f"{index} lists the weight file `{shards[1]}`, which is not in {folder}: copy the whole model.",
        lambda: load_source(folder),
    )


def test_a_shard_outside_the_folder_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}}))
    expect(
        ModelSourceError,
        f"{index} lists the weight file `../model.safetensors`, which is not in {folder}: "
        "copy the whole model.",
        lambda: load_source(folder),
    )


def test_digests_cover_what_defines_the_model(folder: Path) -> None:
    before = source_digests(folder)
    assert set(before) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    (folder / "README.md").write_text("not the model")
    assert source_digests(folder) == before
    edit_config(folder, rms_norm_eps=1e-5)
    assert source_digests(folder) != before


def expect(kind: type[HoldfastError], sentence: str, call: Callable[[], object]) -> None:
    with pytest.raises(HoldfastError) as caught:
        call()
    assert type(caught.value) is kind
    assert str(caught.value) == sentence


def test_a_missing_folder(tmp_path: Path) -> None:
    expect(
        ModelSourceError,
        f"The base model folder {tmp_path / 'no'} does not exist: "
        "give the path of a downloaded Hugging Face model.",
        lambda: load_source(tmp_path / "no", role="base model"),
    )


def test_a_file_instead_of_a_folder(llama: Path) -> None:
    path = llama / "model.safetensors"
    expect(
        ModelSourceError,
        f"The model {path} is a file: give the folder that holds config.json and the weights.",
        lambda: load_source(path),
    )


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    expect(
        ModelSourceError,
        f"Expected a config.json in {folder}, found none: point the model at a folder that "
        "`save_pretrained` wrote.",
        lambda: load_source(folder),
    )


def test_broken_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": [')
    expect(
        ModelSourceError,
        f"{folder / 'config.json'} is not readable JSON (Expecting value: line 1 column 20 (char 19)): "
        "save the model again.",
        lambda: load_source(folder),
    )


def test_a_config_that_is_not_an_object(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    expect(
        ModelSourceError,
        f"{folder / 'config.json'} should hold one JSON object, found list: save the model again.",
        lambda: load_source(folder),
    )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"_attn_implementation_internal": "someone/kernel"}, "_attn_implementation_internal"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"transformers_weights": "../elsewhere.safetensors"}, "transformers_weights"),
        ({"rope_scaling": {"_attn_implementation_internal": "x"}}, "_attn_implementation_internal"),
        ({"text_configs": [{"auto_map": {}}]}, "auto_map"),
        ({"_name_or_path": {"not": "text"}}, "_name_or_path"),
    ],
)
def test_a_config_that_could_run_code(folder: Path, changes: dict[str, Any], key: str) -> None:
    edit_config(folder, **changes)
    expect(
        ModelSourceError,
        f"{folder / 'config.json'} has the key `{key}`, through which a model folder can run code or load "
        "other files: remove it if you trust where the model comes from.",
        lambda: load_source(folder),
    )


def test_private_keys_that_transformers_writes_are_harmless(folder: Path) -> None:
    edit_config(folder, _name_or_path="someone/model", _attn_implementation_autoset=True)
    assert load_source(folder).architecture == "LlamaForCausalLM"


def test_code_of_its_own_is_refused_unless_asked_for(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.LlamaForCausalLM"})
    expect(
        ModelSourceError,
        f"{folder / 'config.json'} names Python code of its own (`auto_map`): remove that key to load it "
        "with transformers' own class, or, after reading the code, allow it with --trust-remote-code.",
        lambda: load_source(folder),
    )


def test_transformers_own_class_is_preferred_to_trusted_code(llama: Path, folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.LlamaForCausalLM"})
    (folder / "modeling.py").write_text("raise SystemExit('this code ran')")
    source = load_source(folder, trust_remote_code=True)
    assert type(source.model) is transformers.LlamaForCausalLM
    assert torch.equal(source.model.lm_head.weight, load_source(llama).model.lm_head.weight)
    assert "modeling.py" in source_digests(folder)
    save_source(source, folder.parent / "out")
    assert load_source(folder.parent / "out").architecture == "LlamaForCausalLM"


@pytest.fixture
def remote(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a class that transformers does not have, with the code and a row for it."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # transformers adds its cache of code
    row = dataclasses.replace(architectures.lookup("LlamaForCausalLM"), name="RemoteForCausalLM")
    monkeypatch.setitem(architectures.ROWS, row.name, row)
    edit_config(
        folder, architectures=[row.name], auto_map={"AutoModelForCausalLM": "modeling.RemoteForCausalLM"}
    )
    (folder / "modeling.py").write_text(
        "from transformers import LlamaForCausalLM\nclass RemoteForCausalLM(LlamaForCausalLM): pass\n"
    )
    return folder


def test_trusted_code_runs_where_transformers_has_no_such_class(llama: Path, remote: Path) -> None:
    source = load_source(remote, trust_remote_code=True)
    assert source.architecture == type(source.model).__name__ == "RemoteForCausalLM"
    assert type(source.model).__module__.startswith("transformers_modules.")
    assert torch.equal(source.model.lm_head.weight, load_source(llama).model.lm_head.weight)


def test_a_class_without_code(remote: Path) -> None:
    config = json.loads((remote / "config.json").read_text())
    del config["auto_map"]
    (remote / "config.json").write_text(json.dumps(config))
    expect(
        ModelSourceError,
        f"transformers has no class RemoteForCausalLM, and {remote} brings no code that may run: use a "
        "checkpoint with an `auto_map`, and allow it with --trust-remote-code.",
        lambda: load_source(remote, trust_remote_code=True),
    )


def test_code_that_gives_another_class(remote: Path) -> None:
    (remote / "modeling.py").write_text(
        "from transformers import LlamaForCausalLM\nclass Other(LlamaForCausalLM): pass\n"
        "RemoteForCausalLM = Other\n"
    )
    expect(
        ModelSourceError,
        f"The code in {remote} gives a Other for RemoteForCausalLM: correct its `auto_map`.",
        lambda: load_source(remote, trust_remote_code=True),
    )


def test_code_of_another_repository(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "someone/code--modeling.Model"})
    expect(
        ModelSourceError,
        f"{folder / 'config.json'} takes its Python code from another repository "
        "(`someone/code--modeling.Model`): copy the code into the model folder.",
        lambda: load_source(folder, trust_remote_code=True),
    )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"_attn_implementation_internal": "someone/kernel"}, "_attn_implementation_internal"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"text_config": {"auto_map": {}}}, "auto_map"),
    ],
)
def test_trust_covers_the_auto_map_alone(folder: Path, changes: dict[str, Any], key: str) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.LlamaForCausalLM"}, **changes)
    with pytest.raises(ModelSourceError, match=f"has the key `{key}`, through which"):
        load_source(folder, trust_remote_code=True)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "`quantization_config`, method gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "`quantization_config`, method awq"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "`quantization_config`, method bitsandbytes",
        ),
        (
            {"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}},
            "`quantization_config`, method compressed-tensors",
        ),
        ({"compression_config": {"format": "dense"}}, "`compression_config`, no method given"),
    ],
)
def test_a_quantized_checkpoint(folder: Path, changes: dict[str, Any], what: str) -> None:
    edit_config(folder, **changes)
    expect(
        ModelSourceError,
        f"{folder / 'config.json'} describes a model that is quantized already ({what}): "
        "start from the full-precision checkpoint.",
        lambda: load_source(folder),
    )


FP8 = torch.zeros(4, 4).to(torch.float8_e4m3fn)
BYTES = torch.zeros(4, 4, dtype=torch.uint8)
GATE = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        (f"{GATE}.qweight", BYTES.int(), "GPTQ or AWQ"),
        (f"{GATE}.SCB", torch.ones(4), "bitsandbytes, 8 bits"),
        (f"{GATE}.weight.absmax", torch.ones(4), "bitsandbytes, 4 bits"),
        (f"{GATE}.weight_packed", BYTES.int(), "compressed-tensors"),
        (f"{GATE}.weight_scale_inv", torch.ones(4), "fp8"),
        (f"{GATE}.weight", FP8, "dtype F8_E4M3"),
        (f"{GATE}.weight", BYTES, "dtype U8"),
        (f"{GATE}.codes", BYTES.char(), "dtype I8"),
    ],
)
def test_quantized_tensors_that_the_config_keeps_quiet_about(
    folder: Path, name: str, tensor: torch.Tensor, why: str
) -> None:
    change_tensors(folder, lambda tensors: tensors.update({name: tensor}))
    expect(
        ModelSourceError,
        f"{folder / 'model.safetensors'} holds weights that are quantized already (`{name}`: {why}): "
        "start from the full-precision checkpoint.",
        lambda: load_source(folder),
    )


def test_an_unsupported_architecture_names_the_supported_ones(folder: Path) -> None:
    edit_config(folder, architectures=["T5ForConditionalGeneration"])
    expect(
        UnsupportedArchitectureError,
        "Architecture `T5ForConditionalGeneration` is not supported: expected one of "
        f"{', '.join(architectures.ROWS)}.",
        lambda: load_source(folder),
    )


@pytest.mark.parametrize("names", [None, [], ["LlamaForCausalLM", "Other"], [7]])
def test_architectures_must_name_one_class(folder: Path, names: Any) -> None:
    edit_config(folder, architectures=names)
    expect(
        ModelSourceError,
        f"{folder / 'config.json'} should name one class in `architectures`, found {names!r}: "
        'add for example ["LlamaForCausalLM"].',
        lambda: load_source(folder),
    )


def test_a_model_type_that_contradicts_the_class(folder: Path) -> None:
    edit_config(folder, model_type="gpt2")
    expect(
        ModelSourceError,
        f"{folder / 'config.json'} says `model_type` 'gpt2', and LlamaForCausalLM needs 'llama': "
        "correct the config.",
        lambda: load_source(folder),
    )


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    expect(
        ModelSourceError,
        f"{folder} holds its weights as a pickle (pytorch_model.bin), which can run code when opened: "
        "convert it to safetensors (`save_pretrained(safe_serialization=True)`).",
        lambda: load_source(folder),
    )


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    expect(
        ModelSourceError,
        f"Expected model.safetensors in {folder}, found no weight file: "
        "point the model at a complete model.",
        lambda: load_source(folder),
    )


def test_gguf_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")
    expect(
        ModelSourceError,
        f"{folder} holds its weights as GGUF (model-q4.gguf), made for llama.cpp and mostly quantized: "
        "start from the safetensors checkpoint that it was converted from.",
        lambda: load_source(folder),
    )


@pytest.mark.parametrize("keep_frac", [0.0, 0.01, 0.6])
def test_truncated_safetensors(folder: Path, keep_frac: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep_frac)])
    with pytest.raises(ModelSourceError) as caught:
        load_source(folder)
    assert str(caught.value).startswith(f"{path} is not a complete safetensors file (")
    assert str(caught.value).endswith("): copy it again.")


def raw(header: bytes, *, length: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with any header; `length` is what it claims the header's length to be."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(*offsets: int) -> bytes:
    return json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "header too small"),
        (raw(b'{"x": '), "invalid JSON in header"),
        (raw(b"[]"), "invalid JSON in header"),
        (raw(b"{}", length=1 << 62), "header too large"),
        (raw(b"{}", length=1000), "invalid header length"),
        (raw(entry(0, 8), data=bytes(4)), "file not fully covered"),
        (raw(entry(8, 16), data=bytes(16)), "invalid offset for tensor `x`"),
        (raw(entry(0, 4), data=bytes(4)), "invalid shape, data type, or offset"),
    ],
)
def test_corrupt_safetensors(folder: Path, content: bytes, reason: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelSourceError) as caught:
        load_source(folder)
    assert str(caught.value).startswith(f"{path} is not a complete safetensors file (")
    assert reason in str(caught.value)
    assert str(caught.value).endswith("): copy it again.")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(folder: Path, value: float, dtype: torch.dtype) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        tensors[f"{GATE}.weight"][3, 5] = value

    change_tensors(folder, spoil)
    expect(
        ModelSourceError,
        f"`{GATE}.weight` in {folder} has values that are not finite: use a checkpoint whose training did "
        "not diverge, or copy it again.",
        lambda: load_source(folder),
    )


def sharded(folder: Path) -> dict[str, str]:
    """Split the weights of `folder`; gives the index's map from tensor to file."""
    source = load_source(folder)
    (folder / "model.safetensors").unlink()
    source.model.save_pretrained(folder, max_shard_size="20KB")
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return weight_map


def test_an_index_that_names_a_tensor_that_its_shard_lacks(folder: Path) -> None:
    weight_map = sharded(folder)
    first, last = min(weight_map.values()), max(weight_map.values())
    moved = min(name for name, file in weight_map.items() if file == last)
    (folder / INDEX).write_text(json.dumps({"weight_map": {**weight_map, moved: first}}))
    expect(
        ModelSourceError,
        f"{folder / INDEX} says that `{moved}` is in {first}, which does not hold it: copy the whole "
        "model.",
        lambda: load_source(folder),
    )


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"x": 5}}', '{"weight_map": []}'])
def test_an_unreadable_index(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(content)
    with pytest.raises(ModelSourceError) as caught:
        load_source(folder)
    assert str(caught.value).startswith(f"{folder / INDEX} is not a readable index of weight files (")
    assert str(caught.value).endswith("): save the model again.")


def test_an_empty_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text('{"weight_map": {}}')
    expect(
        ModelSourceError,
        f"{folder / INDEX} lists no weight file: copy the whole model.",
        lambda: load_source(folder),
    )


def test_missing_tensors(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    expect(
        ModelSourceError,
        f"The weights in {folder} lack 1 tensors that LlamaForCausalLM needs "
        "(the first is `model.layers.1.mlp.up_proj.weight`): "
        "use the complete checkpoint of that architecture.",
        lambda: load_source(folder),
    )


@pytest.mark.parametrize(
    ("layers", "why"),
    [(1, "have 9 tensors that LlamaForCausalLM does not know"), (3, "lack 9 tensors that")],
)
def test_a_config_with_another_number_of_layers(folder: Path, layers: int, why: str) -> None:
    edit_config(folder, num_hidden_layers=layers)
    with pytest.raises(ModelSourceError) as caught:
        load_source(folder)
    assert f"The weights in {folder} {why}" in str(caught.value)
    assert f"the first is `model.layers.{min(layers, 2)}." in str(caught.value)


MLP, ATTENTION = "model.layers.0.mlp", "model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("changes", "name", "found", "wanted", "count"),
    [
        ({"hidden_size": 40}, "model.embed_tokens.weight", "300 x 32", "300 x 40", 20),
        ({"vocab_size": 310}, "model.embed_tokens.weight", "300 x 32", "310 x 32", 1),
        ({"intermediate_size": 48}, f"{MLP}.down_proj.weight", "32 x 64", "32 x 48", 6),
        ({"num_attention_heads": 8}, f"{ATTENTION}.o_proj.weight", "32 x 64", "32 x 128", 4),
        ({"num_key_value_heads": 4}, f"{ATTENTION}.k_proj.weight", "32 x 32", "64 x 32", 4),
    ],
    ids=["hidden", "vocabulary", "mlp", "heads", "kv heads"],
)
def test_a_config_that_contradicts_the_weights(
    folder: Path, changes: dict[str, int], name: str, found: str, wanted: str, count: int
) -> None:
    edit_config(folder, **changes)
    expect(
        ModelSourceError,
        f"{folder / 'config.json'} contradicts the weights: `{name}` is {found} in the file and {wanted} "
        f"by the config (one of {count} that differ): use the config that belongs to these weights.",
        lambda: load_source(folder),
    )


def test_a_config_that_transformers_cannot_read(folder: Path) -> None:
    edit_config(folder, hidden_size="wide")
    with pytest.raises(ModelSourceError) as caught:
        load_source(folder)
    assert str(caught.value).startswith(f"transformers could not load the LlamaForCausalLM in {folder} (")
    assert str(caught.value).endswith("check that config.json belongs to these weights.")
    assert "\n" not in str(caught.value)


def test_no_chat_template(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match="has no chat template"):
        load_source(folder)


def test_a_base_without_a_template_borrows_the_aligned_one(llama: Path, tmp_path: Path) -> None:
    aligned = load_source(llama)
    parent = tiny_llama(tmp_path / "base", seed=1)
    settings = json.loads((parent / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (parent / "tokenizer_config.json").write_text(json.dumps(settings))
    base = load_base(parent, aligned)
    assert base.tokenizer.encode_chat(user("Hi")) == aligned.tokenizer.encode_chat(user("Hi"))
    assert not torch.equal(base.model.lm_head.weight, aligned.model.lm_head.weight)


def test_another_vocabulary(llama: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "base", vocab=280)
    expect(
        VocabularyMismatchError,
        f"The aligned model in {llama} and the base in {other} do not share a vocabulary (300 and 280 "
        "tokens, 280 of them with equal ids): use the parent that the aligned model was trained from.",
        lambda: load_base(other, load_source(llama)),
    )


def test_the_same_tokens_under_other_ids(llama: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(VocabularyMismatchError, match="298 of them with equal ids"):
        check_same_vocabulary(ChatTokenizer.from_folder(llama), ChatTokenizer.from_folder(tmp_path))


def test_a_base_with_a_wider_embedding(llama: Path, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", vocab=320)
    write_tokenizer(base, vocab=300)
    expect(
        VocabularyMismatchError,
        "The aligned model gives 300 logits and the base 320: "
        "use the parent that the aligned model was trained from.",
        lambda: load_base(base, load_source(llama)),
    )


def test_a_tokenizer_larger_than_the_embedding(folder: Path) -> None:
    write_tokenizer(folder, vocab=320)
    expect(
        ModelSourceError,
        f"The tokenizer in {folder} gives ids up to 319 and the model embeds 300 tokens: "
        "use the tokenizer that the model was trained with.",
        lambda: load_source(folder),
    )
