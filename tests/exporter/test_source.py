"""Model folders: what loads, and the exact sentence for what does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.chat import ChatTokenizer, user
from holdfast.errors import (
    HoldfastError,
    ModelSourceError,
    TokenizerError,
    UnsupportedArchitectureError,
    VocabularyMismatchError,
)
from holdfast.exporter.source import (
    check_same_vocabulary,
    load_base,
    load_source,
    save_source,
    source_digests,
)
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


def drop_tensor(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_loads_frozen_float32_in_eval_mode(llama: Path) -> None:
    source = load_source(llama)
    assert source.architecture == "LlamaForCausalLM"
    assert {parameter.dtype for parameter in source.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in source.model.parameters())
    assert not source.model.training
    assert source.tokenizer.encode_chat(user("Hello"))[-1] == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_the_same_values_in_float32(folder: Path, dtype: torch.dtype) -> None:
    tensors = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, dtype=str(dtype).removeprefix("torch."))
    state = load_source(folder).model.state_dict()
    assert all(torch.equal(state[name], value.float()) for name, value in tensors.items())


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
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}, "auto_map"),
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


def test_a_quantized_checkpoint(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    expect(
        ModelSourceError,
        f"{folder / 'config.json'} describes a model that is quantized already (`quantization_config`): "
        "start from the full-precision checkpoint.",
        lambda: load_source(folder),
    )


def test_an_unsupported_architecture_names_the_supported_ones(folder: Path) -> None:
    edit_config(folder, architectures=["T5ForConditionalGeneration"])
    expect(
        UnsupportedArchitectureError,
        "Architecture `T5ForConditionalGeneration` is not supported: expected one of LlamaForCausalLM, "
        "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM, GraniteForCausalLM, "
        "Phi3ForCausalLM.",
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


def test_an_adapter_is_not_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    expect(
        ModelSourceError,
        f"{folder} holds a PEFT adapter, not a whole model: merge it (`merge_and_unload`) and save the "
        "merged model.",
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


def test_missing_tensors(folder: Path) -> None:
    drop_tensor(folder, "model.layers.1.mlp.up_proj.weight")
    expect(
        ModelSourceError,
        f"The weights in {folder} lack 1 tensors that LlamaForCausalLM needs "
        "(the first is `model.layers.1.mlp.up_proj.weight`): "
        "use the complete checkpoint of that architecture.",
        lambda: load_source(folder),
    )


def test_tensors_that_nobody_asked_for(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(ModelSourceError, match="have 9 tensors that LlamaForCausalLM does not know"):
        load_source(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=48)
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
