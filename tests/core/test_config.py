"""Strict configuration: what is refused, and with which words."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.config import encode
from holdfast.errors import ExitCode, RecipeError
from holdfast.recipe import Recipe, make_recipe, read_recipe, recipe_yaml


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"model": "m", "quantise": {}}, "unknown key `quantise`; did you mean `quantize`?"),
        (
            {"model": "m", "quantize": {"bakend": "ort"}},
            "unknown key `quantize.bakend`; did you mean `backend`?",
        ),
        (
            {"model": "m", "evaluate": {"suites": [{"nam": "refusal"}]}},
            "unknown key `evaluate.suites[0].nam`; did you mean `name`?",
        ),
        (
            {"model": "m", "prune": {"sparsity_frac": 1.5}},
            "`prune.sparsity_frac` is 1.5: expected a number below 1.0.",
        ),
        (
            {"model": "m", "quantize": {"backend": "tvm"}},
            "`quantize.backend` is 'tvm': expected `ort` or `inc`.",
        ),
        (
            {"model": "m", "prune": {"structured": {"kinds": ["head"]}}},
            "`prune.structured.kinds[0]` is 'head': expected `heads`, `channels` or `blocks`.",
        ),
        ({"model": "m", "quantize": {"block_size": 48}}, "is 48: expected `16`, `32`, `64` or `128`."),
        ({"model": "m", "version": 2}, "`version` is 2: expected `1`."),
        ({"model": "m", "seed": "zero"}, "`seed` is 'zero': expected `int`, got `str`."),
        ({"model": "m", "seed": -1}, "`seed` is -1: expected a number of at least 0."),
        ({"model": "m", "calibrate": {"alphas": [0, -1.5]}}, "`calibrate.alphas[1]` is -1.5: expected"),
        ({"model": "m", "evaluate": {"margin_frac": 0}}, "is 0: expected a number above 0.0."),
        ({"model": "m", "calibrate": {"smooth_fracs": []}}, "is []: expected 1 or more entries."),
        (
            {"model": "m", "quantize": {"scheme": "w8a1"}},
            "`quantize.scheme` is 'w8a1': expected `none`, or `w` with 2, 4 or 8, followed for static "
            "activations by `a` with 2 to 8.",
        ),
        (
            {"model": "m", "quantize": {"mixed": {"lm_head": "w5"}}},
            "`quantize.mixed[...]` is {'lm_head': 'w5'}: expected `none`, or `w` with 2, 4 or 8",
        ),
        (
            {"model": "m", "prune": {"pattern": "two"}},
            "is 'two': expected `unstructured`, or n:m such as 2:4.",
        ),
        (
            {"model": "m", "prune": {"sparsityfrac": 0.5}},
            "`prune.sparsityfrac`; did you mean `sparsity_frac`?",
        ),
        ({"model": "m", "prune": "wanda"}, "`prune` is 'wanda': expected `object`, got `str`."),
        ({}, "missing required field `model`"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(data, {}, what="recipe.yaml")
    assert str(caught.value).startswith("recipe.yaml: ")
    assert sentence in str(caught.value)
    assert str(caught.value).endswith((".", "?")) and not str(caught.value).endswith("?.")
    assert caught.value.exit_code == ExitCode.USAGE


def test_flags_win_over_the_file_and_keep_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nquantize: {scheme: w4, block_size: 64}\n")
    recipe = read_recipe(path, {"quantize.scheme": "w8a8", "evaluate.limit": 3})
    assert (recipe.quantize.scheme, recipe.quantize.block_size) == ("w8a8", 64)
    assert recipe.evaluate.limit == 3


def test_paths_in_a_recipe_are_relative_to_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "r.yaml"
    path.parent.mkdir()
    path.write_text(
        "model: m\nbase: ../b\ncalibrate: {data: c.jsonl}\n"
        "evaluate: {suites: [{name: refusal}, {name: xstest, path: x.csv}]}\n"
    )
    recipe = read_recipe(path, {})
    assert recipe.model == str(tmp_path / "sub" / "m")
    assert recipe.base == str(tmp_path / "b")
    assert recipe.calibrate.data == str(tmp_path / "sub" / "c.jsonl")
    assert recipe.evaluate.suites[1].path == str(tmp_path / "sub" / "x.csv")


def test_a_hub_name_in_a_recipe_stays_one_unless_such_a_path_exists(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: owner/name\nbase: here/too\nrevision: abc\n")
    (tmp_path / "here" / "too").mkdir(parents=True)
    recipe = read_recipe(path, {})
    assert (recipe.model, recipe.revision) == ("owner/name", "abc")
    assert recipe.base == str(tmp_path / "here" / "too")


def test_the_effective_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = make_recipe(
        {
            "model": "/m",
            "base": "/b",
            "seed": 7,
            "prune": {"method": "wanda", "sparsity_frac": 0.2},
        },
        {"calibrate.alphas": [0.0, 0.2]},
        what="flags",
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(recipe))
    assert read_recipe(path, {}) == recipe
    assert set(encode(recipe)) == {field.name for field in msgspec.structs.fields(Recipe)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: [", "is not a readable YAML recipe"),
        ("- a\n- b\n", "expected a mapping of keys, found list"),
        ("!!python/object/apply:os.system ['true']", "is not a readable YAML recipe"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=sentence):
        read_recipe(path, {})


def test_a_recipe_is_frozen() -> None:
    recipe = make_recipe({"model": "m"}, {}, what="flags")
    with pytest.raises(AttributeError):
        recipe.seed = 1  # type: ignore[misc]
