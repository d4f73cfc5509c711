"""What Optimum describes wrongly of a model that it can trace, described rightly."""

from __future__ import annotations

from typing import Any

from optimum.exporters.onnx.model_configs import FalconOnnxConfig
from optimum.utils import DummyTextInputGenerator, FalconDummyPastKeyValuesGenerator


class _FalconCache(FalconDummyPastKeyValuesGenerator):  # type: ignore[misc]
    """Falcon's new architecture repeats its key heads before it caches them, for every query head."""

    def __init__(self, task: str, normalized_config: Any, **sizes: Any) -> None:
        super().__init__(task, normalized_config, **sizes)
        if normalized_config.new_decoder_architecture:
            self.num_kv_heads = self.num_attention_heads


class _FalconConfig(FalconOnnxConfig):  # type: ignore[misc]
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator, _FalconCache)
    DUMMY_PKV_GENERATOR_CLASS = _FalconCache


CONFIGS = {"falcon": _FalconConfig}


def onnx_configs(model: Any) -> dict[str, Any] | None:
    """`custom_onnx_configs` for text generation with a cache; None where Optimum's own are right."""
    config_class = CONFIGS.get(model.config.model_type)
    if config_class is None:
        return None
    config = config_class(model.config, task="text-generation", use_past=True, use_past_in_inputs=True)
    return {"model": config}
