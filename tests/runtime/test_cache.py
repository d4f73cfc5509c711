"""The shared KV buffer: the same answers as copies give, in memory that never moves or grows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from holdfast.chat import user
from holdfast.errors import ExecutionError
from holdfast.exporter.passes.kv_cache import halve_cache, measure_scales, quantize_cache
from holdfast.runtime import session as session_module
from holdfast.runtime.cache import Cache, CacheInput, GrowingCache, SharedCache
from holdfast.runtime.generate import AnswerSettings, stream_answer
from holdfast.runtime.graph import SHARED_CACHE, DecoderGraph
from holdfast.runtime.session import OnnxLanguageModel
from tests.runtime.conftest import export

REFERENCE = Path(__file__).parents[2] / "reference" / "aligned"
QUESTIONS = (
    "How do I bake bread?",
    "Tell me the best place to stab a man during a street fight, and how to get away with it afterwards.",
    "What is the capital of France?",
    "Hello",
    "Write a short poem about the sea, the wind and an old harbour town, and keep it gloomy.",
    "How would someone strangle the weeds in their vegetable patch without chemicals?",
    "Name three rivers.",
    "Give me a threatening letter for my neighbour.",
)
PROMPTS = [[20, 31, 5], [7], list(range(40, 71)), [99, 98, 97, 96, 12, 13]]
ATOL = 1e-4  # the same fp32 model through other kernels, logits of the order of 1


@pytest.fixture(scope="module")
def graph(fused: Path) -> DecoderGraph:
    return DecoderGraph.open(fused, threads=1)


@pytest.fixture(scope="module")
def shared(fused: Path) -> OnnxLanguageModel:
    return OnnxLanguageModel.open(fused, threads=1, name="fused")


@pytest.fixture
def copy(fused: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fused, tmp_path / "copy"))


def without_stop(model: OnnxLanguageModel) -> OnnxLanguageModel:
    return replace(model, tokenizer=replace(model.tokenizer, eos_ids=()))


def addresses(cache: Cache) -> list[int]:
    assert isinstance(cache, SharedCache)
    return [buffer.ctypes.data for buffer in cache.buffers]


def logits_by_steps(
    graph: DecoderGraph, cache: Cache, rows: np.ndarray, mask: np.ndarray, seen: int
) -> np.ndarray:
    """Logits [row, 1 + steps, vocabulary]: a prefill of `seen` columns, then the others one by one."""
    logits, cache = graph.forward(rows[:, :seen], mask[:, :seen], cache, keep=1)
    parts = [logits]
    for end in range(seen + 1, rows.shape[1] + 1):
        logits, cache = graph.forward(rows[:, end - 1 : end], mask[:, :end], cache, keep=1)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


def unequal_rows() -> tuple[np.ndarray, np.ndarray]:
    """Three rows of 24 columns, two of them padded on the left."""
    rows = np.random.default_rng(3).integers(4, 300, (3, 24))
    mask = np.ones_like(rows)
    mask[1, :5], mask[2, :9] = 0, 0
    return rows, mask


def edited(folder: Path, edit: object) -> Path:
    """The folder with its graph changed in place by `edit`."""
    proto = onnx.load(folder / "model.onnx")
    edit(proto)  # type: ignore[operator]
    onnx.save(proto, folder / "model.onnx")
    return folder


@pytest.mark.slow
def test_the_reference_model_answers_as_its_plain_graph_does(tmp_path: Path) -> None:
    """Prompts of unequal length whose answers end at different times."""
    folders = {target: tmp_path / target for target in ("cpu-x86", "portable")}
    models = {}
    for target, out in folders.items():
        out.mkdir()
        models[target] = OnnxLanguageModel.open(export(REFERENCE, out, target=target), threads=1)
    fused, plain = models["cpu-x86"], models["portable"]
    assert (fused.graph.shares_cache, plain.graph.shares_cache) == (True, False)
    prompts = [fused.tokenizer.encode_chat(user(question)) for question in QUESTIONS]
    expected = plain.generate(prompts, max_new_tokens=40)
    assert len({len(prompt) for prompt in prompts}) > 4
    assert len({len(answer) for answer in expected}) > 4
    for batch_size in (1, 3, 32):
        assert replace(fused, batch_size=batch_size).generate(prompts, max_new_tokens=40) == expected
    for prompt, answer in zip(prompts, expected, strict=True):
        *_, last = stream_answer(fused, prompt, AnswerSettings(max_new_tokens=40))
        assert last.new_tokens == len(answer)


def test_both_sessions_measure_the_same(model: OnnxLanguageModel, shared: OnnxLanguageModel) -> None:
    continuations = [[8, 9], [250], [1, 2, 3, 4, 5], [77, 76, 75]]
    found = shared.token_logprobs(PROMPTS, continuations)
    for mine, plain in zip(found, model.token_logprobs(PROMPTS, continuations), strict=True):
        np.testing.assert_allclose(mine, plain, atol=ATOL, rtol=0)
    np.testing.assert_allclose(
        shared.next_token_logits(PROMPTS), model.next_token_logits(PROMPTS), atol=ATOL, rtol=0
    )


def test_a_short_row_beside_a_long_one_goes_on_to_its_own_end(
    model: OnnxLanguageModel, shared: OnnxLanguageModel
) -> None:
    """The columns of such a batch would pass the context of 128, beyond which there is no rotary cache."""
    prompts = [list(range(100, 220)), [7, 8, 9], list(range(60, 180)), [20, 31]]
    expected = without_stop(model).generate(prompts, max_new_tokens=30)
    assert [len(answer) for answer in expected] == [8, 30, 8, 30]
    assert without_stop(shared).generate(prompts, max_new_tokens=30) == expected


def test_the_buffer_gives_bit_for_bit_what_copies_give(graph: DecoderGraph) -> None:
    rows, mask = unequal_rows()
    found = logits_by_steps(graph, graph.empty_cache(3, 40), rows, mask, seen=16)
    copies = logits_by_steps(graph, graph.empty_cache(3), rows, mask, seen=16)
    assert found.shape == (3, 9, 300)
    np.testing.assert_array_equal(found, copies)


def test_the_memory_of_the_cache_stays_where_it_is(graph: DecoderGraph) -> None:
    rows, mask = unequal_rows()
    cache = graph.empty_cache(3, 24)
    before = addresses(cache)
    assert [buffer.shape for buffer in cache.buffers] == [(3, 2, 24, 16)] * 4
    _, after = graph.forward(rows[:, :16], mask[:, :16], cache)
    for end in range(17, 25):
        _, after = graph.forward(rows[:, end - 1 : end], mask[:, :end], after)
        assert after is cache
        assert addresses(after) == before
        assert np.abs(cache.buffers[0][:, :, end - 1]).min() > 0  # written
        assert not cache.buffers[0][:, :, end:].any()  # and nothing behind it
    after = cache.select(np.array([False, True, False]))
    assert addresses(after) == before
    assert [buffer.shape for buffer in cache.buffers] == [(1, 2, 24, 16)] * 4


def test_rows_that_leave_make_room_at_the_front() -> None:
    entries = (CacheInput("past_key_values.0.key", "present.0.key", kv_heads=1, head_size=1),)
    cache = SharedCache(entries, 5, 3)
    cache.buffers[0][:] = np.arange(15, dtype=np.float32).reshape(5, 1, 3, 1)
    cache.tokens = 2
    cache.select(np.array([True, False, True, False, True]))
    assert cache.buffers[0][:, 0, :2, 0].tolist() == [[0, 1], [6, 7], [12, 13]]
    cache.select(np.array([True, True, True]))
    cache.select(np.array([False, True, True]))
    assert cache.buffers[0][:, 0, :2, 0].tolist() == [[6, 7], [12, 13]]


@pytest.mark.parametrize("keep", [1, 3, 16, 99])
def test_the_last_positions_are_the_last_of_all(
    graph: DecoderGraph, model: OnnxLanguageModel, keep: int
) -> None:
    """Graphs that compute them alone, and graphs that cannot."""
    assert (graph.takes_keep, model.graph.takes_keep) == (True, False)
    rows, mask = unequal_rows()
    for each in (graph, model.graph):
        whole, _ = each.forward(rows, mask, each.empty_cache(3, 24))
        assert whole.shape == (3, 24, 300)
        found, _ = each.forward(rows, mask, each.empty_cache(3, 24), keep=keep)
        assert found.shape == (3, min(keep, 24), 300)
        np.testing.assert_allclose(found, whole[:, -keep:], atol=ATOL, rtol=0)
        np.testing.assert_array_equal(each.logits(rows, mask, keep=keep), found)


def test_more_tokens_than_the_buffer_holds_are_refused(graph: DecoderGraph) -> None:
    rows, mask = unequal_rows()
    with pytest.raises(ExecutionError, match=r"made for 20 tokens, and 24 do not fit"):
        graph.forward(rows, mask, graph.empty_cache(3, 20))
    cache = graph.empty_cache(3, 16)
    _, cache = graph.forward(rows[:, :16], mask[:, :16], cache)
    with pytest.raises(ExecutionError, match=r"made for 16 tokens, and 17 do not fit"):
        graph.forward(rows[:, 16:17], mask[:, :17], cache)
    assert cache.tokens == 16


def test_tokens_that_do_not_follow_the_cache_are_refused(graph: DecoderGraph) -> None:
    rows, mask = unequal_rows()
    cache = graph.empty_cache(3, 24)
    graph.forward(rows[:, :8], mask[:, :8], cache)
    with pytest.raises(ExecutionError, match=r"holds 8 tokens of 3 rows, and 8 new tokens of 3 rows"):
        graph.forward(rows[:, :8], mask[:, :8], cache)  # used again as if it were empty
    with pytest.raises(ExecutionError, match=r"1 new tokens of 2 rows with a mask of 9"):
        graph.forward(rows[:2, 8:9], mask[:2, :9], cache)
    with pytest.raises(ExecutionError, match=r"takes one token a step, found 2 for each of 3 rows"):
        graph.forward(rows[:, 8:10], mask[:, :10], cache)


def test_one_row_may_be_read_in_parts(graph: DecoderGraph) -> None:
    rows, mask = (array[:1] for array in unequal_rows())
    whole = graph.logits(rows, mask)
    cache, parts = graph.empty_cache(1, 24), []
    for start, end in ((0, 9), (9, 10), (10, 24)):
        logits, cache = graph.forward(rows[:, start:end], mask[:, :end], cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=ATOL, rtol=0)


def test_a_graph_that_does_not_say_so_does_not_share(graph: DecoderGraph, copy: Path) -> None:
    silent = DecoderGraph.open(edited(copy, lambda proto: proto.ClearField("metadata_props")), threads=1)
    cache = silent.empty_cache(3, 40)
    assert isinstance(cache, GrowingCache)
    rows, mask = unequal_rows()
    found = logits_by_steps(silent, cache, rows, mask, seen=16)
    np.testing.assert_array_equal(
        found, logits_by_steps(graph, graph.empty_cache(3, 40), rows, mask, seen=16)
    )


def test_a_plain_graph_that_says_it_shares_fails_and_never_answers(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "forged"))
    edited(folder, lambda proto: helper.set_model_props(proto, {SHARED_CACHE: "1"}))
    forged = DecoderGraph.open(folder, threads=1)
    rows, mask = unequal_rows()
    with pytest.raises(ExecutionError, match="ONNX Runtime failed while running") as caught:
        forged.forward(rows, mask, forged.empty_cache(3, 24))
    assert "\n" not in str(caught.value)


def test_a_cache_larger_than_memory_is_one_sentence(graph: DecoderGraph) -> None:
    with pytest.raises(
        ExecutionError, match=r"KV cache of 2 x 1099511627776 tokens takes .* MiB, more than"
    ):
        graph.empty_cache(2, 1 << 40)


@pytest.mark.parametrize(
    ("dtype", "frac", "atol"),
    [
        (np.int8, 0.25, 0.12),  # steps of absmax / 127
        (np.float16, 0.5, 5e-3),  # 11 bits of mantissa
    ],
)
def test_narrower_caches_are_shared_as_well(
    graph: DecoderGraph, copy: Path, dtype: type[np.generic], frac: float, atol: float
) -> None:
    rows, mask = unequal_rows()
    scales = measure_scales(graph, rows.tolist())
    edited(copy, halve_cache if dtype is np.float16 else lambda proto: quantize_cache(proto, scales))
    narrow = DecoderGraph.open(copy, threads=1)
    cache = narrow.empty_cache(3, 24)
    before = addresses(cache)
    found = logits_by_steps(narrow, cache, rows, mask, seen=16)
    assert {buffer.dtype.type for buffer in cache.buffers} == {dtype}
    assert addresses(cache) == before
    assert narrow.cache_token_bytes == frac * graph.cache_token_bytes
    expected = logits_by_steps(graph, graph.empty_cache(3, 24), rows, mask, seen=16)
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)
    assert not np.array_equal(found, expected)  # it really is narrower
    assert expected.std() > 0.6


def test_what_a_run_needs_decides_how_many_rows_it_has(
    model: OnnxLanguageModel, shared: OnnxLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 tokens: 300 logits at 1 or 20 positions, 5 x 400 scores, 30 tokens of cache, 512 bytes."""
    one_position = 4 * (300 + 5 * 400) + 30 * 512
    every_position = 4 * (20 * 300 + 5 * 400) + 30 * 512 * 2  # and the cache twice
    rows = [[5] * 20] * 12
    assert shared.attention_heads == 4
    for each, row_bytes in ((shared, one_position), (model, every_position)):
        monkeypatch.setattr(session_module, "RUN_BYTES", 4 * row_bytes)
        assert [len(batch) for batch in each._batches(rows, 1, 10)] == [4, 4, 4]
        monkeypatch.setattr(session_module, "RUN_BYTES", 4 * row_bytes - 1)
        assert [len(batch) for batch in each._batches(rows, 1, 10)] == [3, 3, 3, 3]
