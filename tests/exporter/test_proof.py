"""The proof: right graphs pass it, and each check fails on a graph that is wrong in that one way."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from transformers import DynamicCache

from holdfast.errors import ExecutionError, ParityError
from holdfast.exporter.parity import open_decoder, torch_step
from holdfast.exporter.proof import examine, prove
from holdfast.exporter.proof_prompts import (
    EFFORTS,
    GREEDY_TOKENS,
    SUITE_PROMPTS,
    effort_for,
    proof_prompts,
    sliding_window,
)
from holdfast.exporter.proof_report import Effort, Proof, proof_lines, read_proof
from holdfast.exporter.source import SourceModel, load_source
from tests.exporter.broken import WRONG, changed, export_fused, export_plain, quirk, scaled
from tests.tiny import tiny_model

ATOL = 2e-5
EFFORT = Effort(
    prompts=4,
    greedy_prompts=2,
    greedy_tokens=6,
    batch_rows=3,
    padded_steps=2,
    step_tokens=8,
    longest_tokens=64,
)
PROMPTS = [[5, 40, 7, 260, 11, 90, 33], [8, 7, 200], list(range(30, 41)), [9, 9, 12, 250, 251]]
CHECKS = [
    "prefill",
    "sliding window",
    "cached steps",
    "greedy tokens",
    "batch",
    "left padding",
    "steps after left padding",
    "right padding",
    "steps behind right padding",
    "steps in place of right padding",
    "token by token",
    "continued from a cache",
    "last logits alone",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    """Heads of 16: GroupQueryAttention rotates no smaller ones."""
    folder = tmp_path_factory.mktemp("llama")
    return load_source(tiny_model(folder, "LlamaForCausalLM", tie_word_embeddings=False, head_dim=16))


@pytest.fixture(scope="module")
def plain(source: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_plain(source, tmp_path_factory.mktemp("plain") / "out")


@pytest.fixture(scope="module")
def fused(source: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_fused(source, tmp_path_factory.mktemp("fused") / "out")


@pytest.fixture(params=["plain", "fused"])
def graph(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def examined(graph: Path, source: SourceModel, atol: float = ATOL, tokens: int = 6) -> Proof:
    return examine(graph, source, PROMPTS, atol=atol, seed=0, greedy_tokens=tokens, effort=EFFORT)


def names(proof: Proof, status: str) -> set[str]:
    return {check.name for check in proof.checks if check.status == status}


def test_a_right_graph_passes(graph: Path, source: SourceModel) -> None:
    proof = prove(graph, source, PROMPTS, atol=ATOL, seed=0, greedy_tokens=6, effort=EFFORT)
    assert [check.name for check in proof.checks] == CHECKS
    assert not proof.failed
    checks = {check.name: check for check in proof.checks}
    assert checks["prefill"].figures["positions"] == sum(map(len, PROMPTS))
    assert 0 < checks["prefill"].figures["max_abs"] < ATOL
    assert 0 <= checks["prefill"].figures["mean_kl_nats"] <= checks["prefill"].figures["max_kl_nats"] < 1e-8
    assert checks["greedy tokens"].figures == {"gap": 0.0, "tokens": 12, "equal": 12, "ties": 0}
    assert checks["greedy tokens"].tolerance == 2 * ATOL
    assert checks["left padding"].figures["positions"] == 3 + 7 + 11 - 3 * 2
    assert proof.prompt_tokens == tuple(map(len, PROMPTS))


def test_what_does_not_apply_says_why(plain: Path, fused: Path, source: SourceModel) -> None:
    notes = {
        kind: {check.name: check.note for check in examined(graph, source).checks if check.note}
        for kind, graph in (("plain", plain), ("fused", fused))
    }
    assert notes == {
        "plain": {
            "sliding window": "the model has none",
            "steps in place of right padding": "the graph appends every token to the end of its cache",
            "last logits alone": "the graph always gives every position",
        },
        "fused": {
            "sliding window": "the model has none",
        },
    }


QUIRKS: dict[str, tuple[Callable[[onnx.GraphProto], None], set[str]]] = {
    "against torch": (quirk(), {"prefill", "cached steps"}),
    "first run": (quirk(("past", "Equal", 0), ("rows", "Equal", 1)), set()),
    "batch": (quirk(("rows", "Greater", 1), ("least", "Equal", 1)), {"batch"}),
    "left": (quirk(("first", "Equal", 0), ("past", "Equal", 0)), {"left padding"}),
    "left, steps": (quirk(("first", "Equal", 0), ("past", "Greater", 0)), {"steps after left padding"}),
    "right": (quirk(("last", "Equal", 0), ("past", "Equal", 0)), {"right padding"}),
    "a token": (
        quirk(("new", "Equal", 1), ("past", "Greater", 0), ("rows", "Equal", 1)),
        {"cached steps", "token by token"},
    ),
    "several tokens": (quirk(("new", "Greater", 1), ("past", "Greater", 0)), {"continued from a cache"}),
}
# A first run that is wrong is wrong against torch and against every other way to run.
EVERYTHING = {
    "prefill",
    "cached steps",
    "batch",
    "left padding",
    "steps after left padding",
    "right padding",
    "token by token",
    "continued from a cache",
}


@pytest.mark.parametrize("name", QUIRKS)
def test_exactly_one_way_to_run_is_wrong(
    graph: Path, source: SourceModel, tmp_path: Path, name: str
) -> None:
    change, expected = QUIRKS[name]
    proof = examined(changed(graph, tmp_path / "wrong", change), source)
    failed = names(proof, "failed") - {"steps behind right padding", "steps in place of right padding"}
    assert failed == (expected or EVERYTHING)
    for check in proof.failed:
        assert check.value == pytest.approx(WRONG, rel=1e-3)
        assert check.tolerance == ATOL


def test_a_step_behind_right_padding(plain: Path, source: SourceModel, tmp_path: Path) -> None:
    hole = quirk(("first", "Equal", 1), ("last", "Equal", 1), ("least", "Equal", 0))
    proof = examined(changed(plain, tmp_path / "wrong", hole), source)
    assert names(proof, "failed") == {"steps behind right padding"}


def test_a_step_in_place_of_right_padding(fused: Path, source: SourceModel, tmp_path: Path) -> None:
    change = quirk(("last", "Equal", 0), ("past", "Greater", 0))
    broken = changed(fused, tmp_path / "wrong", change)
    assert names(examined(broken, source), "failed") == {"steps in place of right padding"}
    with pytest.raises(ParityError, match="torch has no such run to compare with inside"):
        prove(broken, source, PROMPTS, atol=ATOL, seed=0, greedy_tokens=6, effort=EFFORT)


def test_last_logits(fused: Path, source: SourceModel, tmp_path: Path) -> None:
    change = quirk(("kept", "Equal", 1), ("new", "Greater", 1))
    proof = examined(changed(fused, tmp_path / "wrong", change), source)
    assert names(proof, "failed") == {"last logits alone"}


def test_other_tokens(plain: Path, source: SourceModel, tmp_path: Path) -> None:
    """Cached logits upside down: another token at each cached step, and no tie."""
    change = quirk(("new", "Equal", 1), ("past", "Greater", 0), ("rows", "Equal", 1), factor=-1.0)
    proof = examined(changed(plain, tmp_path / "wrong", change), source)
    check = next(check for check in proof.checks if check.name == "greedy tokens")
    assert check.status == "failed"
    assert check.figures["tokens"] - check.figures["equal"] == 2 * 5
    assert check.figures["ties"] == 0
    assert check.value > 1.0
    assert check.note.startswith("first difference at step 1, gap ")


@pytest.mark.parametrize(("tie", "status"), [(True, "ok"), (False, "failed")])
def test_a_tie(plain: Path, source: SourceModel, tmp_path: Path, tie: bool, status: str) -> None:
    """Two tokens that the graph orders the other way round, each by half of what torch puts between them.

    Every logit is within `atol`, and the choice differs: that is what a tie is. At half of that `atol`
    it is none.
    """
    logits = source.model(torch.tensor(PROMPTS[:1])).logits[0, -1]
    first, second = logits.topk(2).indices.tolist()
    distance = float(logits[first] - logits[second])

    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for index, name in enumerate(node.output):
                node.output[index] = "right" if name == "logits" else name
        bump = np.zeros(logits.shape[0], np.float32)
        bump[[first, second]] = np.array([-0.5, 0.5]) * distance * 1.01
        graph.initializer.append(numpy_helper.from_array(bump, "bump"))
        graph.node.append(helper.make_node("Add", ["right", "bump"], ["logits"]))

    broken = changed(plain, tmp_path / "wrong", change)
    atol = distance * 0.51 * (1.0 if tie else 0.5)
    proof = examine(broken, source, PROMPTS[:1], atol=atol, seed=0, greedy_tokens=1, effort=EFFORT)
    check = next(check for check in proof.checks if check.name == "greedy tokens")
    assert bool(proof.failed) is not tie
    assert check.status == status
    assert check.figures["ties"] == int(tie)
    assert check.value == pytest.approx(distance, abs=1e-5)
    assert check.note == f"first difference at step 0, gap {check.value:.3g}"


def test_a_graph_that_ignores_the_mask(plain: Path, source: SourceModel, tmp_path: Path) -> None:
    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = "ones" if name == "attention_mask" else name
        one = numpy_helper.from_array(np.array([1]), "one")
        graph.node.insert(0, helper.make_node("ConstantOfShape", ["mask_shape"], ["ones"], value=one))
        graph.node.insert(0, helper.make_node("Shape", ["attention_mask"], ["mask_shape"]))

    broken = changed(plain, tmp_path / "wrong", change)
    assert names(examined(broken, source), "failed") == {
        "left padding",
        "steps after left padding",
        "steps behind right padding",
    }
    with pytest.raises(ParityError) as caught:
        prove(broken, source, PROMPTS, atol=ATOL, seed=0, greedy_tokens=6, effort=EFFORT)
    said = str(caught.value)
    assert said.startswith("Rows padded on the left and rows without padding differ by up to ")
    assert (
        "(check `left padding`, failed too: steps after left padding, steps behind right padding)" in said
    )
    assert "that of the node `/model/layers.0/self_attn/" in said
    assert "model.layers.0.self_attn.o_proj (input)" in said


def test_a_frozen_position(plain: Path, source: SourceModel, tmp_path: Path) -> None:
    """Cached tokens that count their place from 0 again, as a trace without a cache would."""

    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = "frozen" if name == "position_ids" else name
        zero = numpy_helper.from_array(np.array(0), "p_zero")
        one = numpy_helper.from_array(np.array(1), "p_one")
        graph.initializer.extend([zero, one])
        for node in (
            helper.make_node("CumSum", ["p_ones", "p_one"], ["p_count"]),
            helper.make_node("ConstantOfShape", ["p_shape"], ["p_ones"], value=_ones()),
            helper.make_node("Shape", ["input_ids"], ["p_shape"]),
        ):
            graph.node.insert(0, node)
        last = helper.make_node("Sub", ["p_count", "p_one"], ["frozen"])
        graph.node.insert(3, last)

    broken = changed(plain, tmp_path / "wrong", change)
    assert names(examined(broken, source), "failed") >= {
        "cached steps",
        "token by token",
        "continued from a cache",
        "steps after left padding",
    }
    assert {"prefill", "batch", "left padding", "right padding"} <= names(examined(broken, source), "ok")
    with pytest.raises(
        ParityError, match=r"The cached graph and the cached torch model .* `/model/rotary_emb/"
    ):
        prove(broken, source, PROMPTS, atol=ATOL, seed=0, greedy_tokens=6, effort=EFFORT)


def _ones() -> onnx.TensorProto:
    return numpy_helper.from_array(np.array([1]), "value")


def test_a_wrong_weight_is_named(graph: Path, source: SourceModel, tmp_path: Path) -> None:
    report = json.loads((graph.parent / "export.json").read_text())
    place = report["modules"]["model.layers.1.mlp.down_proj"]
    column = (slice(None), slice(3, 4))
    broken = changed(graph, tmp_path / "wrong", scaled(place["weight"], 1.2, column))
    with pytest.raises(ParityError) as caught:
        prove(broken, source, PROMPTS, atol=ATOL, seed=0, greedy_tokens=6, effort=EFFORT)
    said = str(caught.value)
    assert said.startswith("The graph and the torch model differ by up to ")
    assert f" and {ATOL:.3g} is allowed (check `prefill`, failed too: cached steps" in said
    assert f"`{place['node']}` (MatMul), model.layers.1.mlp.down_proj (output), by " in said
    assert said.endswith(", which agrees: look for what the export changed there.")
    assert "\n" not in said


def test_rounding_is_called_rounding(plain: Path, source: SourceModel) -> None:
    with pytest.raises(ParityError, match="raise `atol` if the difference is rounding"):
        prove(plain, source, PROMPTS, atol=1e-12, seed=0, greedy_tokens=2, effort=EFFORT)


@pytest.mark.parametrize(("window", "positions"), [(4, 3 + 7 + 1), (64, 0)])
def test_a_sliding_window(tmp_path: Path, window: int, positions: int) -> None:
    source = load_source(tiny_model(tmp_path / "model", "MistralForCausalLM", sliding_window=window))
    proof = examined(export_plain(source, tmp_path / "out"), source)
    checks = {check.name: check for check in proof.checks}
    assert not proof.failed
    if positions:
        assert checks["sliding window"].figures["positions"] == positions
        assert (
            "would take up room in the sliding window of 4 tokens"
            in checks["steps behind right padding"].note
        )
        beyond = changed(
            tmp_path / "out" / "model.onnx", tmp_path / "wrong", quirk(("new", "Greater", window))
        )
        assert "sliding window" in names(examined(beyond, source), "failed")
    else:
        assert checks["sliding window"].note == (
            "it holds 64 tokens, and the longest prompt of this proof has 11"
        )
        assert checks["steps behind right padding"].status == "ok"


def test_json_and_back(graph: Path, source: SourceModel) -> None:
    proof = examined(graph, source)
    assert read_proof(json.loads(json.dumps(dataclasses.asdict(proof), allow_nan=False))) == proof
    assert examined(graph, source) == proof


def test_one_line_a_check(plain: Path, source: SourceModel) -> None:
    lines = proof_lines(examined(plain, source))
    assert len(lines) == len(CHECKS)
    assert lines[0].startswith("prefill                          largest difference ")
    assert lines[0].endswith("26 positions, allowed 2e-05  ok")
    assert "KL at most " in lines[0]
    assert lines[1].endswith("not applicable: the model has none")
    assert lines[3].endswith("12 of 12 equal, 0 ties, allowed gap 4e-05  ok")


@pytest.mark.parametrize("prompts", [[], [[5, 6], []]])
def test_nothing_to_compare(plain: Path, source: SourceModel, prompts: list[list[int]]) -> None:
    with pytest.raises(ParityError) as caught:
        prove(plain, source, prompts, atol=ATOL, seed=0)
    assert str(caught.value) == (
        "Expected prompts of at least one token to compare, found none or an empty one."
    )


def test_single_tokens(graph: Path, source: SourceModel) -> None:
    proof = examine(graph, source, [[5]], atol=ATOL, seed=0, greedy_tokens=2, effort=EFFORT)
    assert not proof.failed
    notes = {check.name: check.note for check in proof.checks}
    assert notes["continued from a cache"] == "every prompt has a single token"
    assert notes["steps after left padding"] == "the shortest prompt has a single token"


def test_a_full_context_leaves_no_room(plain: Path, source: SourceModel) -> None:
    effort = dataclasses.replace(EFFORT, longest_tokens=1000)
    proof = examine(plain, source, [[7] * 128], atol=ATOL, seed=0, effort=effort)
    notes = {check.name: check.note for check in proof.checks}
    assert not proof.failed
    assert notes["greedy tokens"] == "the prompts leave no room for an answer in the model's context"


def test_progress_and_effort(plain: Path, source: SourceModel) -> None:
    seen: list[str] = []
    proof = prove(
        plain, source, PROMPTS, atol=ATOL, seed=0, greedy_tokens=3, on_check=lambda c: seen.append(c.name)
    )
    assert seen == CHECKS
    assert proof.effort == dataclasses.replace(EFFORTS[0][1], greedy_tokens=3)
    assert proof.packed
    assert proof.parameters == sum(p.numel() for p in source.model.parameters())


def test_larger_models_are_asked_less() -> None:
    efforts = [effort_for(count) for count in (5_000_000, 135_000_000, 1_100_000_000)]
    assert [effort for _, effort in EFFORTS] == efforts
    for name in ("prompts", "greedy_prompts", "batch_rows", "step_tokens", "longest_tokens"):
        figures = [getattr(effort, name) for effort in efforts]
        assert figures == sorted(figures, reverse=True)
        assert figures[-1] > 0
    assert {effort.greedy_tokens for effort in efforts} == {GREEDY_TOKENS}


def test_a_graph_that_cannot_be_run(plain: Path, source: SourceModel, tmp_path: Path) -> None:
    """One that fails for a batch: an error of ONNX Runtime, with the run that provoked it."""

    def change(graph: onnx.GraphProto) -> None:
        graph.initializer.append(numpy_helper.from_array(np.array([1, -1, 300]), "one_row"))
        for node in graph.node:
            for index, name in enumerate(node.output):
                node.output[index] = "right" if name == "logits" else name
        graph.node.append(helper.make_node("Reshape", ["right", "one_row"], ["one"]))
        graph.node.append(helper.make_node("Sub", ["one", "right"], ["nothing"]))
        graph.node.append(helper.make_node("Add", ["right", "nothing"], ["logits"]))

    with pytest.raises(ExecutionError, match="with 3 rows of 3 new and 0 cached tokens"):
        examined(changed(plain, tmp_path / "wrong", change), source)


def test_prompts_of_the_suites(source: SourceModel) -> None:
    prompts = proof_prompts(source, 0)
    assert len(prompts) == 2 * SUITE_PROMPTS
    assert prompts == proof_prompts(source, 0) != proof_prompts(source, 1)
    assert all(0 < len(prompt) <= 128 - GREEDY_TOKENS for prompt in prompts)
    start = source.tokenizer.encode("<|user|>")
    assert all(prompt[: len(start)] == start for prompt in prompts)


def test_prompts_of_unequal_lengths(tmp_path: Path) -> None:
    source = load_source(tiny_model(tmp_path, "LlamaForCausalLM", max_position_embeddings=512))
    prompts = proof_prompts(source, 0)
    for group in (prompts[::2], prompts[1::2]):
        assert len({len(prompt) for prompt in group}) == SUITE_PROMPTS


def test_a_conversation_outgrows_a_sliding_window(tmp_path: Path) -> None:
    settings = {"max_position_embeddings": 1024, "sliding_window": 300}
    source = load_source(tiny_model(tmp_path, "MistralForCausalLM", **settings))
    *prompts, last = proof_prompts(source, 0)
    assert sliding_window(source.model) == 300
    assert max(map(len, prompts)) <= 300 < len(last) <= 1024 - GREEDY_TOKENS
    assert len(prompts) == 2 * SUITE_PROMPTS
    text = source.tokenizer.tokenizer.decode(last, skip_special_tokens=False)
    assert "<|assistant|>" in text and text.count("<|user|>") > 1


def test_a_lean_session_gives_the_same_logits(graph: Path, source: SourceModel) -> None:
    ids = torch.tensor(PROMPTS[:1])
    found = [
        decoder.step(ids, torch.ones_like(ids), decoder.empty_cache(1))[0]
        for decoder in (open_decoder(graph), open_decoder(graph, lean=True))
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=0.0, atol=1e-5)
    assert found[0].shape == (1, 7, 300)


def test_as_many_logits_as_are_asked_for(fused: Path) -> None:
    ids = torch.tensor(PROMPTS[:1])
    decoder = open_decoder(fused)
    cache = decoder.empty_cache(1)
    every, after = decoder.step(ids, torch.ones_like(ids), cache)
    last, _ = decoder.step(ids, torch.ones_like(ids), cache, keep=2)
    assert last.shape == (1, 2, 300)
    np.testing.assert_allclose(last, every[:, -2:], rtol=0.0, atol=1e-5)
    assert sorted(after) == sorted(cache)
    assert {value.shape[2] for value in after.values()} == {7}


@torch.inference_mode()
def test_a_cached_step_of_torch_is_part_of_a_whole_run(source: SourceModel) -> None:
    ids = torch.tensor([[0, 0, 5, 40, 7, 260], PROMPTS[0][:6]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    whole = torch_step(source.model, ids, mask)
    cache = DynamicCache(config=source.model.config)
    parts = [
        torch_step(source.model, ids[:, :4], mask[:, :4], cache),
        torch_step(source.model, ids[:, 4:], mask, cache),
    ]
    shown = mask == 1
    torch.testing.assert_close(torch.cat(parts, dim=1)[shown], whole[shown], rtol=0.0, atol=1e-5)
    alone = torch_step(source.model, ids[:1, 2:], mask[:1, 2:])
    torch.testing.assert_close(whole[:1, 2:], alone, rtol=0.0, atol=1e-5)
