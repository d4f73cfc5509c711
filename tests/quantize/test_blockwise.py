"""Block-wise calibration: what learning gains, what is written, and how much memory it takes."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.errors import CalibrationError
from holdfast.exporter.architectures import linear_modules
from holdfast.exporter.source import SourceModel, load_source
from holdfast.quantize.fakequant import fake_quantize_activation
from holdfast.quantize.formats import formats
from holdfast.quantize.learning.block_learning import last_prompt_column, make_lesson, token_weights
from holdfast.quantize.learning.blockwise import calibrate_folder, warm_start
from holdfast.quantize.learning.learnable import Learnables
from holdfast.quantize.learning.start import watched_inputs
from holdfast.quantize.prompts.draw import CalibrationPrompt
from holdfast.quantize.prompts.sequences import Batch, chat_prompts, make_batch
from holdfast.quantize.record import CalibrationRecord, read_record
from holdfast.quantize.weights.codes import load_codes, save_codes
from holdfast.recipe import CalibrateConfig, QuantizeConfig
from tests.tiny import LINES, tiny_llama, tiny_model

W8A4 = QuantizeConfig(scheme="w8a4")
CONFIG = CalibrateConfig(
    scope="blocks",
    block_steps=16,
    batch_size=4,
    response_tokens=4,
    activation_lr=2e-2,
    clip_lr=2e-2,
    scale_lr=2e-2,
    start="minmax",
    smooth_fracs=(0.0,),
)
PROMPTS = [
    CalibrationPrompt(prompt=line, kind="harmful" if index % 2 else "neutral")
    for index, line in enumerate((*LINES, *(line[::-1] for line in LINES)))
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    return load_source(tiny_llama(tmp_path / "model"))


def sequences(source: SourceModel) -> Batch:
    ids = chat_prompts(source.tokenizer, [prompt.prompt for prompt in PROMPTS])
    answers = [[5 + index, 7, 9, 3][: 1 + index % 4] for index in range(len(ids))]
    return make_batch(ids, answers, pad_id=0, response_tokens=4, first_weight=4.0)


def attach(source: SourceModel, config: CalibrateConfig, quantize: QuantizeConfig) -> Learnables:
    """Quantizers for a copy of the model."""
    model = copy.deepcopy(source.model)
    chosen = formats(list(linear_modules(model)), quantize)
    inputs = watched_inputs(model, sequences(source), config.batch_size)
    starts = inputs.starts(chosen, config, config.smooth_fracs[0])
    return Learnables(model, inputs.groups, starts, chosen, rounding=config.learn_rounding)


@torch.no_grad()
def logits_error(source: SourceModel, learned: Learnables) -> float:
    """Mean squared error of the logits at the loss positions, against full precision."""
    batch = sequences(source)
    expected = source.model(**batch.inputs(), use_cache=False).logits[:, -batch.positions :]
    with learned.attached(), learned.frozen():
        found = learned.model(**batch.inputs(), use_cache=False).logits[:, -batch.positions :]
    return float((found - expected).square().mean(dim=-1)[batch.weights > 0].mean())


@pytest.mark.parametrize(("scheme", "gain"), [("w8a4", 0.8), ("w2", 0.9)])
def test_a_warm_start_brings_the_logits_closer(source: SourceModel, scheme: str, gain: float) -> None:
    """Against rounding with min-max ranges: w8a4 learns ranges and clips, w2 clips and rounding."""
    learned = attach(source, CONFIG, QuantizeConfig(scheme=scheme, block_size=16))
    before = logits_error(source, learned)
    results = warm_start(learned.model, learned, sequences(source), CONFIG, seed=0)
    assert [result.path for result in results] == ["model.layers.0", "model.layers.1"]
    assert all(result.loss < result.start_loss for result in results)
    assert logits_error(source, learned) < gain * before


def test_a_warm_start_changes_no_weight_and_detaches(source: SourceModel) -> None:
    learned = attach(source, CONFIG, W8A4)
    config = CalibrateConfig(block_steps=2, batch_size=6)
    done: list[int] = []
    warm_start(learned.model, learned, sequences(source), config, seed=0, on_step=done.append)
    assert done == [1, 1, 1, 1]
    state = learned.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in source.model.state_dict().items())
    assert all(parameter.grad is None for parameter in learned.parameters().values())


def test_a_seed_decides_what_is_learned(source: SourceModel) -> None:
    config = CalibrateConfig(block_steps=3, batch_size=4)
    states = []
    for seed in (0, 0, 1):
        learned = attach(source, CONFIG, W8A4)
        warm_start(learned.model, learned, sequences(source), config, seed=seed)
        states.append(learned.state())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_steps_that_do_harm_are_undone(source: SourceModel) -> None:
    """A learning rate at which everything diverges leaves each block where it started."""
    learned = attach(source, CalibrateConfig(), W8A4)
    start = learned.state()
    config = CalibrateConfig(block_steps=3, batch_size=4, activation_lr=5.0, scale_lr=1e-9, clip_lr=1e-9)
    results = warm_start(learned.model, learned, sequences(source), config, seed=0)
    assert [result.loss for result in results] == [result.start_loss for result in results]
    assert all(torch.equal(value, start[name]) for name, value in learned.state().items())


def test_positions_and_their_weights() -> None:
    """Prompts of 3 and 1 tokens; answers of 1 and 3, whose last token is only predicted."""
    batch = make_batch([[1, 2, 3], [4]], [[5], [6, 7, 8]], pad_id=0, response_tokens=3, first_weight=4.0)
    assert batch.ids.tolist() == [[1, 2, 3], [4, 6, 7]]
    assert last_prompt_column(batch).tolist() == [2, 0]
    assert token_weights(batch).tolist() == [[1.0, 1.0, 4.0], [4.0, 2.5, 1.0]]


def test_a_lesson_keeps_prompts_and_kinds_together(source: SourceModel) -> None:
    batch = sequences(source)
    harmful = torch.tensor([prompt.kind == "harmful" for prompt in PROMPTS])
    lesson = make_lesson(batch, harmful, CONFIG, 3, lambda _: None)
    rows = {tuple(row[row != 0].tolist()): bool(flag) for row, flag in zip(batch.ids, harmful, strict=True)}
    assert lesson.harmful is not None
    seen = [
        rows[tuple(row[row != 0].tolist())] == bool(flag)
        for part, flags in zip(lesson.batches, lesson.harmful, strict=True)
        for row, flag in zip(part.ids, flags, strict=True)
    ]
    assert seen == [True] * len(PROMPTS)


def run(folder: Path, out: Path, quantize: QuantizeConfig, config: CalibrateConfig) -> CalibrationRecord:
    out.mkdir()
    return calibrate_folder(folder, out, config, quantize, PROMPTS, seed=0)


@torch.no_grad()
def artifact_error(source: SourceModel, folder: Path) -> float:
    """As `logits_error`, of a calibration folder: its codes, scales and zero points, and nothing else."""
    record, codes, batch = read_record(folder), load_codes(folder), sequences(source)
    expected = source.model(**batch.inputs(), use_cache=False).logits[:, -batch.positions :]
    model = load_source(folder).model
    linears = linear_modules(model)
    for path, weight in codes.items():
        linears[path].weight = torch.nn.Parameter(weight.dequantized(), requires_grad=False)
        if path in record.activation_ranges:
            seen, bits = record.activation_ranges[path], int(record.formats[path][-1])
            linears[path].register_forward_pre_hook(
                lambda _, args, seen=seen, bits=bits: fake_quantize_activation(
                    args[0], torch.tensor(seen.low), torch.tensor(seen.high), bits
                )
            )
    found = model(**batch.inputs(), use_cache=False).logits[:, -batch.positions :]
    return float((found - expected).square().mean(dim=-1)[batch.weights > 0].mean())


@pytest.mark.parametrize(("scheme", "gain"), [("w8a4", 0.9), ("w4a8", 0.98), ("w2", 0.9)])
def test_a_folder_is_calibrated_on_disk(
    source: SourceModel, tmp_path: Path, scheme: str, gain: float
) -> None:
    """What is on disk, not what was in memory, gives logits nearer to full precision than no steps do."""
    quantize = QuantizeConfig(scheme=scheme, block_size=16)
    plain = CalibrateConfig(scope="blocks", block_steps=0, **shared())
    record = run(source.folder, tmp_path / "learned", quantize, CONFIG)
    run(source.folder, tmp_path / "plain", quantize, plain)
    assert read_record(tmp_path / "learned") == record
    assert set(record.formats) == set(linear_modules(source.model)) == set(load_codes(tmp_path / "learned"))
    assert record.prompts["harmful"] == (6, 0)
    assert artifact_error(source, tmp_path / "learned") < gain * artifact_error(source, tmp_path / "plain")


def shared() -> dict[str, Any]:
    names = ("batch_size", "response_tokens", "start", "smooth_fracs")
    return {name: getattr(CONFIG, name) for name in names}


def test_the_folder_holds_the_models_function(source: SourceModel, tmp_path: Path) -> None:
    """Channel scales are folded and cancel: without its codes the model answers as before."""
    run(source.folder, tmp_path / "out", W8A4, CONFIG)
    folded, batch = load_source(tmp_path / "out"), sequences(source)
    up = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(folded.model.get_parameter(up), source.model.get_parameter(up))
    with torch.no_grad():
        expected, found = (model(**batch.inputs()).logits for model in (source.model, folded.model))
    torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "OPTForCausalLM", "Gemma2ForCausalLM"])
def test_other_architectures_are_calibrated_on_disk(tmp_path: Path, architecture: str) -> None:
    """Linears stored the other way round, projections outside of the blocks, windows by layer."""
    settings = {"word_embed_proj_dim": 32} if architecture == "OPTForCausalLM" else {}
    source = load_source(tiny_model(tmp_path / "model", architecture, **settings))
    config = CalibrateConfig(scope="blocks", block_steps=2, batch_size=6, response_tokens=2)
    record = run(source.folder, tmp_path / "out", QuantizeConfig(scheme="w8a8"), config)
    assert set(record.activation_ranges) == set(linear_modules(source.model))
    spread = float(source.model(**sequences(source).inputs()).logits.detach().var())
    assert artifact_error(source, tmp_path / "out") < 0.05 * spread


def test_codes_are_written_part_by_part_as_at_once(source: SourceModel, tmp_path: Path) -> None:
    """`mixed` gives parts of different formats; the head's columns are no multiple of its blocks."""
    quantize = QuantizeConfig(scheme="w8a8", mixed={"*.mlp.*": "w4a8"}, symmetric_weights=False)
    out = tmp_path / "out"
    run(source.folder, out, quantize, CalibrateConfig(scope="blocks", batch_size=6, response_tokens=2))
    save_codes(load_codes(out), tmp_path / "again")
    name = "codes.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["harmful", "neutral"])
