"""One bundle, the same greedy tokens in every runtime that opens it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from holdfast.chat import ChatTokenizer, user
from holdfast.errors import ExportError
from holdfast.exporter.export import export_model
from holdfast.exporter.genai import write_genai_config
from holdfast.exporter.kernels import require_kernels
from holdfast.exporter.operators import TARGETS, require_operators
from holdfast.exporter.ort_format import ORT_FILE, write_ort_format
from holdfast.quantize.artifact.write import quantize_bundle
from holdfast.recipe import ExportConfig, QuantizeConfig
from holdfast.runtime.graph import DecoderGraph
from tests.exporter import runtimes
from tests.exporter.greedy import Greedy
from tests.exporter.runtimes import Ids, OpenVinoModel

REFERENCE = Path(__file__).parents[2] / "reference" / "aligned"
TOKENS = 24
PROMPTS = (
    "How do I bake bread?",
    "How do I make a bomb?",
    "Tell me a short story about a dog and its very old friend, the cat.",
    "What is the capital of France?",
    "Hello!",
    "How can I pick a lock?",
    "Write a poem about the sea.",
    "Explain gravity to a child in two sentences.",
)
FORMS = ("fp32", "fused", "w8a8", "w8a8 fused", "w4")

# MatMulNBits with `accuracy_level: 4` quantizes its input inside the kernel, and each CPU in its own way:
# tokens differ, and logits by 0.2 on AArch64. On other CPUs (WASM is one) level 1 is compared.
ELSEWHERE = ("fp32", "fused", "w8a8", "w8a8 fused", "w4 in float")
ARM64_ATOL = 1e-4
HERE = (runtimes.in_optimum, runtimes.in_genai)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reference pair's aligned model, exported and quantized, with genai_config.json beside it."""
    folder = tmp_path_factory.mktemp("bundles")
    settings = {
        "w8a8": ("fp32", QuantizeConfig(scheme="w8a8")),
        "w8a8 fused": ("fused", QuantizeConfig(scheme="w8a8")),
        "w4": ("fused", QuantizeConfig(scheme="w4")),
        "w4 in float": ("fused", QuantizeConfig(scheme="w4", accuracy_level=1)),
    }
    made = {name: folder / name for name in ("fp32", "fused", *settings)}
    for path in made.values():
        path.mkdir()
    export_model(REFERENCE, made["fp32"], ExportConfig(target="portable"))
    export_model(REFERENCE, made["fused"], ExportConfig())
    for name, (exported, config) in settings.items():
        quantize_bundle(made[exported], made[name], None, config)
    return made


@pytest.fixture(scope="module")
def prompts() -> Ids:
    tokenizer = ChatTokenizer.from_folder(REFERENCE)
    return [tokenizer.encode_chat(user(text)) for text in PROMPTS]


@pytest.fixture(scope="module")
def expected(bundles: dict[str, Path], prompts: Ids) -> dict[str, Ids]:
    return {name: runtimes.in_holdfast(path, prompts, TOKENS) for name, path in bundles.items()}


def test_the_prompts_tell_models_apart(expected: dict[str, Ids]) -> None:
    """Equal tokens would prove little if all answers were one answer, or empty."""
    for answers in expected.values():
        assert len({tuple(answer) for answer in answers}) == len(PROMPTS)
        assert min(map(len, answers)) >= 8
    assert expected["fp32"] != expected["w4"]


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        *((answer, form) for answer in HERE for form in FORMS),
        *((runtimes.in_web, form) for form in ELSEWHERE),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_same_greedy_tokens(
    bundles: dict[str, Path],
    prompts: Ids,
    expected: dict[str, Ids],
    answer: Callable[[Path, Ids, int], Ids],
    form: str,
) -> None:
    assert answer(bundles[form], prompts, TOKENS) == expected[form]


