"""Which operators a graph uses, whether a target allows them, whether ONNX Runtime has their kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from holdfast.errors import ExportError
from holdfast.exporter.export import export_model
from holdfast.exporter.kernels import cpu_kernels, require_kernels, typed_nodes
from holdfast.exporter.operators import (
    TARGETS,
    Operator,
    is_standard,
    operators,
    require_operators,
    since_version,
)
from holdfast.recipe import ExportConfig
from tests.tiny import tiny_model

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def value(name: str, element: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, ["n", 4])


def model(
    nodes: list[onnx.NodeProto], *, opset: int = 17, element: int = FLOAT, out: int | None = None
) -> onnx.ModelProto:
    """`x` and a condition in, `y` out."""
    outputs = [value("y", element if out is None else out)]
    graph = helper.make_graph(nodes, "g", [value("x", element), value("yes", BOOL)], outputs)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports)


def node(kind: str, inputs: list[str], outputs: list[str], domain: str = "") -> onnx.NodeProto:
    return helper.make_node(kind, inputs, outputs, name=f"/{kind}", domain=domain)


def branch(kind: str, domain: str = "") -> onnx.GraphProto:
    return helper.make_graph([node(kind, ["x"], ["inner"], domain)], kind, [], [value("inner")])


def conditional(kind: str, domain: str = "") -> onnx.NodeProto:
    branches = {"then_branch": branch(kind, domain), "else_branch": branch("Neg")}
    return helper.make_node("If", ["yes"], ["y"], name="/If", **branches)


class TestOperators:
    def test_each_once_sorted_with_the_version_that_defined_it(self) -> None:
        found = operators(
            model([node("Relu", ["x"], ["a"]), node("Relu", ["a"], ["b"]), node("Add", ["b", "b"], ["y"])])
        )
        assert found == (Operator("", "Add", 14), Operator("", "Relu", 14))
        assert [str(operator) for operator in found] == ["ai.onnx::Add-14", "ai.onnx::Relu-14"]

    @pytest.mark.parametrize(("opset", "since"), [(6, 6), (12, 7), (13, 13), (14, 14), (21, 14)])
    def test_versions_of_add(self, opset: int, since: int) -> None:
        assert since_version("", "Add", opset) == since

    def test_subgraphs_and_functions(self) -> None:
        graph = model([conditional("QuickGelu", "com.microsoft")])
        body = helper.make_function(
            "mine", "Twice", ["a"], ["b"], [node("Sin", ["a"], ["b"])], [helper.make_opsetid("", 17)]
        )
        graph.functions.append(body)
        names = {operator.name for operator in operators(graph)}
        assert names == {"If", "QuickGelu", "Neg", "Sin"}

    def test_the_long_name_of_the_standard_domain_is_the_empty_one(self) -> None:
        graph = model([node("Neg", ["x"], ["y"], "ai.onnx")])
        assert operators(graph) == (Operator("", "Neg", 13),)
        require_kernels(graph)

    @pytest.mark.parametrize(
        ("operator", "standard"),
        [
            (Operator("", "MatMul", 13), True),
            (Operator("", "MatMul", 12), False),
            (Operator("", "SimplifiedLayerNormalization", 1), False),
            (Operator("com.microsoft", "MatMulNBits", 1), False),
            (Operator("", "Nothing", 0), False),
        ],
    )
    def test_what_is_standard(self, operator: Operator, standard: bool) -> None:
        assert is_standard(operator) is standard


class TestTargets:
    def test_a_portable_graph(self) -> None:
        for allowed in TARGETS.values():
            require_operators(model([conditional("Sin")]), allowed)

    @pytest.mark.parametrize("nested", [False, True])
    def test_another_domain_is_not_portable_wherever_it_is(self, nested: bool) -> None:
        inner = (
            conditional("QuickGelu", "com.microsoft")
            if nested
            else node("QuickGelu", ["x"], ["y"], "com.microsoft")
        )
        with pytest.raises(ExportError) as caught:
            require_operators(model([inner]), TARGETS["portable"])
        assert str(caught.value) == (
            "The target `portable` does not allow the operator com.microsoft::QuickGelu-1, and the graph "
            "uses it: export without the pass that wrote it, or choose another target."
        )
        require_operators(model([inner]), TARGETS["web"])

    def test_what_onnx_runtime_keeps_in_the_standard_domain_is_not_portable(self) -> None:
        graph = model([node("SimplifiedLayerNormalization", ["x", "x"], ["y"])])
        require_operators(graph, TARGETS["cpu-x86"])
        with pytest.raises(
            ExportError, match=r"allow the operator ai\.onnx::SimplifiedLayerNormalization-1"
        ):
            require_operators(graph, TARGETS["portable"])

    def test_an_unknown_domain_is_for_no_target(self) -> None:
        graph = model([node("Neg", ["x"], ["y"], "acme")])
        for allowed in TARGETS.values():
            with pytest.raises(ExportError, match=r"does not allow the operator acme::Neg-0"):
                require_operators(graph, allowed)

    def test_a_newer_opset(self) -> None:
        with pytest.raises(ExportError, match="allows opset 21 at most, and the graph imports opset 22"):
            require_operators(model([node("Neg", ["x"], ["y"])], opset=22), TARGETS["portable"])


class TestKernels:
    def test_versions(self) -> None:
        assert cpu_kernels(Operator("", "MatMul", 13))
        assert not cpu_kernels(Operator("", "MatMul", 99))
        assert not cpu_kernels(Operator("", "Nothing", 1))

    def test_types_follow_from_the_graph(self) -> None:
        nodes = [
            node("Shape", ["x"], ["shape"]),
            helper.make_node("Cast", ["shape"], ["cast"], to=TensorProto.DOUBLE),
            node("Abs", ["cast"], ["abs"]),
            node("ConstantOfShape", ["shape"], ["zeros"]),
            conditional("Sin"),
        ]
        types = {found.op_type: bound for found, bound in typed_nodes(model(nodes))}
        assert types["Abs"]["T"] == "tensor(double)"
        assert types["ConstantOfShape"]["T2"] == "tensor(float)"
        assert types["Sin"]["T"] == "tensor(float)"
        assert types["If"]["B"] == "tensor(bool)"

    def test_a_type_that_no_kernel_takes(self) -> None:
        graph = model([node("MatMul", ["x", "x"], ["y"])], element=TensorProto.BFLOAT16)
        with pytest.raises(ExportError) as caught:
            require_kernels(graph)
        assert str(caught.value) == (
            "Expected a kernel for ai.onnx::MatMul-13 (node `/MatMul`), and none of ONNX Runtime's CPU "
            "provider takes tensor(bfloat16): export with another `opset`, or without the pass that wrote "
            "the node."
        )

    def test_in_a_subgraph_too(self) -> None:
        with pytest.raises(
            ExportError, match=r"kernel for com.microsoft::BiasAdd-1 .* computes this operator"
        ):
            require_kernels(model([conditional("BiasAdd", "com.microsoft")]))

    def test_operators_that_onnx_defines_by_others_pass(self) -> None:
        graph = model([node("Neg", ["x"], ["a"]), node("CastLike", ["a", "x"], ["y"])])
        assert not cpu_kernels(Operator("", "CastLike", 15))
        require_kernels(graph)

    def test_an_operator_that_nobody_knows(self) -> None:
        with pytest.raises(
            ExportError, match=r"ONNX Runtime knows no operator ai.onnx::Nothing at version 17"
        ):
            require_kernels(model([node("Nothing", ["x"], ["y"])]))

    @pytest.mark.parametrize("target", ["portable", "cpu-arm64", "web"])
    @pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel"])
    def test_every_export_has_its_kernels(self, tmp_path: Path, architecture: str, target: Any) -> None:
        source = tiny_model(tmp_path / "model", architecture)
        (tmp_path / "out").mkdir()
        export_model(source, tmp_path / "out", ExportConfig(target=target))
        graph = onnx.load(tmp_path / "out" / "model.onnx")
        require_operators(graph, TARGETS[target])
        require_kernels(graph)
