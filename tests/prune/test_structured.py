"""Heads, channels and blocks removed for real: the same logits where nothing was lost, and refusals."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from holdfast.errors import PruneError
from holdfast.exporter.architectures import ROWS, row_of
from holdfast.exporter.export import export_source
from holdfast.exporter.source import load_source, save_source
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.files import to_json
from holdfast.prune.structured.heads import keep_heads
from holdfast.prune.structured.layouts import LAYOUTS, layout_of, shape_of
from holdfast.prune.structured.plan import Kind, StructuredPlan, plan_structured
from holdfast.prune.structured.remove import model_size, remove, report_removed
from holdfast.prune.structured.scores import (
    StructureScores,
)
from holdfast.recipe import ExportConfig
from tests.prune.structures import (
    WITH_HEADS,
    four_blocks,
    logits,
    prompts,
    scores_of,
    silence,
    some_plan,
    tiny,
)


def test_every_architecture_has_a_layout() -> None:
    assert set(LAYOUTS) == set(ROWS)


@pytest.mark.parametrize("architecture", sorted(ROWS))
def test_silent_structures_leave_without_a_trace(tmp_path: Path, architecture: str) -> None:
    """Blocks, channels and, where a config can say it, heads at once; cached answers are the same."""
    source = four_blocks(tmp_path, architecture)
    heads = 2 if layout_of(source.model).head_readers else None
    counts = {"channels": 24, "blocks": 3} | ({} if heads is None else {"heads": heads})
    plan = some_plan(source, **counts)
    assert len(set(plan.channels)) == 3
    silence(source, plan)
    expected, before = logits(source), {k: v.clone() for k, v in source.model.state_dict().items()}
    smaller = remove(source, plan)
    torch.testing.assert_close(logits(smaller), expected, rtol=0, atol=1e-5)
    found = shape_of(smaller.model)
    assert (found.blocks, found.channels, found.heads) == (3, 24, heads or 4)
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())
    answers = [
        TorchLanguageModel(model.model, model.tokenizer, "").generate(prompts(source)[:3], max_new_tokens=6)
        for model in (source, smaller)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("architecture", WITH_HEADS)
@pytest.mark.parametrize("left", [(6, 3), (4, 4), (1, 1)])
def test_silent_heads_on_any_legal_groups(tmp_path: Path, architecture: str, left: tuple[int, int]) -> None:
    settings = {"hidden_size": 64} if architecture == "Phi3ForCausalLM" else {}
    source = tiny(tmp_path, architecture, num_attention_heads=8, num_key_value_heads=4, **settings)
    draw = torch.Generator().manual_seed(1)
    heads = tuple(keep_heads(torch.rand(8, generator=draw).double(), 4, left) for _ in range(2))
    plan = StructuredPlan((0, 1), heads, (tuple(range(64)),) * 2)
    silence(source, plan)
    smaller = remove(source, plan)
    torch.testing.assert_close(logits(smaller), logits(source), rtol=0, atol=1e-5)
    config = smaller.model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == left
    assert config.head_dim == (8 if architecture == "Phi3ForCausalLM" else 16)


@pytest.mark.parametrize("architecture", sorted(ROWS))
def test_what_is_saved_loads_as_an_ordinary_model(tmp_path: Path, architecture: str) -> None:
    source = four_blocks(tmp_path, architecture)
    counts = {"heads": 2} if layout_of(source.model).head_readers else {}
    smaller = remove(source, some_plan(source, channels=40, blocks=2, **counts))
    save_source(smaller, tmp_path / "smaller")
    assert torch.equal(logits(load_source(tmp_path / "smaller")), logits(smaller))
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "smaller", dtype=torch.float32, attn_implementation=row_of(source.model).attention
    )
    assert type(plain) is type(source.model)
    other = dataclasses.replace(smaller, model=plain.eval())
    torch.testing.assert_close(logits(other), logits(smaller), rtol=0, atol=1e-4)
    assert not (logits(smaller) - logits(source)).abs().max() < 0.1


def test_untied_heads_and_generation_settings_stay(tmp_path: Path) -> None:
    source = tiny(tmp_path, tie_word_embeddings=False)
    smaller = remove(source, some_plan(source, channels=32)).model
    assert smaller.lm_head.weight is not smaller.model.embed_tokens.weight
    assert torch.equal(smaller.lm_head.weight, source.model.lm_head.weight)
    assert smaller.generation_config.to_dict() == source.model.generation_config.to_dict()
    assert not smaller.training
    assert not any(parameter.requires_grad for parameter in smaller.parameters())


def test_nothing_is_shared_with_the_source(tmp_path: Path) -> None:
    """Recovery trains the smaller model, with the source as its reference."""
    source = tiny(tmp_path)
    smaller = remove(source, some_plan(source))
    expected = logits(source)
    for parameter in smaller.model.parameters():
        parameter.add_(1.0)
    smaller.model.generation_config.max_new_tokens = 7
    assert torch.equal(logits(source), expected)
    assert source.model.generation_config.max_new_tokens != 7


def test_the_exported_graph_is_smaller_and_proved(tmp_path: Path) -> None:
    source = tiny(tmp_path, num_hidden_layers=3)
    smaller = remove(source, some_plan(source, heads=2, channels=32, blocks=2))
    reports = []
    for name, model in (("before", source), ("after", smaller)):
        (tmp_path / name).mkdir()
        reports.append(export_source(model, tmp_path / name, ExportConfig(atol=2e-5)))
    before, after = reports
    assert after.graph.form == "fused"
    lost = model_size(source.model).bytes - model_size(smaller.model).bytes
    assert before.graph_bytes - after.graph_bytes >= lost
    assert "model.layers.2.mlp.up_proj" not in after.modules
    assert after.modules["model.layers.1.mlp.down_proj"].shape == (32, 32)


ALL = ("heads", "channels", "blocks")


@pytest.mark.parametrize(
    ("kinds", "frac", "within"),
    [
        (("heads",), 0.25, 0.1),
        (("channels",), 0.1, 0.03),
        (("channels",), 0.25, 0.03),
        (("blocks",), 0.25, 1 / 6),
        (("blocks",), 0.7, 1 / 6),
        *((ALL, frac, 0.03) for frac in (0.1, 0.25, 0.5, 0.7)),
    ],
)
def test_the_share_reached(tmp_path: Path, kinds: tuple[Kind, ...], frac: float, within: float) -> None:
    """Eight heads on four, 100 channels, six blocks: never more than asked, and near it."""
    settings = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 100}
    source = tiny(tmp_path, "Qwen2ForCausalLM", num_hidden_layers=6, **settings)
    draw = torch.Generator().manual_seed(3)
    sizes = ((6, 8), (6, 100), (6,))
    scores = StructureScores(*(torch.rand(size, generator=draw).double() for size in sizes))
    plan = plan_structured(source, scores, sparsity_frac=frac, kinds=kinds, channel_multiple=8)
    smaller = remove(source, plan)
    report = report_removed(source, smaller, plan)
    assert report.asked_frac == frac
    assert frac - within < report.reached_frac <= frac + 1e-9
    left = shape_of(smaller.model)
    assert left.blocks == 6 or "blocks" in kinds
    assert left.heads == 8 or "heads" in kinds
    assert left.channels == 100 or ("channels" in kinds and left.channels % 8 == 0)
    assert len(report.removed_blocks) == 6 - left.blocks
    assert report.after.bytes == 4 * report.after.parameters
    assert report.before.parameters - report.after.parameters == (
        report.before.block_parameters - report.after.block_parameters
    )


def test_nothing_asked_removes_nothing(tmp_path: Path) -> None:
    source = tiny(tmp_path)
    plan = plan_structured(source, scores_of(source), sparsity_frac=0.0, kinds=("channels",))
    smaller = remove(source, plan)
    assert torch.equal(logits(smaller), logits(source))
    assert report_removed(source, smaller, plan).reached_frac == 0.0


def test_the_cheaper_kind_goes(tmp_path: Path) -> None:
    """A block is 4 heads of 2048 weights, 64 channels of 96 and 64 in norms. Of 30 %, two heads take 28.4 %
    and 40 channels 26.7 %, near enough to each other for the scores to decide."""
    source = tiny(tmp_path, num_attention_heads=4, num_key_value_heads=4)
    scores = scores_of(source)
    request = {"sparsity_frac": 0.3, "kinds": ("heads", "channels"), "channel_multiple": 8}
    cheap_heads = dataclasses.replace(scores, heads=scores.heads * 1e-6)
    plan = plan_structured(source, cheap_heads, **request)
    assert (len(plan.heads[0]), len(plan.channels[0])) == (2, 64)
    cheap_channels = dataclasses.replace(scores, channels=scores.channels * 1e-6)
    plan = plan_structured(source, cheap_channels, **request)
    assert (len(plan.heads[0]), len(plan.channels[0])) == (4, 24)


def test_the_record_is_plain_data(tmp_path: Path) -> None:
    source = tiny(tmp_path, num_hidden_layers=3)
    plan = StructuredPlan((0, 2), ((0, 2), (2, 3)), (tuple(range(62)), tuple(range(2, 64))))
    with pytest.raises(PruneError, match="as many heads and channels"):
        remove(source, plan)
    plan = dataclasses.replace(plan, heads=((0, 1), (2, 3)))
    report = report_removed(source, remove(source, plan), plan)
    record = json.loads(to_json(dataclasses.asdict(report)))
    assert record["removed_blocks"] == [1]
    assert record["removed"] == {
        "0": {"heads": [2, 3], "kv_heads": [1], "channels": [62, 63]},
        "2": {"heads": [0, 1], "kv_heads": [0], "channels": [0, 1]},
    }
    assert record["before"]["blocks"] == 3 and record["after"]["blocks"] == 2
    assert record["after"]["head_dim"] == 16
    # one block: q and o 2 * 64 * 32, k and v 2 * 32 * 32, MLP 3 * 64 * 32, norms 2 * 32
    assert record["before"]["block_parameters"] == 3 * (4096 + 2048 + 6144 + 64)
    assert record["after"]["block_parameters"] == 2 * (2048 + 1024 + 3 * 62 * 32 + 64)
    assert record["reached_frac"] == pytest.approx(1 - 18176 / 37056)


@pytest.mark.parametrize(
    ("architecture", "counts", "message"),
    [
        (
            "GPT2LMHeadModel",
            {"heads": 3},
            "GPT2LMHeadModel makes a head hidden size / heads wide, so that its config cannot say 3 of 4 "
            "heads: all 4 have to stay, remove channels or blocks.",
        ),
        (
            "LlamaForCausalLM",
            {"heads": 3},
            "This LlamaForCausalLM has 4 query heads on 2 key-value heads and cannot keep 3: each "
            "key-value head needs the same number, so keep 1, 2, 4.",
        ),
        (
            "LlamaForCausalLM",
            {"heads": 0},
            "This LlamaForCausalLM has 4 query heads on 2 key-value heads and cannot keep 0: each "
            "key-value head needs the same number, so keep 1, 2, 4.",
        ),
        (
            "LlamaForCausalLM",
            {"channels": 0},
            "A block of this LlamaForCausalLM has 64 FFN channels and cannot keep 0: keep 1 to 64.",
        ),
        (
            "OPTForCausalLM",
            {"blocks": 0},
            "This OPTForCausalLM has 2 decoder blocks and cannot keep 0: keep 1 to 2.",
        ),
    ],
)
def test_counts_that_cannot_be(
    tmp_path: Path, architecture: str, counts: dict[str, int], message: str
) -> None:
    source = tiny(tmp_path, architecture)
    with pytest.raises(PruneError) as caught:
        some_plan(source, **counts)
    assert str(caught.value) == message


@pytest.mark.parametrize("architecture", sorted(set(LAYOUTS) - set(WITH_HEADS)))
def test_heads_tied_to_the_hidden_size_are_refused(tmp_path: Path, architecture: str) -> None:
    source = tiny(tmp_path, architecture)
    with pytest.raises(PruneError, match=f"{architecture} makes a head hidden size / heads wide"):
        plan_structured(source, scores_of(source), sparsity_frac=0.25, kinds=("heads", "channels"))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"sparsity_frac": 1.0, "kinds": ("channels",)},
            "The share of weights to remove should be at least 0 and below 1, found 1.0: 0.25 removes a "
            "quarter of the decoder blocks' weights.",
        ),
        (
            {"sparsity_frac": -0.1, "kinds": ("channels",)},
            "The share of weights to remove should be at least 0 and below 1, found -0.1: 0.25 removes a "
            "quarter of the decoder blocks' weights.",
        ),
        (
            {"sparsity_frac": math.nan, "kinds": ("channels",)},
            "The share of weights to remove should be at least 0 and below 1, found nan: 0.25 removes a "
            "quarter of the decoder blocks' weights.",
        ),
        (
            {"sparsity_frac": 0.5, "kinds": ("channels",)},
            "Removing channels takes at most 24.9% of the decoder blocks' weights of this "
            "LlamaForCausalLM, because something of every layer has to stay, and 50.0% was asked: "
            "ask for less, or remove other structures as well.",
        ),
        (
            {"sparsity_frac": 0.1, "kinds": ("blocks",)},
            "10.0% of the decoder blocks' weights is less than the smallest step in which this "
            "LlamaForCausalLM can lose blocks: ask for more, or allow smaller structures.",
        ),
        (
            {"sparsity_frac": 0.1, "kinds": ()},
            "Expected one or more of heads, channels, blocks to remove, found nothing.",
        ),
        (
            {"sparsity_frac": 0.1, "kinds": ("rows",)},
            "Expected one or more of heads, channels, blocks to remove, found rows.",
        ),
        (
            {"sparsity_frac": 0.1, "kinds": ("channels",), "channel_multiple": 0},
            "The multiple of FFN channels should be at least 1, found 0.",
        ),
    ],
)
def test_requests_that_cannot_be(tmp_path: Path, request_: dict[str, object], message: str) -> None:
    source = tiny(tmp_path)
    with pytest.raises(PruneError) as caught:
        plan_structured(source, scores_of(source), **request_)
    assert str(caught.value) == message


def test_plans_that_cannot_be(tmp_path: Path) -> None:
    source = tiny(tmp_path)
    channels = (tuple(range(64)),) * 2
    with pytest.raises(PruneError) as caught:
        remove(source, StructuredPlan((0, 1), ((0, 1, 2), (0, 1, 2)), channels))
    assert "cannot keep 3" in str(caught.value)
    source = tiny(tmp_path / "wider", num_attention_heads=9, num_key_value_heads=3)
    with pytest.raises(PruneError) as caught:
        remove(source, StructuredPlan((0, 1), ((0, 1, 3, 4), (0, 1, 2, 3)), channels))
    assert str(caught.value) == (
        "A plan leaves block 1 of this LlamaForCausalLM the query heads 0, 1, 2, 3, which are not equally "
        "many for each of its 2 key-value heads: remove whole groups, or the same number from each."
    )


def test_a_config_that_checks_itself(tmp_path: Path) -> None:
    """Phi-3 compares the factors of its rotary embedding with hidden size / heads."""
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    source = tiny(tmp_path, "Phi3ForCausalLM", rope_scaling=scaling, original_max_position_embeddings=64)
    with pytest.raises(PruneError) as caught:
        remove(source, some_plan(source, heads=2))
    assert str(caught.value) == (
        "transformers' config of this Phi3ForCausalLM cannot say what the plan leaves (`rope_scaling`'s "
        "short_factor field must have length 16, got 8): remove other structures."
    )
    assert shape_of(remove(source, some_plan(source, channels=32)).model).channels == 32


def test_blocks_that_depend_on_their_index_stay(tmp_path: Path) -> None:
    source = tiny(tmp_path, "GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(PruneError) as caught:
        plan_structured(source, scores_of(source), sparsity_frac=0.5, kinds=("blocks",))
    assert str(caught.value) == (
        "This GPT2LMHeadModel has `scale_attn_by_inverse_layer_idx` set to True, so that a block computes "
        "something else at another index and 1 of 2 blocks cannot be kept: remove channels instead."
    )
