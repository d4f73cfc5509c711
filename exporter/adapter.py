"""A PEFT adapter folder: judged before peft sees it, then merged into its base model.

Only safetensors, and only kinds that merge into the base's own weights. The merged model is
compared with the one that peft runs unmerged, on the same tokens.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from holdfast.errors import MissingExtraError, ModelSourceError
from holdfast.exporter.config_safety import read_object, refuse_unsafe
from holdfast.exporter.quiet import quiet
from holdfast.exporter.weights import ADAPTER_CONFIG, read_header

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# Kinds whose change is a change of the base's weights; the others run beside them at every token.
MERGEABLE = ("LORA", "LOHA", "LOKR", "IA3", "OFT")
# Keys through which peft imports a module that the file names.
NAMES_CODE = ("auto_mapping", "megatron_config")
PROBE_TOKENS = 16
# Largest logit difference that merging may make, relative to the largest logit.
MERGE_RTOL = 1e-3


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that can be merged.

    Attributes:
        base: folder or hub name of the model it was trained on; None when it names none.
        base_revision: the revision of `base` it was trained on, if it names one.
        keeps_ties: whether peft itself changes tied layers together.
    """

    folder: Path
    base: str | None
    base_revision: str | None
    keeps_ties: bool


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder; its tensors are not read yet.

    Raises:
        ModelSourceError: adapter_config.json is unreadable, names code, or is of a kind that cannot be
            merged; the weights are missing, a pickle, or corrupt.
        MissingExtraError: peft is not installed.
    """
    path = folder / ADAPTER_CONFIG
    settings = read_object(path)
    refuse_unsafe(path, settings)
    _refuse_code(path, settings)
    kind = settings.get("peft_type")
    if kind not in MERGEABLE:
        raise ModelSourceError(
            f"{path} describes an adapter of the kind {kind!r}, and only {', '.join(MERGEABLE)} can be "
            "merged into a model: give a merged model."
        )
    _require_weights(folder)
    _require_peft(folder)
    _refuse_unknown(path, settings, kind)
    return Adapter(
        folder=folder,
        base=_text(settings, "base_model_name_or_path"),
        base_revision=_text(settings, "revision"),
        keeps_ties=any(settings.get(key) for key in ("ensure_weight_tying", "trainable_token_indices")),
    )


def adapter_files(folder: Path) -> list[Path]:
    """The files that define an adapter, apart from its tokenizer."""
    return [folder / ADAPTER_CONFIG, folder / WEIGHTS]


def merge_adapter(model: Any, adapter: Adapter) -> Any:
    """`model` with the adapter merged into its weights; `model` is changed in place.

    Where the adapter changes only one of a tied head and embedding, the two are untied.

    Raises:
        ModelSourceError: the adapter does not fit the model, has a value that is not finite, or
            merging it changes the logits.
    """
    tensors = load_file(adapter.folder / WEIGHTS)
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ModelSourceError(
                f"`{name}` in {adapter.folder / WEIGHTS} has values that are not finite: "
                "use an adapter whose training did not diverge."
            )
    if _touches_tied(model, tensors) and not adapter.keeps_ties:
        _untie(model)
    try:
        with quiet(), _without_neural_compressor():
            merged, drift = _apply(model, adapter.folder, tensors)
    except ModelSourceError:
        raise
    except Exception as error:  # peft lets through whatever a config that does not fit provokes
        reason = str(error).strip().splitlines()
        raise ModelSourceError(
            f"peft could not merge the adapter in {adapter.folder} into a {type(model).__name__} "
            f"({type(error).__name__}: {reason[0] if reason else 'no message'}): "
            "give a merged model, or the base that it was trained on with --adapter-base."
        ) from error
    if not drift <= MERGE_RTOL:
        raise ModelSourceError(
            f"Merging the adapter in {adapter.folder} changes the logits by {drift:.1e} of the largest "
            f"(allowed {MERGE_RTOL:.0e}): give a merged model."
        )
    _settle_tie(merged)
    return merged


def _apply(model: Any, folder: Path, tensors: dict[str, torch.Tensor]) -> tuple[Any, float]:
    """The merged model, and how far its logits are from the unmerged one's."""
    import peft

    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    adapted = peft.PeftModel(model, config)
    loaded: Any = peft.set_peft_model_state_dict(adapted, tensors)
    _refuse_partial(folder, _unset(adapted, loaded.missing_keys), sorted(loaded.unexpected_keys))
    adapted.eval()
    before = _probe(adapted)
    merged: Any = adapted.merge_and_unload(safe_merge=True)
    after = _probe(merged)
    return merged, float((after - before).abs().max() / before.abs().max().clamp_min(1e-6))


