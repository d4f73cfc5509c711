"""Benchmarks: one loop gives one answer with every graph form, and what is printed is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaForCausalLM

from benchmarks import exports, graphs
from benchmarks.build import RECIPES, Graph, describe, make, shares_cache
from benchmarks.decoding import PAST, Decoder, Plan, prompt_ids
from benchmarks.graphs import Row, Task, _compare, measure_group, together
from benchmarks.models import checkpoint
from benchmarks.page import page
from holdfast.errors import ParityError

PROMPT = prompt_ids(4096, 24)
NEW = 12


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="module")
def source(work: Path) -> Path:
    return checkpoint("tiny", work / "tiny" / "checkpoint")


@pytest.fixture(scope="module")
def made(work: Path, source: Path) -> dict[str, Graph]:
    """Every graph of the tiny model, where the scripts will look for it."""
    config = json.loads((source / "config.json").read_text())
    folder = work / "tiny" / "graphs"
    return {r.name: describe(make(r, source, folder), config, r.maker, r.scheme, 1) for r in RECIPES}


@pytest.fixture(scope="module")
def expected(source: Path) -> list[int]:
    """torch's greedy answer, without a cache."""
    model = LlamaForCausalLM.from_pretrained(source).eval()
    ids = torch.tensor(PROMPT)[None]
    for _ in range(NEW):
        with torch.inference_mode():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("name", ["optimum-fp32", "holdfast-fp32"])
@pytest.mark.parametrize("last", [False, True])
def test_the_loop_answers_as_torch_does(
    made: dict[str, Graph], expected: list[int], name: str, last: bool
) -> None:
    answer = Decoder(made[name].plan).answer(PROMPT, NEW, last=last)
    assert len(set(expected)) > 3
    assert answer.tokens == expected
    assert answer.prefill_s > 0
    assert answer.decode_s > 0


def test_a_second_answer_starts_from_nothing(made: dict[str, Graph], expected: list[int]) -> None:
    decoder = Decoder(made["holdfast-fp32"].plan)
    decoder.answer(PROMPT[::-1].copy(), NEW, last=True)
    assert decoder.answer(PROMPT, NEW, last=True).tokens == expected


def test_a_shared_buffer_and_a_growing_cache_agree(made: dict[str, Graph]) -> None:
    plan = made["holdfast-w4"].plan
    assert plan.shared
    growing = Plan(**(vars(plan) | {"shared": False}))
    first, second = (Decoder(p).answer(PROMPT, NEW, last=False) for p in (plan, growing))
    assert first.tokens == second.tokens
    np.testing.assert_array_equal(first.logits, second.logits)


def test_one_quantizer_gives_one_model_in_both_graphs(made: dict[str, Graph]) -> None:
    """Rounding inside MatMulNBits (int8 activations) leaves a little between them."""
    names = ("optimum-w4", "holdfast-w4")
    first, second = (Decoder(made[name].plan).answer(PROMPT, 2, last=False).logits[0] for name in names)
    fp32 = Decoder(made["holdfast-fp32"].plan).answer(PROMPT, 2, last=False).logits[0]
    assert np.abs(first - second).max() < 0.2 * np.abs(first - fp32).max()


def test_only_an_attention_operator_shares(made: dict[str, Graph]) -> None:
    assert not made["optimum-fp32"].plan.shared
    assert not made["optimum-w4"].plan.shared
    assert all(made[name].plan.shared for name in ("holdfast-fp32", "holdfast-w4", "holdfast-w8a8"))


def test_open_cache_dimensions_and_no_choice_of_logits(
    made: dict[str, Graph], expected: list[int], tmp_path: Path
) -> None:
    """As onnxruntime-genai's builder writes it."""
    model = onnx.load(made["holdfast-fp32"].plan.graph)
    for value in model.graph.input:
        if value.name.startswith(PAST):
            value.type.tensor_type.shape.dim[1].dim_param = "kv_heads"
            value.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"
    kept = [value for value in model.graph.input if value.name != "logits_to_keep"]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    onnx.save(model, tmp_path / "model.onnx")
    assert shares_cache(model.graph)
    plan = Plan(**(vars(made["holdfast-fp32"].plan) | {"graph": str(tmp_path / "model.onnx")}))
    decoder = Decoder(plan)
    assert not decoder.takes_keep
    assert decoder.answer(PROMPT, NEW, last=True).tokens == expected


def test_a_wrong_graph_is_not_measured(made: dict[str, Graph], tmp_path: Path) -> None:
    model = onnx.load(made["holdfast-fp32"].plan.graph)
    weight = next(t for t in model.graph.initializer if t.name.endswith("down_proj.weight_T"))
    weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    right = made["optimum-fp32"]
    plan = Plan(**(vars(right.plan) | {"graph": str(tmp_path / "model.onnx"), "shared": True}))
    wrong = Graph("Holdfast", "fp32", plan, 1, "")
    with pytest.raises(ParityError, match="another checkpoint, or a wrong one"):
        measure_group([right, wrong], Task(len(PROMPT), NEW, 1))


def test_a_difference_that_is_no_number_is_refused(made: dict[str, Graph]) -> None:
    answer = Decoder(made["optimum-fp32"].plan).answer(PROMPT, 2, last=False)
    answer.logits[0, 0] = np.nan
    row = Row(made["optimum-fp32"], last=False)
    with pytest.raises(ParityError):
        _compare([row], [answer])


def test_groups_fit_and_begin_with_the_first_graph(made: dict[str, Graph]) -> None:
    plan = made["holdfast-fp32"].plan
    first, *others = (Graph("", "", plan, size, "") for size in (4, 4, 4, 1, 1))
    assert together([first, *others], 8) == [
        [first, others[0]],
        [first, *others[1:2]],
        [first, *others[2:]],
    ]
    assert together([first, *others], 100) == [[first, *others]]


def test_both_scripts_end_to_end(made: dict[str, Graph], work: Path) -> None:
    """The graphs are there already; onnxruntime-genai's are not given."""
    common = ["--size", "tiny", "--work", str(work), "--out"]
    short = ["--rounds", "2", "--prompt-tokens", "24", "--new-tokens", "4", "--threads", "1"]
    ran = CliRunner().invoke(graphs.main, [*common, str(work / "graphs-tiny.json"), *short])
    assert ran.exit_code == 0, ran.output
    assert "| onnxruntime-genai, W4 | not measured |" in ran.output
    variants = ["--variant", "Optimum, graph only", "--variant", "Holdfast, graph only"]
    out = str(work / "exports-tiny.json")
    ran = CliRunner().invoke(exports.main, [*common, out, "--repeats", "1", *variants])
    assert ran.exit_code == 0, ran.output

    found = json.loads((work / "graphs-tiny.json").read_text())
    assert [row["name"] for row in found["rows"]][:3] == [
        "Optimum, fp32",
        "Holdfast, fp32",
        "Holdfast, fp32, last logits only",
    ]
    assert all(
        len(row["prefill"]) == 2 and row["memory"]["peak_resident_bytes"] > 0 for row in found["rows"]
    )
    runs = json.loads((work / "exports-tiny.json").read_text())["runs"]
    assert set(runs[1]["phases"]) == {"load", "trace", "passes", "write"}
    assert all(run["seconds"] > 0 and run["peak_anonymous_bytes"] > 0 for run in runs)
    text = page(work, ("tiny",))
    assert "onnxruntime-genai, fp32: not measured, no folder" in text
    assert str(work) not in text
