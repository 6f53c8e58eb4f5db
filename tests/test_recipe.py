import dataclasses

import pytest
import yaml

from chronomoe.errors import InputError
from chronomoe.models.configuration import parse
from chronomoe.pretraining.config import PretrainConfig
from chronomoe.recipe import RunConfig, dump, load_recipe, recipe_names

SMALLEST = {"domains": [{"data": "demo:traffic"}]}


def config(values):
    return parse(SMALLEST | values, RunConfig, source="mine.yaml")


EVERY = [(name, kind) for kind in (RunConfig, PretrainConfig) for name in recipe_names(kind)]


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_every_shipped_recipe_is_accepted(name, kind):
    assert isinstance(load_recipe(name, kind), kind)


def test_the_recipes_of_the_readme_ship():
    assert {"chronos-2", "demo", "demo-route2", "demo-route3", "demo-routes", "ci"} == set(recipe_names())
    assert recipe_names(PretrainConfig) == ["tiny-teacher"]


def test_recipes_of_one_kind_are_not_offered_for_another():
    with pytest.raises(InputError, match=r"Unknown recipe 'tiny-teacher'\. Available: chronos-2, ci, demo"):
        load_recipe("tiny-teacher")
    with pytest.raises(InputError, match=r"Unknown recipe 'demo'\. Available: tiny-teacher, or"):
        load_recipe("demo", PretrainConfig)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_a_dumped_recipe_loads_back_equal(name, kind, tmp_path):
    recipe = load_recipe(name, kind)
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load_recipe(str(tmp_path / "again.yaml"), kind) == recipe


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("domains: [{data: 'demo:web'}]\nbudget:\n  steps: 5\n  steps: 6\n")
    with pytest.raises(InputError, match=r"mine.yaml is not a YAML file: the key 'steps' stands twice.*line 3"):
        load_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("name", ["a/b", "..", "", " ", "a\\b"])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(InputError, match="must not be empty, contain a slash or start with a dot"):
        config({"domains": [{"data": "demo:web", "name": name}]})


def test_every_field_survives_a_round_trip():
    changed = config(
        {
            "domains": [{"data": "a.csv", "target": ["x", "y"], "known_covariates": ["promo"], "seasonality": 7}],
            "student": {"num_layers": 1, "d_model": 32},
            "moe": {"router": {"hidden_sizes": [8, 4]}, "routing": {"threshold": 0.5}, "balance": {"kind": "switch"}},
            "experts": {"clusters": 3, "select": 2, "branch": False},
            "evaluation": {"top_k": []},
        }
    )
    assert parse(yaml.safe_load(dump(changed)), RunConfig, source="again") == changed
    assert changed.domains[0].target == ("x", "y")
    assert changed.student.d_model == 32


def test_what_is_not_given_has_its_default():
    recipe = config({"budget": {"steps": 5}})
    assert recipe.budget == dataclasses.replace(RunConfig(domains=recipe.domains).budget, steps=5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"techer": "tiny"}, "mine.yaml: unknown key 'techer' at the top. .*Did you mean 'teacher'"),
        ({"budget": {"step": 3}}, "unknown key 'step' in budget. .*Did you mean 'steps'"),
        ({"moe": {"routing": {"topk": 3}}}, "unknown key 'topk' in moe.routing. .*Did you mean 'top_k'"),
        ({"domains": [{"data": "a.csv"}, {"dta": "b.csv"}]}, r"unknown key 'dta' in domains\[1\]. .*'data'"),
        ({"student": {"layers": 2}}, "unknown key 'layers' in student. .*Did you mean 'num_layers'"),
        ({3: 4}, "unknown key 3 at the top. Available: domains, held_out, teacher"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_at_any_depth(values, message):
    with pytest.raises(InputError, match=message):
        config(values)


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"budget": {"steps": "many"}}, "budget.steps"),
        ({"budget": {"steps": 1.5}}, "budget.steps"),
        ({"budget": 3}, "budget"),
        ({"windows": None}, "windows"),
        ({"seed": [1]}, "seed"),
        ({"router_part": "test"}, "router_part"),
        ({"domains": "demo:traffic"}, "domains"),
        ({"domains": [{"name": "x"}]}, r"domains\[0\].data"),
        ({"evaluation": {"top_k": 2}}, "evaluation.top_k"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_place(values, place):
    with pytest.raises(InputError, match=f"mine.yaml: {place} ") as caught:
        config(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"domains": []}, "at least one domain"),
        ({"moe": {"routing": {"top_k": 0}}}, "top_k must be at least 1, got 0"),
        ({"evaluation": {"top_k": [0, 1]}}, r"evaluation.top_k\[0\] must be at least 1, got 0"),
        ({"budget": {"generalist_share": 1.0}}, "generalist_share must be below 1, got 1.0"),
        ({"budget": {"generalist_share": -0.1}}, "generalist_share"),
        ({"budget": {"steps": 0}}, "steps must be at least 1, got 0"),
        ({"budget": {"windows": -1}}, "windows must be at least 1, got -1"),
        ({"budget": {"learning_rate": -1e-3}}, "learning_rate must be above 0, got -0.001"),
        ({"joint": {"steps": -1}}, "steps must be at least 0, got -1"),
        ({"joint": {"expert_learning_rate": 0}}, "expert_learning_rate must be above 0, got 0"),
        ({"experts": {"own_share": 0}}, "own_share must be above 0, got 0"),
        ({"experts": {"clusters": 0}}, "clusters must be at least 1, got 0"),
        ({"experts": {"select": 0}}, "select must be at least 1, got 0"),
        ({"evaluation": {"windows_per_domain": 0}}, "windows_per_domain must be at least 1, got 0"),
        ({"evaluation": {"bootstrap_draws": 0}}, "bootstrap_draws must be at least 1"),
        ({"router_windows": 0}, "router_windows must be at least 1, got 0"),
        ({"windows": {"horizon": 0}}, "horizon must be at least 1, got 0"),
        ({"windows": {"context_length": 8}}, "min_context_length must be from 1 to context_length"),
        ({"loss": {"soft_weight": 2}}, "soft_weight"),
    ],
)
def test_an_impossible_value_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        config(values)


@pytest.mark.parametrize("content", [b"domains: [", b"\xff\x00bad", b"a: b: c", b"\t- x"])
def test_a_file_that_is_not_yaml_is_refused(tmp_path, content):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(InputError, match="mine.yaml is not a YAML file") as caught:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "just text", "- a\n- b"])
def test_a_file_without_keys_is_refused(tmp_path, content):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(InputError, match="must hold keys and values"):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"Unknown recipe 'dmeo'. Available: .*demo.*Did you mean 'demo'\?"):
        load_recipe("dmeo")


def test_a_missing_recipe_file_is_refused():
    with pytest.raises(InputError, match=r"there is no recipe file nowhere/mine.yaml; .*demo"):
        load_recipe("nowhere/mine.yaml")
