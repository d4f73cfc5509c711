"""Safety heads: against a model with the head's weights at zero, and a head that was planted."""

import copy
from pathlib import Path

import pytest
import torch

from holdfast.chat import user
from holdfast.exporter.source import SourceModel, load_source
from holdfast.prune.heads import attention_output, head_scores, query_heads
from holdfast.prune.scores.ships import head_channels, strongest_heads
from tests.tiny import LINES, tiny_llama, tiny_model


def prompts(source: SourceModel) -> list[list[int]]:
    return [source.tokenizer.encode_chat(user(line)) for line in LINES]


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel", "FalconForCausalLM"]
)
@torch.no_grad()
def test_against_weights_at_zero(tmp_path: Path, architecture: str) -> None:
    source = load_source(tiny_model(tmp_path, architecture))
    found = head_scores(source.model, prompts(source), pad_id=0, batch_size=4)
    heads = query_heads(source.model)
    assert set(found) == {(block, head) for block in range(2) for head in range(heads)}
    block, head = 1, 2
    without = copy.deepcopy(source.model)
    output = attention_output(without, block)
    output.weight[:, head_channels(head, heads, output.in_features)] = 0.0
    divergences = []
    for ids in prompts(source):
        p, q = (
            model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(dim=-1)
            for model in (source.model, without)
        )
        divergences.append(float((p.exp() * (p - q)).sum()))
    expected = sum(divergences) / len(divergences)
    assert expected > 1e-4
    assert found[block, head] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_a_planted_head_is_found(tmp_path: Path) -> None:
    """All heads but one whisper."""
    source = load_source(tiny_llama(tmp_path))
    for block in range(2):
        attention_output(source.model, block).weight.mul_(0.01)
    attention_output(source.model, 0).weight[:, head_channels(3, 4, 64)] *= 200.0
    scores = head_scores(source.model, prompts(source), pad_id=0, batch_size=4)
    assert strongest_heads(scores, 1) == [(0, 3)]
    assert scores[0, 3] > 10 * sorted(scores.values())[-2]
