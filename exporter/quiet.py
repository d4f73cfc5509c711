"""Keeps the chatter of foreign libraries from the user. Exceptions pass through untouched."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

CHATTY = ("optimum", "onnx_ir", "onnxscript", "torch.onnx", "torch.__trace")


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines below ERROR or progress bars of transformers and Optimum inside.

    Both libraries warn about what Holdfast checks itself and turns into errors: missing weights,
    moved generation parameters, traced constants. Settings are restored on the way out.
    """
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in CHATTY}
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
