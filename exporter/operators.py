"""Which operators a graph uses, and whether a target allows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import onnx
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from holdfast.errors import ExportError

STANDARD = ""
CONTRIB = "com.microsoft"


@dataclass(frozen=True, order=True)
class Operator:
    """One operator that a graph uses.

    Attributes:
        domain: empty for ONNX's own operators.
        name: operator type, for example `MatMul`.
        since: version of the domain that defined the operator as this graph means it; 0 where
            neither ONNX nor ONNX Runtime knows it.
    """

    domain: str
    name: str
    since: int

    def __str__(self) -> str:
        return f"{self.domain or 'ai.onnx'}::{self.name}-{self.since}"


@dataclass(frozen=True)
class OperatorSet:
    """What a target may use.

    Attributes:
        target: what messages call it.
        domains: allowed domains; empty is ONNX's own.
        max_opset: newest version of ONNX's own domain that a graph may import.
        standard_only: whether an operator must be in the ONNX standard. ONNX Runtime keeps some of
            its own (`SimplifiedLayerNormalization`) in ONNX's domain, and no other runtime has them.
    """

    target: str
    domains: tuple[str, ...]
    max_opset: int
    standard_only: bool


def _onnx_runtime(target: str) -> OperatorSet:
    return OperatorSet(target, domains=(STANDARD, CONTRIB), max_opset=21, standard_only=False)


# What differs between the kernels of ONNX Runtime's CPU provider on x86-64 and on AArch64 (1.31.1, read
# from the registry of both): float16 kernels and NHWC convolutions are only in the second, NCHWc
# convolutions only in the first. onnxruntime-web compiles the same provider to WebAssembly, "including
# full ONNX operator coverage" (its README). So one row serves all; `kernels.py` looks each kernel up.
TARGETS: dict[str, OperatorSet] = {
    "portable": OperatorSet("portable", domains=(STANDARD,), max_opset=21, standard_only=True),
    **{name: _onnx_runtime(name) for name in ("cpu-x86", "cpu-arm64", "web", "mobile")},
}


def operators(model: onnx.ModelProto) -> tuple[Operator, ...]:
    """Every operator of the graph, its subgraphs and its functions, each once, sorted."""
    opsets = opset_versions(model)
    bodies = [(model.graph.node, opsets)]
    bodies += [(body.node, opsets | _versions(body.opset_import)) for body in model.functions]
    return tuple(
        sorted({operator_of(node, versions) for nodes, versions in bodies for node in _nested(nodes)})
    )


def opset_versions(model: onnx.ModelProto) -> dict[str, int]:
    """Domain -> version that the model imports; ONNX's own domain is the empty string."""
    return _versions(model.opset_import)


def require_operators(model: onnx.ModelProto, allowed: OperatorSet) -> None:
    """Raise ExportError naming the first operator that the target does not allow.

    External data need not be loaded. Whether a runtime has a kernel is `kernels.require_kernels`'s job.

    Raises:
        ExportError: a newer opset, another domain, or an operator outside the standard.
    """
    opset = opset_versions(model).get(STANDARD, 0)
    if opset > allowed.max_opset:
        raise ExportError(
            f"The target `{allowed.target}` allows opset {allowed.max_opset} at most, and the graph "
            f"imports opset {opset}: export with a lower `opset`."
        )
    for operator in operators(model):
        if operator.domain not in allowed.domains or (allowed.standard_only and not is_standard(operator)):
            raise ExportError(
                f"The target `{allowed.target}` does not allow the operator {operator}, and the graph uses "
                "it: export without the pass that wrote it, or choose another target."
            )


def is_standard(operator: Operator) -> bool:
    """Whether the ONNX standard defines the operator, at the version that the graph means."""
    return operator.domain == STANDARD and operator.since in {
        schema.since_version for schema in _standard_schemas().get(operator.name, ())
    }


def since_version(domain: str, name: str, opset: int) -> int:
    """Newest version up to `opset` at which the operator was defined, or 0: nobody knows it."""
    versions = {schema.since_version for schema in _standard_schemas().get(name, ()) if domain == STANDARD}
    versions |= set(_runtime_versions().get((domain, name), ()))
    return max((version for version in versions if version <= opset), default=0)


def _versions(imports: list[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {standard_name(entry.domain): entry.version for entry in imports}


def standard_name(name: str) -> str:
    """A domain as messages and tables here spell it: ONNX's own has two names."""
    return STANDARD if name == "ai.onnx" else name


def operator_of(node: onnx.NodeProto, opsets: dict[str, int]) -> Operator:
    """The operator of one node in a graph that imports these versions."""
    domain = standard_name(node.domain)
    return Operator(domain, node.op_type, since_version(domain, node.op_type, opsets.get(domain, 1)))


def _nested(nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, and those of the graphs in their attributes."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nested(graph.node)


@cache
def _standard_schemas() -> dict[str, tuple[onnx.defs.OpSchema, ...]]:
    found: dict[str, tuple[onnx.defs.OpSchema, ...]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == STANDARD:
            found[schema.name] = (*found.get(schema.name, ()), schema)
    return found


@cache
def _runtime_versions() -> dict[tuple[str, str], tuple[int, ...]]:
    """(domain, operator) -> versions that the installed ONNX Runtime defines."""
    found: dict[tuple[str, str], tuple[int, ...]] = {}
    for schema in get_all_operator_schema():
        key = (schema.domain, schema.name)
        found[key] = (*found.get(key, ()), schema.since_version)
    return found
