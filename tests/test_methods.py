"""The methods by name, their rates, and the variations of Figure 2."""

from dataclasses import asdict

import pytest

from fishmask.methods import ABLATIONS, METHODS, ablation, variants
from fishmask.recipe import Recipe

COMMON = Recipe(epochs=7, density=0.01, examples=99)


def test_every_method_is_a_recipe_of_its_own_with_the_common_settings():
    found = variants(None, COMMON)
    assert [variant.name for variant in found] == [name.replace("-", " ") for name in METHODS]
    # The library's own recipe may be one of the others.
    recipes = [asdict(variant.recipe) for variant in found if variant.name != "robust"]
    assert all(recipe not in recipes[:i] for i, recipe in enumerate(recipes))
    for variant, method in zip(found, METHODS.values(), strict=True):
        assert (variant.recipe.epochs, variant.recipe.density, variant.recipe.examples) == (7, 0.01, 99)
        assert (variant.rates, variant.batch_sizes) == (method.rates, (8, 16))


def test_the_papers_method_is_the_papers():
    recipe = variants(["fish-paper"], Recipe())[0].recipe
    assert (recipe.method, recipe.labels, recipe.score, recipe.density) == ("fish", "given", "square", 0.005)
    assert (recipe.examples, recipe.clip, recipe.weight_decay, recipe.max_length) == (1024, 1.0, 0.0, 128)
    assert (recipe.warm_up_head, recipe.keep, recipe.exclude) == (0, (), ())
    assert METHODS["fish-paper"].rates == (1e-4, 5e-5, 1e-5)


def test_rates_for_one_method_go_before_those_for_all():
    found = variants(["lora", "random", "full"], COMMON, {"": (1e-3, 3e-3), "full": (1e-5,)}, (32,))
    assert [(variant.name, variant.rates) for variant in found] == [
        ("lora", (1e-3, 3e-3)), ("random", (1e-3, 3e-3)), ("full", (1e-5,)),
    ]  # fmt: skip
    assert all(variant.batch_sizes == (32,) for variant in found)


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="no method 'bitfit', 'fisch'; expected some of full, "):
        variants(["full", "fisch"], COMMON, {"bitfit": (1e-3,)})


@pytest.mark.parametrize("setting", ABLATIONS)
def test_an_ablation_varies_one_setting_and_nothing_else(setting):
    base = variants(["fish-paper"], COMMON)
    found = ablation(base, setting)
    assert [getattr(variant.recipe, setting) for variant in found] == list(ABLATIONS[setting])
    for variant in found:
        same = {name: value for name, value in asdict(variant.recipe).items() if name != setting}
        assert same == {name: value for name, value in asdict(base[0].recipe).items() if name != setting}
        assert (variant.name, variant.rates, variant.batch_sizes) == ("fish paper", base[0].rates, base[0].batch_sizes)


def test_values_of_ones_own():
    found = ablation(variants(["fish-paper", "random"], COMMON), "density", ["0.5", "1e-3"])
    assert [(variant.name, variant.recipe.density) for variant in found] == [
        ("fish paper", 0.5), ("fish paper", 0.001), ("random", 0.5), ("random", 0.001),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "values", "message"),
    [
        ("density", ["5"], "density must be a fraction"),
        ("density", ["x"], "density takes values like 0.0002, 0.001"),
        ("examples", ["1e3"], "examples takes values like 32, 256"),
        ("examples", ["0"], "examples must be above 0"),
        ("labels", ["given", "guessed"], "labels takes values like given, expected, sampled; got given, guessed"),
        ("score", ["cube"], "score takes values like square, absolute"),
    ],
)
def test_values_that_do_not_suit_are_refused(setting, values, message):
    with pytest.raises(ValueError, match=message):
        ablation(variants(["fish-paper"], COMMON), setting, values)
