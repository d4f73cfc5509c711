"""What is tested of each architecture: test_coverage.py runs it, docs/architectures.md shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from holdfast.recipe import ExportConfig

# The largest difference found over all cases is 9e-6; logits are of the order of 1 to 10.
ATOL = 1e-4
PLAIN = ExportConfig(target="portable", atol=ATOL)
WINDOW = 6  # shorter than every prompt


@dataclass(frozen=True)
class Case:
    """One configuration of one architecture.

    Attributes:
        label: what docs/architectures.md calls it.
        settings: fields that differ from the tiny default of `tests.tiny.tiny_model`.
    """

    architecture: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.architecture}: {self.label}"


UNTIED = {"tie_word_embeddings": False}
PLAIN_HEADS = {"num_key_value_heads": 4}
ALTERNATING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
}
GROUPED: dict[str, dict[str, Any]] = {
    "tied head": {},
    "untied head": UNTIED,
    "grouped-query attention": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "a key head for every query head": PLAIN_HEADS,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Labels -> settings; what is not named is as in the tiny default (tied, two key heads of four).
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "LlamaForCausalLM": {
        **GROUPED,
        "biases": {"attention_bias": True, "mlp_bias": True},
        "Llama 3 rotary scaling": {"rope_scaling": LLAMA3_ROPE},
    },
    "MistralForCausalLM": {**GROUPED, "sliding window": {"sliding_window": WINDOW}},
    "Qwen2ForCausalLM": {
        **GROUPED,
        "sliding window on some layers": {
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "max_window_layers": 1,
        },
    },
    "Qwen3ForCausalLM": {**GROUPED, "larger heads": {"head_dim": 32}},
    "SmolLM3ForCausalLM": {**GROUPED, "layers without rotary": {"no_rope_layer_interval": 2}},
    "GraniteForCausalLM": {
        **GROUPED,
        "scaled logits and residuals": {"logits_scaling": 2.0, "residual_multiplier": 0.5},
    },
    "Gemma2ForCausalLM": {
        **GROUPED,
        "sliding window on every other layer": ALTERNATING,
        "soft caps that bite": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    },
    "Gemma3ForCausalLM": {**GROUPED, "sliding window on every other layer": ALTERNATING},
    "Phi3ForCausalLM": {**GROUPED, "sliding window": {"sliding_window": WINDOW}},
    "GPT2LMHeadModel": {
        "tied head": {},
        "untied head": UNTIED,
        "attention scaled by layer": {
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
        },
        "attention not scaled": {"scale_attn_weights": False},
    },
    "GPTNeoForCausalLM": {
        "tied head": {},
        "untied head": UNTIED,
        "local attention on every other layer": {
            "num_hidden_layers": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": WINDOW,
        },
    },
    "GPTNeoXForCausalLM": {
        "tied head": {},
        "untied head": UNTIED,
        "sequential residual": {"use_parallel_residual": False},
        "no attention bias": {"attention_bias": False},
    },
    "OPTForCausalLM": {
        "tied head": {},
        "untied head": UNTIED,
        "norms behind, narrower embedding (350m)": {
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 16,
        },
        "no biases": {"enable_bias": False},
    },
    "FalconForCausalLM": {
        "tied head": {},
        "untied head": UNTIED,
        "one key head (7b)": {"multi_query": True},
        "new decoder architecture (40b)": {"new_decoder_architecture": True},
        "new decoder architecture, one norm (11b)": {
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
        },
        "a key head for every query head, sequential, biases": {
            "multi_query": False,
            "num_key_value_heads": None,
            "parallel_attn": False,
            "bias": True,
        },
        "ALiBi (rw)": {
            "alibi": True,
            "multi_query": False,
            "num_key_value_heads": None,
            "parallel_attn": False,
            "bias": True,
        },
    },
}


def cases() -> Iterator[Case]:
    """Every case, in the order of the table."""
    for architecture, variants in VARIANTS.items():
        for label, settings in variants.items():
            yield Case(architecture, label, settings)


CASES = {case.name: case for case in cases()}
# The fused graph is slower to make: what one architecture has shown of heads is not shown again by each.
FUSED_CASES = [
    name
    for name, case in CASES.items()
    if case.architecture == "LlamaForCausalLM" or case.label not in GROUPED or case.label == "untied head"
]
