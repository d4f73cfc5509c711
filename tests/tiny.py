"""Tiny random models of the real classes, as complete Hugging Face folders, without a download."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LINES = (
    "How do I bake a loaf of bread with a crisp crust at home?",
    "I cannot help with that, but I can explain how to stay safe.",
    "Sure, here is a short answer: mix the flour, the water and the salt, then wait.",
    "What is the capital of the country where the river begins?",
    "The meeting was moved to Thursday because the train was late again.",
    "Write a short poem about the sea, the wind and an old harbour town.",
)


@cache
def tiny_tokenizer(vocab: int = 300) -> Tokenizer:
    """Byte-level BPE with exactly `vocab` entries (at least 260), trained on `LINES`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"the training lines give {tokenizer.get_vocab_size()} entries, not {vocab}")
    return tokenizer


def write_tokenizer(folder: Path, *, vocab: int = 300) -> None:
    """tokenizer.json and tokenizer_config.json with a chat template, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(vocab).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


# What a class calls a field of the tiny default; None where it has no such field.
FIELDS: dict[str, dict[str, str | None]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "num_key_value_heads": None,
        "head_dim": None,
    },
    "gpt_neo": {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": None,
        "head_dim": None,
    },
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "phi3": {"head_dim": None},
    "opt": {
        "intermediate_size": "ffn_dim",
        "initializer_range": "init_std",
        "num_key_value_heads": None,
        "head_dim": None,
    },
    "falcon": {
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": None,
    },
    **{
        name: {"num_key_value_heads": None, "head_dim": None}
        for name in ("bert", "roberta", "xlm-roberta", "deberta-v2", "modernbert")
    },
}
# What a class needs besides, or has a large default for. Without a `head_dim` of its own, the hidden size
# is what gives heads of 16.
EXTRA: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "gpt2": {"hidden_size": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gpt_neox": {"hidden_size": 64, "rotary_pct": 0.5},
    "phi3": {"hidden_size": 64},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2},
}
ZERO_CENTRED_NORMS = ("gemma2", "gemma3_text")  # they multiply by 1 + weight


def tiny_model(folder: Path, architecture: str, *, seed: int = 0, **settings: Any) -> Path:
    """A random model of any supported class, saved with its tokenizer.

    Arguments:
        architecture: class name, for example `MistralForCausalLM`.
        settings: fields of the model's config that differ from the tiny default, as the class or as
            Llama calls them.

    Weights are drawn wide (std 0.15 instead of 0.02), so that logits differ between tokens and a
    wrong graph cannot pass for a right one.
    """
    model_class = getattr(transformers, architecture)
    kind = model_class.config_class.model_type
    defaults: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,  # what ONNX Runtime's attention kernels take; not hidden_size / heads
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 3,
        "pad_token_id": 0,
        **EXTRA.get(kind, {}),
    }
    names = FIELDS.get(kind, {})
    merged = {
        name: value
        for key, value in {**defaults, **settings}.items()
        if (name := names.get(key, key)) is not None
    }
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**merged)).eval()
    _randomise_norms_and_biases(model, norm_centre=0.0 if kind in ZERO_CENTRED_NORMS else 1.0)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = 3
        model.generation_config.pad_token_id = 0
    model.save_pretrained(folder, safe_serialization=True)
    write_tokenizer(folder, vocab=merged["vocab_size"])
    return folder


def tiny_llama(
    folder: Path, *, seed: int = 0, tied: bool = True, kv_heads: int = 2, vocab: int = 300
) -> Path:
    """A 2-layer Llama with hidden size 32 and 4 heads of 16; see `tiny_model`."""
    return tiny_model(
        folder,
        "LlamaForCausalLM",
        seed=seed,
        tie_word_embeddings=tied,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
    )


def _randomise_norms_and_biases(model: torch.nn.Module, *, norm_centre: float) -> None:
    """Norms around neutral and biases around 0: exactly there a lost one would go unseen."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            centre = 0.0 if name.endswith("bias") else norm_centre
            parameter.data = centre + 0.2 * torch.randn_like(parameter)
