"""What the proof of an export found, and how it is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.exporter.departure import Departure

# An inner value departs when it is off by this much of the largest value beside it. Rounding alone gives
# 1e-6 on the reference pair.
DEPART_RTOL = 3e-5
DEPART_ATOL = 1e-6

Status = Literal["ok", "failed", "not applicable"]


@dataclass(frozen=True)
class Check:
    """One thing that was asked of a graph.

    Attributes:
        status: "not applicable" says why in `note`, and has no figures.
        measure: the figure that is held against the tolerance.
        value: that figure.
        tolerance: the largest value that passes.
        figures: everything that was measured.
    """

    name: str
    status: Status
    measure: str = ""
    value: float = 0.0
    tolerance: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Effort:
    """How much is compared.

    Attributes:
        prompts: prompts that are compared with torch at every position.
        greedy_prompts: prompts that are answered.
        greedy_tokens: tokens of an answer.
        batch_rows: rows of a batch.
        padded_steps: cached steps after a padded prefill.
        step_tokens: tokens of a prompt that is read one by one.
        longest_tokens: longest prompt; longer ones are cut.
    """

    prompts: int
    greedy_prompts: int
    greedy_tokens: int
    batch_rows: int
    padded_steps: int
    step_tokens: int
    longest_tokens: int


@dataclass(frozen=True)
class Proof:
    """What was compared, and how it ended.

    Attributes:
        prompt_tokens: length of each prompt that was compared with torch.
        parameters: of the model; they decide the effort.
        packed: whether ONNX Runtime packed the weights for its kernels, as it does where a graph runs.
        seed: draws what is written into the padding.
    """

    checks: tuple[Check, ...]
    effort: Effort
    prompt_tokens: tuple[int, ...]
    parameters: int
    packed: bool
    atol: float
    seed: int

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == "failed")


def proof_lines(proof: Proof) -> list[str]:
    """One line a check: name, what was measured, what is allowed, how it ended."""
    width = max((len(check.name) for check in proof.checks), default=0)
    return [f"{check.name:<{width}}  {_line(check)}" for check in proof.checks]


def read_proof(data: Mapping[str, Any]) -> Proof:
    """The proof that `dataclasses.asdict` and JSON made `data` of.

    Raises:
        KeyError, TypeError: `data` is no such thing.
    """
    return Proof(
        **{
            **data,
            "checks": tuple(Check(**check) for check in data["checks"]),
            "effort": Effort(**data["effort"]),
            "prompt_tokens": tuple(data["prompt_tokens"]),
        }
    )


# What differs when a check fails.
SIDES = {
    "prefill": "The graph and the torch model",
    "sliding window": "Beyond the sliding window, the graph and the torch model",
    "cached steps": "The cached graph and the cached torch model",
    "batch": "A batch and its rows one by one",
    "left padding": "Rows padded on the left and rows without padding",
    "steps after left padding": "Cached steps of rows padded on the left and of rows without padding",
    "right padding": "Rows padded on the right and rows without padding",
    "steps behind right padding": "Cached steps behind padding on the right and without padding",
    "steps in place of right padding": "Cached steps in place of padding on the right and without padding",
    "token by token": "A prompt read token by token and in one run",
    "continued from a cache": "A prompt continued from a cache and in one run",
    "last logits alone": "The logits of the last token alone and among all",
}


def sentence(proof: Proof, check: Check, where: Departure | None, *, searched: bool) -> str:
    if check.name == "greedy tokens":
        said = (
            f"The graph chooses a token that the torch model puts {check.value:.3g} below its own "
            f"({check.note}), and {check.tolerance:.3g} is a tie"
        )
    else:
        said = (
            f"{SIDES[check.name]} differ by up to {check.value:.3g} in a logit, and {check.tolerance:.3g} "
            "is allowed"
        )
    others = [other.name for other in proof.failed if other is not check]
    also = f", failed too: {', '.join(others)}" if others else ""
    return f"{said} (check `{check.name}`{also}); {_where(where, searched)}"


def _where(departure: Departure | None, searched: bool) -> str:
    if departure is None and searched:
        return (
            f"no value inside departs by more than {DEPART_RTOL:.0e} of its size: raise `atol` if the "
            "difference is rounding."
        )
    if departure is None:
        return "torch has no such run to compare with inside: report this."
    behind = f", behind `{departure.agreed}`, which agrees" if departure.agreed else ""
    return (
        f"the first value that departs from torch's is that of the node `{departure.node}` "
        f"({departure.operator}), {departure.module}, by {departure.max_abs:.3g}{behind}: look for what "
        "the export changed there."
    )


def _line(check: Check) -> str:
    if check.status == "not applicable":
        return f"not applicable: {check.note}"
    if check.name == "greedy tokens":
        figures = check.figures
        said = f"{figures['equal']:.0f} of {figures['tokens']:.0f} equal, {figures['ties']:.0f} ties"
        note = f" ({check.note})" if check.note else ""
        return f"{said}{note}, allowed gap {check.tolerance:.0e}  {check.status}"
    kl = ""
    if "max_kl_nats" in check.figures:
        kl = f", KL at most {check.figures['max_kl_nats']:.1e} nats"
    return (
        f"largest difference {check.value:.1e}{kl}, {check.figures['positions']:.0f} positions, "
        f"allowed {check.tolerance:.0e}  {check.status}"
    )
