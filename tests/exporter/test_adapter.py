"""Adapters: merged logits are peft's own, and what cannot be merged is refused with a reason."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from holdfast.chat import ChatTokenizer
from holdfast.errors import HoldfastError, MissingExtraError, ModelSourceError, UsageError
from holdfast.exporter.source import load_base, load_source, save_source, source_digests
from tests.tiny import tiny_llama, write_tokenizer

pytest.importorskip("peft")
import peft

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(24).unsqueeze(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


def train(base: Path, folder: Path, config: Any) -> torch.Tensor:
    """Save a random adapter into `folder`; gives the logits that peft computes with it, unmerged."""
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    edit(folder, auto_mapping=None)
    return logits(model.eval())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=IDS).logits
    return values


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings})


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    train(base, tmp_path / "adapter", lora())
    return tmp_path / "adapter"


def expect(kind: type[HoldfastError], sentence: str, call: Callable[[], object]) -> None:
    with pytest.raises(HoldfastError) as caught:
        call()
    assert type(caught.value) is kind
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_dora=True),
        lora(use_rslora=True, bias="all"),
        lora(target_modules=["q_proj", "embed_tokens"]),
        lora(modules_to_save=["lm_head"]),
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        lora(trainable_token_indices=[1, 2, 5]),
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=4, target_modules=TARGETS),
        peft.LoKrConfig(r=4, target_modules=TARGETS),
        peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
    ],
    ids=["lora", "dora", "rslora", "embed", "head", "tied", "tokens", "ia3", "loha", "lokr", "oft"],
)
@pytest.mark.filterwarnings("ignore")  # peft's advice on tied weights
def test_merged_logits_are_those_of_peft(base: Path, tmp_path: Path, config: Any) -> None:
    expected = train(base, tmp_path / "adapter", config)
    source = load_source(tmp_path / "adapter")
    assert type(source.model) is LlamaForCausalLM
    assert not torch.allclose(logits(load_source(base).model), expected, atol=0.1)
    torch.testing.assert_close(logits(source.model), expected, atol=1e-5, rtol=0)
    save_source(source, tmp_path / "merged")
    again = load_source(tmp_path / "merged")
    assert torch.equal(logits(again.model), logits(source.model))
    assert again.tokenizer.digest() == source.tokenizer.digest()


def test_a_first_use_of_peft_does_not_import_neural_compressor(adapter: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from holdfast.exporter.source import load_source; "
        f"load_source(Path({str(adapter)!r})); print('neural_compressor' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("False\n", "")


def test_origins_and_digests_name_adapter_and_base(base: Path, adapter: Path) -> None:
    source = load_source(adapter)
    assert [origin.folder for origin in source.origins] == [adapter, base]
    expected = {f"base/{name}": digest for name, digest in source_digests(base).items()}
    own = source_digests(adapter)
    assert set(own) == {"adapter_config.json", "adapter_model.safetensors"}
    assert source_digests(source) == {**own, **expected}


def test_without_a_tokenizer_the_base_lends_its_own(base: Path, adapter: Path) -> None:
    source = load_source(adapter)
    assert source.folder == base
    assert source.tokenizer.digest() == ChatTokenizer.from_folder(base).digest()


def test_the_adapter_s_tokenizer_comes_first_and_its_stop_token_is_added(
    adapter: Path, tmp_path: Path
) -> None:
    write_tokenizer(adapter)
    path = adapter / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "eos_token": "<|user|>", "chat_template": "{{ 'mine' }}"}
    path.write_text(json.dumps(settings))
    source = load_source(adapter)
    assert source.folder == adapter
    assert source.tokenizer.template == "{{ 'mine' }}"
    assert source.tokenizer.eos_ids == (1, 3)
    save_source(source, tmp_path / "merged")
    assert load_source(tmp_path / "merged").tokenizer.digest() == source.tokenizer.digest()


def test_a_base_of_the_user_s_choice(base: Path, adapter: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    edit(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    expect(
        ModelSourceError,
        f"The base that {adapter / 'adapter_config.json'} names cannot be used, give another with "
        f"--adapter-base: The base model of the adapter folder {tmp_path / 'gone'} does not exist: give "
        "the path of a Hugging Face model, or its hub name (owner/name).",
        lambda: load_source(adapter),
    )
    assert load_source(adapter, base_of_adapter=str(moved)).origins[1].folder == moved


def test_an_adapter_can_be_the_unaligned_base(base: Path, adapter: Path) -> None:
    aligned = load_source(base)
    assert not torch.equal(logits(load_base(adapter, aligned).model), logits(aligned.model))


def test_an_adapter_that_names_no_base(adapter: Path) -> None:
    edit(adapter, base_model_name_or_path=None)
    expect(
        ModelSourceError,
        f"{adapter / 'adapter_config.json'} names no `base_model_name_or_path`: give the model that the "
        "adapter was trained on with --adapter-base.",
        lambda: load_source(adapter),
    )


def test_a_base_for_what_is_no_adapter(base: Path) -> None:
    expect(
        UsageError,
        f"{base} is no adapter, and was given the base gpt2: leave out --adapter-base.",
        lambda: load_source(base, base_of_adapter="gpt2"),
    )


def test_an_adapter_of_an_adapter(adapter: Path) -> None:
    expect(
        ModelSourceError,
        f"{adapter} holds a PEFT adapter, not a whole base model of the adapter: merge it "
        "(`merge_and_unload`) and save the merged model.",
        lambda: load_source(adapter, base_of_adapter=str(adapter)),
    )


def test_an_adapter_beside_a_model_is_ambiguous(base: Path, adapter: Path) -> None:
    shutil.copytree(base, adapter, dirs_exist_ok=True)
    expect(
        ModelSourceError,
        f"{adapter} holds a PEFT adapter beside a whole model: move adapter_config.json and its weights to "
        "a folder of their own.",
        lambda: load_source(adapter),
    )


def test_without_peft(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expect(
        MissingExtraError,
        f"The adapter in {adapter} needs peft, not installed here: run `pip install 'holdfast[adapters]'`.",
        lambda: load_source(adapter),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}},
        {"megatron_config": {}, "megatron_core": "evil"},
    ],
    ids=["auto_mapping", "megatron_config"],
)
def test_an_adapter_that_could_import_code(adapter: Path, changes: dict[str, Any]) -> None:
    edit(adapter, **changes)
    expect(
        ModelSourceError,
        f"{adapter / 'adapter_config.json'} has the key `{next(iter(changes))}`, through which an adapter "
        "can import code: set it to null if you trust where the adapter comes from.",
        lambda: load_source(adapter),
    )


@pytest.mark.parametrize("key", ["auto_map", "_private", "trust_remote_code"])
def test_keys_refused_in_a_model_are_refused_in_an_adapter(adapter: Path, key: str) -> None:
    edit(adapter, **{key: {"nested": True}})
    expect(
        ModelSourceError,
        f"{adapter / 'adapter_config.json'} has the key `{key}`, through which a model folder can run code "
        "or load other files: remove it if you trust where the model comes from.",
        lambda: load_source(adapter),
    )


def test_a_setting_that_this_peft_would_ignore(adapter: Path) -> None:
    edit(adapter, invented_scaling=2.0)
    expect(
        ModelSourceError,
        f"{adapter / 'adapter_config.json'} has the key `invented_scaling`, which peft {peft.__version__} "
        "does not know: install the peft that wrote it, or give a merged model.",
        lambda: load_source(adapter),
    )


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "ADALORA", None])
def test_a_kind_that_is_not_merged(adapter: Path, kind: str | None) -> None:
    edit(adapter, peft_type=kind)
    expect(
        ModelSourceError,
        f"{adapter / 'adapter_config.json'} describes an adapter of the kind {kind!r}, and only LORA, "
        "LOHA, LOKR, IA3, OFT can be merged into a model: give a merged model.",
        lambda: load_source(adapter),
    )


def test_an_adapter_whose_merging_would_change_the_answers(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path, lora(layer_replication=[[0, 2], [0, 2]]))
    with pytest.raises(ModelSourceError) as caught:
        load_source(tmp_path)
    assert str(caught.value).startswith(f"Merging the adapter in {tmp_path} changes the logits by ")
    assert str(caught.value).endswith("of the largest (allowed 1e-03): give a merged model.")


def test_pickled_adapters_are_never_opened(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    expect(
        ModelSourceError,
        f"{adapter} holds its adapter as a pickle (adapter_model.bin), which can run code when opened: "
        "convert it to safetensors (`save_pretrained(safe_serialization=True)`).",
        lambda: load_source(adapter),
    )


def test_an_adapter_without_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    expect(
        ModelSourceError,
        f"Expected adapter_model.safetensors in {adapter}, found none: copy the whole adapter.",
        lambda: load_source(adapter),
    )


def test_a_truncated_adapter(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelSourceError, match="is not a complete safetensors file"):
        load_source(adapter)


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    """Apply `change` to the adapter's tensors; gives the name of the first one as it was."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    change(tensors)
    save_file(tensors, path)
    return first


