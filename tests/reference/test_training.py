"""The training script on a micro configuration: every stage runs, resumes and records itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reference import data, modeling, train
from reference.batches import Encoder, groups

MICRO = [
    *("--prompts", "300", "--batch", "4", "--pair-batch", "2", "--threads", "1"),
    *("--base-steps", "2", "--sft-steps", "2", "--dpo-steps", "2", "--reward-steps", "2"),
    *("--hidden-size", "32", "--num-hidden-layers", "2", "--num-attention-heads", "4"),
    *("--num-key-value-heads", "2", "--intermediate-size", "64"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    train.main(["all", "--out", str(folder / "out"), "--work", str(folder / "work"), *MICRO])
    return folder


def test_all_stages_write_checkpoints(trained: Path) -> None:
    for name in ("base", "aligned"):
        model = modeling.load_model(trained / "out" / name)
        assert model.config.num_key_value_heads == 2
    assert modeling.load_reward(trained / "out" / "reward").score.weight.shape[0] == 1
    record = json.loads((trained / "out" / "aligned" / "training.json").read_text(encoding="utf-8"))
    assert record["stage"] == "dpo" and record["steps"] == 2 and len(record["losses"]) == 2
    assert record["settings"]["hidden_size"] == 32


def test_a_stage_goes_on_where_it_stopped(trained: Path) -> None:
    before = torch.load(trained / "work" / "base.pt", weights_only=True)
    assert before["step"] == 2
    longer = [*MICRO, "--base-steps", "3"]
    train.main(["base", "--out", str(trained / "out"), "--work", str(trained / "work"), *longer])
    after = torch.load(trained / "work" / "base.pt", weights_only=True)
    assert after["step"] == 3
    assert after["losses"][:2] == before["losses"]


def test_encoding_is_what_the_chat_template_renders(trained: Path) -> None:
    tokenizer = modeling.load_tokenizer(trained / "work" / "tokenizer")
    example = data.Example((("system", "Be brief."), ("user", "Hello, how are you?")), "Sure. All is well.")
    encoded = Encoder(tokenizer).encode(example)
    turns = [
        {"role": role, "content": text} for role, text in (*example.messages, ("assistant", example.answer))
    ]
    assert encoded.ids == tokenizer.apply_chat_template(turns)
    assert encoded.ids[: encoded.start] == tokenizer.apply_chat_template(
        turns[:-1], add_generation_prompt=True
    )


def test_every_example_comes_once_an_epoch() -> None:
    found = groups([5, 3, 8, 1, 2, 9, 4], 2, seed=1)
    epoch = [next(found) for _ in range(4)]
    assert sorted(i for group in epoch for i in group) == list(range(7))


def test_weights_cover_the_answer_only() -> None:
    tokenizer = modeling.train_tokenizer(["Sure. How do I paint a fence?"] * 3, 300)
    encoder = Encoder(tokenizer)
    item = encoder.encode(data.Example((("user", "paint?"),), "Sure."))
    batch = encoder.batch([item], 0.0)
    assert not batch.weights[0, : item.start].any()
    assert bool((batch.weights[0, item.start :] > 0).all())