def test_prompts_of_one_kind(source: SourceModel, tmp_path: Path, kind: Any) -> None:
    same = [CalibrationPrompt(prompt=prompt.prompt, kind=kind) for prompt in PROMPTS]
    with pytest.raises(CalibrationError, match=r"(12|0) of 12 calibration prompts are harmful"):
        calibrate_folder(source.folder, tmp_path, CONFIG, W8A4, same, seed=0)


def test_nan_on_the_way_names_the_block(source: SourceModel, tmp_path: Path) -> None:
    """Finite weights whose products overflow."""
    path = source.folder / "model.safetensors"
    state = load_file(path)
    state["model.layers.1.mlp.up_proj.weight"] *= 1e38
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=r"`model\.layers\.1"):
        run(source.folder, tmp_path / "out", W8A4, CONFIG)


MEASURE = """
import sys
from pathlib import Path
import torch
from holdfast.exporter.source import load_source
from holdfast.quantize.learning.blockwise import calibrate_folder
from tests.quantize.test_blockwise import PROMPTS, W8A4
from holdfast.recipe import CalibrateConfig

torch.set_num_threads(1)
config = CalibrateConfig(scope="blocks", block_steps=2, batch_size=4, response_tokens=1)

def peak():
    # not getrusage: its peak is inherited from the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

for folder in map(Path, sys.argv[1:]):
    out = folder.with_name(folder.name + "-out")
    out.mkdir()
    calibrate_folder(folder, out, config, W8A4, PROMPTS, seed=0)
    print(peak(), flush=True)
load_source(Path(sys.argv[-1]))
print(peak())
"""


def test_peak_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """12 blocks more, of 5 MB each, must not cost the peak of a calibration more than 4 of them.

    The peak of a process never falls, so that the deeper model comes second; loading all of it is last and
    shows that the measure would have noticed.
    """
    wide = {
        "hidden_size": 256,
        "intermediate_size": 1280,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    folders = [
        tiny_model(tmp_path / str(depth), "LlamaForCausalLM", num_hidden_layers=depth, head_dim=32, **wide)
        for depth in (4, 16)
    ]
    block = 4 * (4 * 256 * 256 + 3 * 256 * 1280)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders)],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    shallow, deep, whole = map(int, done.stdout.split())
    assert deep - shallow < 4 * block
    assert whole - deep > 4 * block
