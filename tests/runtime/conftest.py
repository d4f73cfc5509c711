"""One tiny random Llama, exported through Optimum and fused, and its torch original as the reference."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Semaphore
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from optimum.exporters.onnx import main_export
from transformers import LlamaForCausalLM, PreTrainedModel

from holdfast.exporter.export import export_model
from holdfast.recipe import ExportConfig
from holdfast.runtime.cache import Cache
from holdfast.runtime.graph import DecoderGraph
from holdfast.runtime.session import OnnxLanguageModel
from tests.tiny import tiny_llama

VERDICT = {"outcome": "PASS", "chat_digest": "0" * 64}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as Optimum exports it: 2 layers, 300 tokens, a context of 128."""
    folder = tmp_path_factory.mktemp("exported")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's remarks about transformers' own code
        main_export(
            str(source),
            output=folder,
            task="text-generation-with-past",
            opset=17,
            do_validation=False,
        )
    return folder


@pytest.fixture(scope="session")
def fused(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its attention as one operator."""
    return export(source, tmp_path_factory.mktemp("fused"), target="cpu-x86")


def export(source: Path, out: Path, *, target: Literal["cpu-x86", "portable"]) -> Path:
    """An exported folder as `holdfast export` writes it."""
    export_model(source, out, ExportConfig(target=target))
    if not (out / "config.json").is_file():
        shutil.copy(source / "config.json", out)
    return out


@pytest.fixture(scope="session")
def model(exported: Path) -> OnnxLanguageModel:
    return OnnxLanguageModel.open(exported, threads=1, name="tiny")


@pytest.fixture(scope="session")
def reference(source: Path) -> Iterator[PreTrainedModel]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield LlamaForCausalLM.from_pretrained(source).eval()
    torch.set_num_threads(before)


@dataclass(frozen=True)
class SteppedGraph(DecoderGraph):
    """The real graph, which waits for leave before every run: tests decide when a token comes."""

    leave: Semaphore

    def forward(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        cache: Cache,
        *,
        keep: int | None = None,
    ) -> tuple[NDArray[np.float32], Cache]:
        if not self.leave.acquire(timeout=20):
            raise TimeoutError("the test never let this token through")
        return super().forward(input_ids, attention_mask, cache, keep=keep)


def stepped(model: OnnxLanguageModel) -> tuple[OnnxLanguageModel, Semaphore]:
    """The model on a `SteppedGraph`, and the semaphore whose permits are its tokens."""
    leave = Semaphore(0)
    parts = {field.name: getattr(model.graph, field.name) for field in fields(DecoderGraph)}
    settings = {field.name: getattr(model, field.name) for field in fields(OnnxLanguageModel)}
    return OnnxLanguageModel(**settings | {"graph": SteppedGraph(**parts, leave=leave)}), leave