def test_an_adapter_with_infinite_values(adapter: Path) -> None:
    first = change_tensors(adapter, lambda tensors: tensors[min(tensors)].fill_(torch.inf))
    expect(
        ModelSourceError,
        f"`{first}` in {adapter / 'adapter_model.safetensors'} has values that are not finite: use an "
        "adapter whose training did not diverge.",
        lambda: load_source(adapter),
    )


def test_an_adapter_that_lacks_a_tensor(adapter: Path) -> None:
    first = change_tensors(adapter, lambda tensors: tensors.pop(min(tensors)))
    expect(
        ModelSourceError,
        f"The adapter in {adapter} lacks 1 tensors that its config asks for on this base (the first is "
        f"`{first.removesuffix('.weight')}.default.weight`): copy the whole adapter, or give the base that "
        "it was trained on with --adapter-base.",
        lambda: load_source(adapter),
    )


def test_an_adapter_of_a_deeper_base(adapter: Path) -> None:
    change_tensors(
        adapter,
        lambda tensors: tensors.update(
            {name.replace("layers.1", "layers.7"): value.clone() for name, value in tensors.items()}
        ),
    )
    with pytest.raises(
        ModelSourceError, match="has 6 tensors that its config does not ask for on this base"
    ):
        load_source(adapter)


def test_an_adapter_of_a_wider_base(adapter: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", kv_heads=4)
    with pytest.raises(ModelSourceError) as caught:
        load_source(adapter, base_of_adapter=str(other))
    assert str(caught.value).startswith(
        f"peft could not merge the adapter in {adapter} into a LlamaForCausalLM"
    )
    assert str(caught.value).endswith("or the base that it was trained on with --adapter-base.")
    assert "\n" not in str(caught.value)