def _unset(adapted: nn.Module, missing: list[str]) -> list[str]:
    """Names among `missing` of adapter parameters that stayed as initialised; aliases are set."""
    parameters = dict(adapted.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in set(missing)}
    return sorted(name for name in missing if ".default" in name and id(parameters.get(name)) not in loaded)


def _refuse_partial(folder: Path, lacking: list[str], unknown: list[str]) -> None:
    for names, what, verb in ((lacking, "lacks", "asks for"), (unknown, "has", "does not ask for")):
        if names:
            raise ModelSourceError(
                f"The adapter in {folder} {what} {len(names)} tensors that its config {verb} on this base "
                f"(the first is `{names[0]}`): copy the whole adapter, or give the base that it was "
                "trained on with --adapter-base."
            )


@contextmanager
def _without_neural_compressor() -> Iterator[None]:
    """Tell peft that neural_compressor is not there.

    Where it is, peft imports all of it to recognise layers that a float32 model has none of.
    """
    names = ("peft.tuners.lora.inc", "peft.utils.quantization_utils")
    modules: list[Any] = [sys.modules[name] for name in names if name in sys.modules]
    asked = [(module, module.is_inc_available) for module in modules if hasattr(module, "is_inc_available")]
    for module, _ in asked:
        module.is_inc_available = lambda: False
    try:
        yield
    finally:
        for module, answer in asked:
            module.is_inc_available = answer


def _probe(model: Any) -> torch.Tensor:
    """Logits of a few fixed tokens, float32."""
    ids = torch.arange(min(PROBE_TOKENS, model.config.vocab_size)).unsqueeze(0)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def _touches_tied(model: Any, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether head and embedding are one parameter and the adapter changes either of them."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return False
    leaves = [path.rpartition(".")[2] for path, module in model.named_modules() if module in ends]
    return any(f".{leaf}." in name for leaf in leaves for name in tensors)


def _untie(model: Any) -> None:
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def _settle_tie(model: Any) -> None:
    """A config that says tied, over weights that are not, would lose the head when it is saved."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False


def _refuse_code(path: Path, settings: dict[str, Any]) -> None:
    for key in NAMES_CODE:
        if settings.get(key) is not None:
            raise ModelSourceError(
                f"{path} has the key `{key}`, through which an adapter can import code: set it to null if "
                "you trust where the adapter comes from."
            )


def _require_weights(folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        read_header(folder / WEIGHTS)
    elif (folder / PICKLE).is_file():
        raise ModelSourceError(
            f"{folder} holds its adapter as a pickle ({PICKLE}), which can run code when opened: "
            "convert it to safetensors (`save_pretrained(safe_serialization=True)`)."
        )
    else:
        raise ModelSourceError(f"Expected {WEIGHTS} in {folder}, found none: copy the whole adapter.")


def _require_peft(folder: Path) -> None:
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError(
            f"The adapter in {folder} needs peft, not installed here: "
            "run `pip install 'holdfast[adapters]'`."
        )


def _refuse_unknown(path: Path, settings: dict[str, Any], kind: str) -> None:
    """peft drops settings that it does not know; set ones change what the adapter computes."""
    import peft

    known = {
        field.name for field in dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)])
    }
    unknown = sorted(key for key, value in settings.items() if key not in known and value)
    if unknown:
        raise ModelSourceError(
            f"{path} has the key `{unknown[0]}`, which peft {peft.__version__} does not know: "
            "install the peft that wrote it, or give a merged model."
        )


def _text(settings: dict[str, Any], key: str) -> str | None:
    value = settings.get(key)
    return value if isinstance(value, str) and value else None
