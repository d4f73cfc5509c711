"""Scheme names, patterns and what they are refused for."""

import pytest

from holdfast.config import decode
from holdfast.errors import QuantizationError, RecipeError
from holdfast.quantize.formats import Format, compute_level, formats, parse_scheme
from holdfast.recipe import QuantizeConfig

PATHS = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head"]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("w8a8", Format(8, 8, 0)),
        ("w8a3", Format(8, 3, 0)),
        ("w4a8", Format(4, 8, 32)),
        ("w4", Format(4, None, 32)),
        ("w8", Format(8, None, 32)),
        ("w2", Format(2, None, 32)),
        ("none", None),
    ],
)
def test_schemes_by_name(scheme: str, expected: Format | None) -> None:
    found = parse_scheme(scheme, QuantizeConfig())
    assert found == expected
    assert found is None or found.name == scheme


def test_settings_reach_the_formats() -> None:
    config = QuantizeConfig(
        block_size=64, symmetric_weights=False, signed_activations=True, per_channel=False
    )
    static, blocks = (parse_scheme(name, config) for name in ("w8a8", "w4"))
    assert static is not None
    assert (static.symmetric_weights, static.signed_activations, static.per_channel) == (True, True, False)
    assert static.symmetric_activations  # signed codes have the zero point 0
    assert blocks is not None
    assert (blocks.symmetric_weights, blocks.block_size) == (False, 64)


def test_the_last_pattern_wins_and_exclude_over_all() -> None:
    config = QuantizeConfig(scheme="w4", mixed={"*.mlp.*": "w8", "*.down_proj": "w2"}, exclude=("lm_*",))
    assert {path: form.name for path, form in formats(PATHS, config).items()} == {
        "model.layers.0.mlp.up_proj": "w8",
        "model.layers.0.mlp.down_proj": "w2",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude": ("head",)}, r"`exclude` names `head`, which matches no linear.*model\.layers\.0"),
        ({"mixed": {"*.gate": "w8"}}, r"`mixed` names `\*\.gate`, which matches no linear"),
        ({"exclude": ("*",)}, "leave every linear in fp32"),
        ({"mixed": {"*": "none"}}, "leave every linear in fp32"),
    ],
)
def test_patterns_that_leave_nothing(settings: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        formats(PATHS, QuantizeConfig(**settings))  # type: ignore[arg-type]


def test_nothing_is_quantized_under_none() -> None:
    assert formats(PATHS, QuantizeConfig(scheme="none")) == {}


@pytest.mark.parametrize("scheme", ["w3", "w16", "w8a9", "W8A8", "int8", "w4a1"])
def test_unknown_schemes_are_refused_by_the_recipe(scheme: str) -> None:
    with pytest.raises(RecipeError, match="scheme"):
        decode({"scheme": scheme}, QuantizeConfig, what="recipe.yaml")
    with pytest.raises(QuantizationError, match=f"There is no scheme `{scheme}`"):
        parse_scheme(scheme, QuantizeConfig())


def test_static_inputs_are_not_rounded_again_inside_the_kernel() -> None:
    config = QuantizeConfig(accuracy_level=4)
    levels = {
        name: compute_level(form, config) for name in ("w4", "w4a8") if (form := parse_scheme(name, config))
    }
    assert levels == {"w4": 4, "w4a8": 1}
