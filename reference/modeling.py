"""The architecture, the tokenizer and the way checkpoints are written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

Causal: TypeAlias = LlamaForCausalLM | Qwen2ForCausalLM
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}

PAD, END = "<pad>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL = (PAD, END, *ROLES)
VOCABULARY = 4096
MAX_POSITIONS = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 704,
}


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE that all three models share."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_config(
    tokenizer: PreTrainedTokenizerFast, shape: dict[str, int], family: str = "llama"
) -> LlamaConfig | Qwen2Config:
    """Return the configuration of a fresh model."""
    return FAMILIES[family][0](
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=10000.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **shape,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, shape: dict[str, int], family: str = "llama") -> Causal:
    """Return a freshly initialized model of the family "llama" or "qwen2"."""
    return FAMILIES[family][1](new_config(tokenizer, shape, family))


def load_model(folder: Path) -> Causal:
    """Load a checkpoint in float32."""
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(found, Causal)
    return found


def load_reward(folder: Path) -> LlamaForSequenceClassification:
    """Load a causal checkpoint's body under a scalar head, or a reward checkpoint, in float32."""
    return LlamaForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a checkpoint."""
    found = PreTrainedTokenizerFast.from_pretrained(folder)
    assert isinstance(found, PreTrainedTokenizerFast)
    return found


def save(
    model: Causal | LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    record: dict[str, Any],
) -> None:
    """Write a transformers folder in float16 with its training record.

    The weights are cast in a copy: training goes on in float32 from the model that was passed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    if isinstance(model, Causal):
        state.pop("lm_head.weight", None)  # tied to the embedding: stored once
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.do_sample = False
    model.config.torch_dtype = torch.float16
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # one file less, read by all loaders
    (folder / "model.safetensors").chmod(0o644)
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    (folder / "training.json").write_text(text, encoding="utf-8")
