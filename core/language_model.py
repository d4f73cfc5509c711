"""What the evaluation suites need of a model. The torch reference and the ONNX session both are one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from holdfast.chat import ChatTokenizer
from holdfast.progress import OnDone

__all__ = ["LanguageModel", "OnDone"]


class LanguageModel(Protocol):
    """A causal language model, as the suites see it.

    Prompts are token ids of unequal length; implementations batch and pad them. Results come in the
    order of the prompts and do not depend on the batch size beyond floating-point noise. A prompt
    longer than the model's context is an InputError, never truncated.
    """

    @property
    def name(self) -> str:
        """What reports call it, for example "aligned (torch fp32)"."""

    @property
    def tokenizer(self) -> ChatTokenizer: ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        on_done: OnDone | None = None,
    ) -> list[list[int]]:
        """Greedy answers: new ids only, ended before the first stop id or at `max_new_tokens`."""

    def token_logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        *,
        on_done: OnDone | None = None,
    ) -> list[NDArray[np.float32]]:
        """Natural-log probability of each continuation token; one array [continuation_tokens] a prompt."""

    def next_token_logits(
        self, prompts: Sequence[Sequence[int]], *, on_done: OnDone | None = None
    ) -> NDArray[np.float32]:
        """Logits after the last prompt token, float32 [prompt, vocabulary]."""
