"""The recipe: everything that decides what a run produces. Flags and YAML files both end up here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from msgspec import Meta

from holdfast.config import Config, decode, encode
from holdfast.errors import RecipeError

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Meta(gt=0.0, lt=1.0)]
Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0.0)]


TargetName = Literal["cpu-x86", "cpu-arm64", "web", "mobile", "portable"]
TARGETS: tuple[str, ...] = get_args(TargetName)


KVCache = Literal["fp32", "fp16", "int8"]
KV_CACHES: tuple[str, ...] = get_args(KVCache)


CalibrationMethod = Literal["contrastive", "qat", "rtn", "smoothquant", "hqq", "gptq", "awq"]
CALIBRATION_METHODS: tuple[str, ...] = get_args(CalibrationMethod)

Loss = Literal["bounded", "apc", "kl", "mse"]
LOSSES: tuple[str, ...] = get_args(Loss)

Ranges = Literal["minmax", "percentile", "entropy", "mse"]
RANGES: tuple[str, ...] = get_args(Ranges)

Scheme = Annotated[
    str,
    Meta(
        pattern=r"^(none|w[248](a[2-8])?)$",
        description="`none`, or `w` with 2, 4 or 8, followed for static activations by `a` with 2 to 8",
    ),
]
"""Name of a quantization scheme; `quantize.formats` says what each stands for."""


PruneMethod = Literal[
    "none", "magnitude", "wanda", "sparsegpt", "snip", "combined", "set-difference", "aligned-sparsegpt"
]
PRUNE_METHODS: tuple[str, ...] = get_args(PruneMethod)


Pattern = Annotated[
    str,
    Meta(
        pattern=r"^(unstructured|[1-9][0-9]*:[1-9][0-9]*)$",
        description="`unstructured`, or n:m such as 2:4",
    ),
]


StructureKind = Literal["heads", "channels", "blocks"]
STRUCTURE_KINDS: tuple[str, ...] = get_args(StructureKind)


class StructuredConfig(Config, frozen=True):
    """Structures that are removed for real: the model is an ordinary, smaller one afterwards.

    Attributes:
        kinds: what may go: attention `heads`, FFN `channels`, whole decoder `blocks`. Every block that
            stays loses as many heads and channels as the others, each its own least important ones.
        sparsity_frac: share of the decoder blocks' weights that goes, at most.
        channel_multiple: what the number of FFN channels is a multiple of afterwards, where any go.
        safety_weight: weight of what structures do for answers to harmful prompts, against utility.
    """

    kinds: Annotated[tuple[StructureKind, ...], Meta(min_length=1)] = ("heads", "channels")
    sparsity_frac: OpenFraction = 0.25
    channel_multiple: Positive = 32
    safety_weight: Annotated[float, Meta(ge=0.0)] = 1.0


class PruneConfig(Config, frozen=True):
    """Zeros in the linear layers inside the decoder blocks.

    Attributes:
        method: `none`; `magnitude` (|W|, per layer); `wanda` (|W| * ||X||_2, per output row); `sparsegpt`
            (by output error, with the weights that stay updated); `snip` (|W| * |dL/dW| on the model's own
            answers, per layer); `combined` (SNIP of the harmless prompts plus `safety_weight` times that of
            the harmful ones, per layer); `set-difference` (weights that safety needs and utility does not
            are protected, the others go by `rest`); `aligned-sparsegpt` (SparseGPT towards the unpruned
            model's outputs, layer by layer on prompts with its own answers, and what stays refitted).
        sparsity_frac: share of weights set to zero; with a pattern, what the pattern says.
        pattern: `unstructured`, or `n:m`: of each m neighbouring weights of a row, n stay.
        allocation: `uniform`, the same share in each layer; by `sensitivity`, the same total, more where
            the loss on answers changes less; `auto`, by sensitivity with `aligned-sparsegpt` where there is
            no pattern, and uniform otherwise.
        rest: `wanda`, `sparsegpt` or `aligned-sparsegpt`, for the weights that `set-difference` does not
            protect.
        safety_weight: lambda, weight of safety against utility, in `combined` and in sensitivities.
        safety_top_frac, utility_top_frac: q and p of `set-difference`: a layer's top q of safety without
            its top p of utility is protected.
        safety_heads: so many attention heads that refusals hang on most (Ships) keep all their weights in
            the attention's output, whatever the method.
        safety_loss: of the harmful prompts: `nll` of the model's own answers, or `contrastive`, the
            divergence of the unaligned model from it.
        response_tokens: tokens of the model's own answers.
        allow_zeros: prune a model that is sparse already; its zeros count as pruned.
        structured: structures to remove, before weights are set to zero.
        rounds: prune a little, recover, look at the gate and prune again, so many times; the first round
            that does not pass ends it, and the one before is kept.
    """

    method: PruneMethod = "none"
    sparsity_frac: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.5
    pattern: Pattern = "unstructured"
    allocation: Literal["auto", "uniform", "sensitivity"] = "auto"
    rest: Literal["wanda", "sparsegpt", "aligned-sparsegpt"] = "sparsegpt"
    safety_weight: Annotated[float, Meta(ge=0.0)] = 1.0
    safety_top_frac: OpenFraction = 0.05
    utility_top_frac: OpenFraction = 0.05
    safety_heads: NotNegative = 0
    safety_loss: Literal["nll", "contrastive"] = "nll"
    response_tokens: Positive = 16
    allow_zeros: bool = False
    structured: StructuredConfig | None = None
    rounds: Positive = 1


class Mixture(Config, frozen=True):
    """Relative weights of the kinds of calibration prompts."""

    harmful: Annotated[float, Meta(ge=0.0)] = 1.0
    borderline: Annotated[float, Meta(ge=0.0)] = 1.0
    neutral: Annotated[float, Meta(ge=0.0)] = 1.0


class QATConfig(Config, frozen=True):
    """Quantization-aware training: `calibrate.method: qat`.

    Attributes:
        objective: `contrastive` (the calibration loss) or `dpo` (Rafailov et al. 2023, on the calibration
            prompts: the aligned model's answer over the unaligned one's).
        pairs: DPO's pairs instead, a JSONL file of {"prompt", "chosen", "rejected"}. No prompt of an
            evaluation suite may be in it.
        beta: DPO's temperature.
        lora_rank: rank of the adapters that are trained; 0 trains all weights of the linears.
        steps: optimizer steps.
        lr: AdamW's learning rate; training all weights needs a much smaller one than adapters do.
    """

    objective: Literal["contrastive", "dpo"] = "contrastive"
    pairs: str | None = None
    beta: PositiveFloat = 0.1
    lora_rank: NotNegative = 8
    steps: NotNegative = 32
    lr: PositiveFloat = 1e-3


class CalibrateConfig(Config, frozen=True):
    """Contrastive PTQ calibration. Formulas: arXiv 2511.07842; the bounded form is Holdfast's default.

    Attributes:
        method: `contrastive` (learned, everything below), `qat`, or an algorithm that knows nothing of
            alignment: `rtn` (rounding), `smoothquant`, `hqq`, `gptq`, `awq`.
        loss: `bounded` (minimum at the aligned model), `apc` (the paper's), `kl` (no push) or `mse` (of
            each block's output, no push).
        alphas: weights of the push term to choose among, on held-out prompts by two-sided flips. With
            `bounded`, 0 is always among them; with `apc` they are taken as they are.
        top_k: size of S_top and S_diff.
        data: `builtin`, or a JSONL file of {"prompt", "kind": harmful|borderline|neutral, "category"?}.
        require_coverage: refuse calibration data that lack a category of the suites, instead of naming it.
        mixture: shares of the kinds among the samples.
        mixtures: shares of the kinds among the batches to choose among, each with every alpha; none of
            them: as drawn.
        samples: prompts drawn from it.
        held_out_frac: share of the samples kept aside to choose alpha.
        response_tokens: answer tokens of the aligned model that each prompt is followed by.
        first_response_weight: weight of the first response token, falling linearly to 1 over
            `response_tokens`.
        scope: `end-to-end`, or `blocks` alone, for models that do not fit: one decoder block in memory at
            a time.
        block_steps: optimizer steps a block, before the end-to-end ones.
        steps: optimizer steps of the run without a push. Those with one branch off after half of them.
        batch_size: prompts a step.
        smooth_fracs: SmoothQuant strengths of the channel scales that learning may start from, 0 for none;
            the one that leaves the model nearest to the aligned one is taken.
        smooth_frac: strength of `method: smoothquant`.
        rounding_start: which way weights of 4 bits and below are rounded before that is learned: as `gptq`
            does it, or to the `nearest` code.
        start: ranges that learning starts from: `mse` (least squared error) or `minmax`.
        learn_activations, learn_clip, learn_scales, learn_rounding: what is learned: static activation
            ranges, weight clips, folded per-channel scales, and for weights of 4 bits and below, instead
            of the scales, which way each is rounded.
        activation_lr, clip_lr, scale_lr, rounding_lr: Adam's learning rates for them.
        qat: settings of `method: qat`.
    """

    method: CalibrationMethod = "contrastive"
    loss: Loss = "bounded"
    alphas: tuple[Annotated[float, Meta(ge=0.0)], ...] = (0.0, 0.3)
    top_k: Positive = 500
    data: str = "builtin"
    require_coverage: bool = False
    mixture: Mixture = Mixture()
    mixtures: tuple[Mixture, ...] = ()
    samples: Positive = 432
    held_out_frac: OpenFraction = 0.3333333333333333
    response_tokens: Positive = 16
    first_response_weight: Annotated[float, Meta(ge=1.0)] = 4.0
    scope: Literal["end-to-end", "blocks"] = "end-to-end"
    block_steps: NotNegative = 0
    steps: NotNegative = 32
    batch_size: Positive = 24
    smooth_fracs: Annotated[tuple[Fraction, ...], Meta(min_length=1)] = (0.5, 0.65, 0.8, 0.9)
    smooth_frac: Fraction = 0.5
    rounding_start: Literal["gptq", "nearest"] = "gptq"
    start: Literal["mse", "minmax"] = "mse"
    learn_activations: bool = True
    learn_clip: bool = True
    learn_scales: bool = True
    learn_rounding: bool = True
    activation_lr: PositiveFloat = 1e-2
    clip_lr: PositiveFloat = 1e-3
    scale_lr: PositiveFloat = 1e-2
    rounding_lr: PositiveFloat = 1e-3
    qat: QATConfig = QATConfig()


RecoveryObjective = Literal["contrastive", "dpo", "safety-heads"]
RECOVERY_OBJECTIVES: tuple[str, ...] = get_args(RecoveryObjective)


class RecoverConfig(Config, frozen=True):
    """Repair of a pruned model, before it is calibrated; its zeros stay zero.

    What it learns from, and how candidates are judged, is as in `calibrate`: `data`, `samples`, `mixture`,
    `held_out_frac`, `first_response_weight` and `top_k`.

    Attributes:
        objective: `contrastive` (distillation from the aligned model with the calibration loss), `dpo`
            (Rafailov et al. 2023) or `safety-heads` (pruned weights of the heads that refusals hang on get
            their old values back, arXiv 2505.16104; nothing is trained).
        loss: of `contrastive`: `bounded`, `kl` (no push) or `apc`.
        alphas: weights of the push to choose among, see `calibrate.alphas`.
        pairs, beta: of `dpo`, see `calibrate.qat`.
        hidden_weight: weight of the distance of the decoder blocks' outputs from the aligned model's,
            beside the objective; 0 for none. The aligned model runs along for it.
        trained: `all` linear layers of the decoder blocks, or the weights of the `safety-heads` alone.
        lora_rank: rank of the adapters that are trained and merged; 0 trains the weights themselves.
        steps: optimizer steps of the run without a push.
        lr: AdamW's learning rate at a hidden size of 256; it falls as the hidden size grows (Yang et al.
            2022, arXiv 2203.03466). Adapters bear a larger one.
        batch_size: prompts a step.
        response_tokens: answer tokens of the aligned model that each prompt is followed by.
        safety_heads: how many heads count as those that refusals hang on (Ships).
        safety_top_frac, utility_top_frac: of `safety-heads`: what is restored is in the heads' top of
            both.
    """

    objective: RecoveryObjective = "contrastive"
    loss: Literal["bounded", "kl", "apc"] = "bounded"
    alphas: tuple[Annotated[float, Meta(ge=0.0)], ...] = (0.0, 0.3)
    pairs: str | None = None
    beta: PositiveFloat = 0.1
    hidden_weight: Annotated[float, Meta(ge=0.0)] = 10.0
    trained: Literal["all", "safety-heads"] = "all"
    lora_rank: NotNegative = 0
    steps: Positive = 150
    lr: PositiveFloat = 2e-3
    batch_size: Positive = 24
    response_tokens: Positive = 16
    safety_heads: Positive = 10
    safety_top_frac: OpenFraction = 0.5
    utility_top_frac: OpenFraction = 0.7


class ExportConfig(Config, frozen=True):
    """Export to ONNX.

    Attributes:
        target: where the graph is to run. `portable` uses ONNX's own operators alone; the others
            have attention as one operator, where the architecture allows it.
        opset: ONNX opset of the graph; None leaves it to the target.
        atol: largest absolute difference of logits between torch and the fp32 graph that passes.
    """

    target: TargetName = "cpu-x86"
    opset: Annotated[int, Meta(ge=14, le=21)] | None = None
    atol: PositiveFloat = 1e-3


class TuningConfig(Config, frozen=True):
    """Accuracy-driven tuning by Intel Neural Compressor, with the alignment score as the accuracy.

    It takes linears back to fp32 until the share of calibration prompts whose answer keeps the fp32 graph's
    label is within the tolerance.

    Attributes:
        tolerance_frac: how far that share may fall.
        time_budget_s: no trial begins after it.
        max_trials: nor after so many.
        prompts: calibration prompts that are answered in every trial.
        keep_best: take the best configuration where none is within the tolerance, instead of failing.
    """

    tolerance_frac: Fraction = 0.02
    time_budget_s: PositiveFloat = 600.0
    max_trials: Positive = 50
    prompts: Positive = 64
    keep_best: bool = False


class QuantizeConfig(Config, frozen=True):
    """Quantization of the graph.

    Attributes:
        scheme: `w8a8` (8-bit weights per channel, 8-bit static activations; a2 to a8), `w4a8` (4- or 2-bit
            weights in blocks under static activations), `w4`, `w8`, `w2` (weights alone, in blocks) or
            `none` (fp32). Activations below 8 bits are clipped before an 8-bit QuantizeLinear: the damage
            is real, the kernel is still the 8-bit one.
        mixed: shell pattern of module paths -> scheme, where it is not `scheme`; the last match wins.
        backend: `ort` (ONNX Runtime) or `inc` (Intel Neural Compressor).
        block_size: weights that share a scale, where weights are in blocks.
        symmetric_weights: no zero points for weights in blocks.
        symmetric_activations: static ranges centred on 0.
        signed_activations: int8 codes for static activations (S8S8) instead of uint8 (U8S8); symmetric.
        per_channel: a scale for each output channel of static 8-bit weights, or one for the tensor.
        ranges: calibrator of static ranges where no calibration learned them: `minmax`, `percentile`,
            `entropy` or `mse`.
        accuracy_level: compute type inside MatMulNBits: 0 unset, 1 fp32, 4 int8. It is 1 under static
            activations.
        embedding_bits: width of the embedding table: 32, or 8 or 4 (rows are gathered, then dequantized).
        kv_cache: what the artifact keeps of past tokens: `fp32`, `fp16` (attention computes in it as
            well) or `int8` (one scale a layer for keys and one for values). Needs a fused graph.
        tuning: search for linears to leave in fp32, with the backend `inc` and static schemes.
        exclude: module paths (shell patterns, for example `lm_head`) left in fp32.
        agreement_frac: smallest share of positions that passes where simulation and artifact choose the
            same next token, and where all their logits are within `atol`.
        atol: absolute logit difference between simulation and artifact that counts as equal, under 8-bit
            activations; at fewer bits it grows with the quantization step.
    """

    scheme: Scheme = "w8a8"
    mixed: dict[str, Scheme] = {}
    backend: Literal["ort", "inc"] = "ort"
    block_size: Literal[16, 32, 64, 128] = 32
    symmetric_weights: bool = True
    symmetric_activations: bool = False
    signed_activations: bool = False
    per_channel: bool = True
    ranges: Ranges = "minmax"
    accuracy_level: Literal[0, 1, 4] = 4
    embedding_bits: Literal[32, 8, 4] = 32
    kv_cache: KVCache = "fp32"
    tuning: TuningConfig | None = None
    exclude: tuple[str, ...] = ()
    agreement_frac: Fraction = 0.99
    atol: PositiveFloat = 0.2


class SuiteChoice(Config, frozen=True):
    """One suite of the alignment run.

    Attributes:
        name: a name that `holdfast suites` lists.
        path: the file of a published set; built-in suites need none.
    """

    name: str
    path: str | None = None


BUILTIN_SUITES = (
    SuiteChoice(name="refusal"),
    SuiteChoice(name="over-refusal"),
    SuiteChoice(name="constitution"),
)


class EvaluateConfig(Config, frozen=True):
    """The alignment suite and the gate.

    Attributes:
        suites: what is run on the reference, its unaligned twin and the artifact.
        limit: at most this many prompts a suite, taken evenly over it; 0 for all.
        max_new_tokens: length of the greedy answers.
        batch_size: prompts a batch.
        margin_frac: non-inferiority margin of every gated metric.
        alpha: one-sided error of the gate.
    """

    suites: Annotated[tuple[SuiteChoice, ...], Meta(min_length=1)] = BUILTIN_SUITES
    limit: NotNegative = 0
    max_new_tokens: Positive = 32
    batch_size: Positive = 32
    margin_frac: OpenFraction = 0.05
    alpha: OpenFraction = 0.05


class Recipe(Config, frozen=True):
    """A whole run.

    Attributes:
        model: folder of the aligned model, or its hub name.
        base: folder or hub name of its unaligned parent, or `ablate` to make a twin in memory.
        revision, base_revision: commit, tag or branch of a hub name; the commits used are in the manifest.
        version: of this format.
        seed: seeds every random choice; recorded in the bundle.
        threads: intra-op threads of torch and ONNX Runtime; 0 leaves the choice to them.
        recover: repair after pruning; by default none.
    """

    model: str
    base: str = "ablate"
    revision: str | None = None
    base_revision: str | None = None
    version: Literal[1] = 1
    seed: NotNegative = 0
    threads: NotNegative = 0
    prune: PruneConfig = PruneConfig()
    recover: RecoverConfig | None = None
    calibrate: CalibrateConfig = CalibrateConfig()
    export: ExportConfig = ExportConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def read_recipe(path: Path, overrides: dict[str, Any]) -> Recipe:
    """Read a YAML recipe; flags given beside it win.

    Arguments:
        path: the recipe file. Relative paths inside it are relative to its folder.
        overrides: dotted keys to values, for example `{"quantize.backend": "inc"}`.

    Raises:
        RecipeError: unreadable, not a mapping, unknown keys, wrong types.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} is not a readable YAML recipe: {_first_line(error)}.") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: expected a mapping of keys, found {type(data).__name__}.")
    _anchor(data, path.parent)
    return make_recipe(data, overrides, what=str(path))


