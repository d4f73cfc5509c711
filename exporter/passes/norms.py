"""RMS and layer norms as one node, with the residual addition before them where there is one.

The patterns are onnxscript's; the operators are ONNX Runtime's SimplifiedLayerNormalization,
SkipSimplifiedLayerNormalization and SkipLayerNormalization.
"""

from __future__ import annotations

from onnxscript.rewriter import pattern
from onnxscript.rewriter.ort_fusions.rms_normalization import rms_normalization_rules
from onnxscript.rewriter.ort_fusions.skip_normalization import (
    skip_layer_normalization_ruleset,
    skip_rms_normalization_ruleset,
)


def rules() -> list[pattern.RewriteRule]:
    """Norms alone."""
    return list(rms_normalization_rules)


def skip_rules() -> list[pattern.RewriteRule]:
    """Norms of a sum, which later nodes read as well."""
    return [*skip_rms_normalization_ruleset.rules, *skip_layer_normalization_ruleset.rules]
