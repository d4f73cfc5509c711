"""The settings of the reference pairs, by name."""

from __future__ import annotations

import dataclasses

from reference import data, modeling


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides a run's outcome, besides the banks and the data files.

    The defaults are the first pair's. A pair without dpo steps is aligned by sft alone.
    """

    seed: int = 20240
    prompts: int = 60000
    harmful_frac: float = data.HARMFUL_FRAC
    batch: int = 96
    pair_batch: int = 32
    base_steps: int = 600
    sft_steps: int = 1900
    dpo_steps: int = 80
    reward_steps: int = 110
    base_rate: float = 2e-3
    sft_rate: float = 1e-3
    dpo_rate: float = 2e-5
    reward_rate: float = 2e-4
    decay: float = 0.1
    beta: float = 0.1
    dpo_sft_weight: float = 1.0
    threads: int = 2
    family: str = "llama"
    vocabulary: int = modeling.VOCABULARY
    hidden_size: int = modeling.SHAPE["hidden_size"]
    num_hidden_layers: int = modeling.SHAPE["num_hidden_layers"]
    num_attention_heads: int = modeling.SHAPE["num_attention_heads"]
    num_key_value_heads: int = modeling.SHAPE["num_key_value_heads"]
    intermediate_size: int = modeling.SHAPE["intermediate_size"]

    def shape(self) -> dict[str, int]:
        """Return the model's dimensions."""
        return {name: getattr(self, name) for name in modeling.SHAPE}


PAIRS = {
    "first": Settings(),
    "second": Settings(
        seed=71077,
        harmful_frac=0.40,
        batch=64,
        base_steps=400,
        sft_steps=700,
        dpo_steps=0,
        reward_steps=0,
        base_rate=4e-3,
        sft_rate=1e-3,
        decay=0.0,
        threads=2,
        family="qwen2",
        vocabulary=2048,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=512,
    ),
}