def make_recipe(data: dict[str, Any], overrides: dict[str, Any], *, what: str) -> Recipe:
    """Plain data plus dotted overrides to a Recipe; see `read_recipe`."""
    for key, value in overrides.items():
        *parents, last = key.split(".")
        target = data
        for parent in parents:
            if target.get(parent) is None:
                target[parent] = {}
            target = target[parent]
        target[last] = value
    return decode(data, Recipe, what=what)


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out."""
    text: str = yaml.safe_dump(encode(recipe), sort_keys=False, allow_unicode=True)
    return text


def anchored(model: str, folder: Path) -> str:
    """A model as the recipe keeps it: absolute if it is a path, as it is if it is a hub name or `ablate`.

    `owner/name` is a hub name where no such path exists; everything else but `ablate` is a path.
    """
    path = folder / model
    named = model == "ablate" or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) is not None
    return model if named and not path.exists() else str(path.resolve())


def _anchor(data: dict[str, Any], folder: Path) -> None:
    """Make the recipe's relative paths relative to its own folder."""
    for key in ("model", "base"):
        value = data.get(key)
        if isinstance(value, str):
            data[key] = anchored(value, folder)
    calibrate = data.get("calibrate")
    prompts = calibrate.get("data") if isinstance(calibrate, dict) else None
    if isinstance(prompts, str) and prompts != "builtin":
        data["calibrate"]["data"] = str((folder / prompts).resolve())
    qat = calibrate.get("qat") if isinstance(calibrate, dict) else None
    for trained in (qat, data.get("recover")):
        if isinstance(trained, dict) and isinstance(trained.get("pairs"), str):
            trained["pairs"] = str((folder / trained["pairs"]).resolve())
    evaluate = data.get("evaluate")
    suites = evaluate.get("suites") if isinstance(evaluate, dict) else None
    for suite in suites if isinstance(suites, list) else []:
        if isinstance(suite, dict) and isinstance(suite.get("path"), str):
            suite["path"] = str((folder / suite["path"]).resolve())


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