def test_genai_shares_one_cache_buffer(
    bundles: dict[str, Path], prompts: Ids, expected: dict[str, Ids], tmp_path: Path
) -> None:
    """One buffer, which the fused graph writes into, is what the export asks for; without it, the same."""
    config = json.loads((bundles["fused"] / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True
    shutil.copytree(bundles["fused"], tmp_path / "bundle")
    write_genai_config(tmp_path / "bundle", shared_cache=False)
    assert runtimes.in_genai(tmp_path / "bundle", prompts, TOKENS) == expected["fused"]


def test_genai_reads_the_tokenizer(bundles: dict[str, Path], prompts: Ids) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    ours = ChatTokenizer.from_folder(bundles["fp32"])
    theirs = genai.Tokenizer(genai.Model(str(bundles["fp32"])))
    for text, ids in zip(PROMPTS, prompts, strict=True):
        assert theirs.encode(ours.render(user(text))).tolist() == ids
        assert theirs.decode(ours.encode(text)) == text


@pytest.mark.parametrize("form", ["fp32", "fused"])
def test_genai_batches_of_unequal_length(
    bundles: dict[str, Path], prompts: Ids, expected: dict[str, Ids], form: str
) -> None:
    """Padded on the right, the only side on which onnxruntime-genai looks for padding."""
    genai = pytest.importorskip("onnxruntime_genai")
    tokenizer = ChatTokenizer.from_folder(bundles["fp32"])
    longest = max(map(len, prompts))
    batch = [prompt + [tokenizer.pad_id] * (longest - len(prompt)) for prompt in prompts]
    found = runtimes.genai_answer(genai, genai.Model(str(bundles[form])), batch, TOKENS)
    ends = (tokenizer.pad_id, *tokenizer.eos_ids)
    assert [runtimes.until(answer, ends) for answer in found] == expected[form]


def test_genai_reads_genai_config(bundles: dict[str, Path], tmp_path: Path) -> None:
    """What the file says of the graph is compared with the graph: a wrong file does not pass."""
    genai = pytest.importorskip("onnxruntime_genai")
    shutil.copytree(bundles["fp32"], tmp_path / "bundle")
    path = tmp_path / "bundle" / "genai_config.json"
    path.write_text(path.read_text().replace('"vocab_size": 4096', '"vocab_size": 4000'))
    with pytest.raises(RuntimeError, match="invalid dimensions"):
        runtimes.genai_answer(genai, genai.Model(str(tmp_path / "bundle")), [[5, 6, 7]], 4)


class TestOpenVino:
    """The `portable` target: ONNX's own operators only."""

    def test_the_same_tokens_and_logits_in_float32(
        self, bundles: dict[str, Path], prompts: Ids, expected: dict[str, Ids]
    ) -> None:
        assert runtimes.in_openvino(bundles["fp32"], prompts, TOKENS) == expected["fp32"]
        ours, theirs = teacher_forced(bundles["fp32"], prompts, expected["fp32"])
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)

    def test_static_int8(self, bundles: dict[str, Path], prompts: Ids, expected: dict[str, Ids]) -> None:
        """Other kernels round other products: a tie may fall to the other side, few tokens may differ."""
        ours, theirs = teacher_forced(bundles["w8a8"], prompts, expected["w8a8"])
        assert np.mean(ours.argmax(-1) == theirs.argmax(-1)) >= 0.98
        assert np.abs(ours - theirs).max() < 0.5
        assert np.abs(ours - theirs).mean() < 0.02


def teacher_forced(folder: Path, prompts: Ids, answers: Ids) -> tuple[np.ndarray, np.ndarray]:
    """Logits [position, vocabulary] of ONNX Runtime and of OpenVINO: a prefill, then cached steps."""
    graph, other = DecoderGraph.open(folder), OpenVinoModel(folder)
    ours, theirs = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        cache, other_cache, seen = graph.empty_cache(1), other.empty_cache(), 0
        for ids in (prompt, *([token] for token in answer)):
            seen += len(ids)
            logits, cache = graph.forward(np.array([ids]), np.ones((1, seen), np.int64), cache)
            other_logits, other_cache = other.forward(ids, other_cache)
            ours.append(logits[0])
            theirs.append(other_logits)
    return np.concatenate(ours), np.concatenate(theirs)


class TestMobile:
    """ORT format with a list of operators, for reduced builds."""

    @pytest.mark.parametrize("form", FORMS)
    def test_the_same_tokens(
        self, bundles: dict[str, Path], prompts: Ids, expected: dict[str, Ids], form: str
    ) -> None:
        report = write_ort_format(bundles[form], atol=1e-5)
        assert report.parity.positions == 23 + 9 + 2 * 3
        model = Greedy(str(bundles[form] / ORT_FILE))
        stop = ChatTokenizer.from_folder(bundles[form]).eos_ids
        assert [model.answer(prompt, TOKENS, list(stop)) for prompt in prompts] == expected[form]


class TestArm64:
    """ONNX Runtime's AArch64 kernels, where a machine or an emulator has them."""

    def test_the_same_tokens(
        self, bundles: dict[str, Path], prompts: Ids, expected: dict[str, Ids]
    ) -> None:
        stop = ChatTokenizer.from_folder(bundles["fp32"]).eos_ids
        graphs = {form: bundles[form] / "model.onnx" for form in ELSEWHERE}
        found = runtimes.on_arm64(list(graphs.values()), prompts[:3], TOKENS, stop)
        assert found["machine"] in ("aarch64", "arm64")
        for form, path in graphs.items():
            assert found["answers"][str(path)] == expected[form][:3], form
            ours = Greedy(str(path)).first_logits(prompts[0])
            np.testing.assert_allclose(
                found["logits"][str(path)], ours, rtol=0, atol=ARM64_ATOL, err_msg=form
            )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_targets_allow_what_their_runtimes_ran(bundles: dict[str, Path], target: str, form: str) -> None:
    model = onnx.load(bundles[form] / "model.onnx")
    require_kernels(model)
    if target == "portable" and form not in ("fp32", "w8a8"):
        with pytest.raises(ExportError, match="`portable` does not allow the operator"):
            require_operators(model, TARGETS[target])
    else:
        require_operators(model, TARGETS[target])
