"""Recipes: what loads, what is refused, and in which words."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rlhf_kit import recipe_warnings, yaml12
from rlhf_kit.recipe import Recipe, RecipeError, load_recipe
from rlhf_kit.recipe_plan import plan
from rlhf_kit.recipe_warnings import warnings
from rlhf_kit.rewards.implicit_prm import ImplicitPrmConfig
from rlhf_kit.trainers.config import Ppo, Reward, Sft
from rlhf_kit.world_size import world_size_of

REPOSITORY = Path(__file__).parents[1]

PIPELINE = """
name: demo
seed: 3
stages:
  sft:
    type: sft
    model: {type: scratch, vocabulary: running_sums}
    data: {type: running_sums, size: 100}
    trainer: {args: {max_steps: 10, learning_rate: 1e-3}}
  prm:
    type: reward
    model: {path: "${stages.sft.model}"}
    data: {type: sampled, model: "${stages.sft.model}", prompts: "${stages.sft.data}", verifier: exact}
  ppo:
    type: ppo
    model: {path: "${stages.sft.model}"}
    data: {type: running_sums, size: "${stages.sft.data.size}"}
    rewards:
      - {type: verifier, verifier: exact}
      - {type: implicit_prm, path: "${stages.prm.model}", beta: 0.1, online: {}}
    credit: {estimator: prime}
    trainer: {args: {per_device_train_batch_size: 8, num_generations: 4, max_steps: 5}}
"""

SINGLE = """
type: ppo
model: {type: scratch, vocabulary: running_sums}
data: {type: running_sums, size: 100}
rewards:
  - {type: verifier, verifier: exact}
credit: {estimator: rloo}
trainer: {args: {per_device_train_batch_size: 8, num_generations: 4, max_steps: 5}}
"""

REWARD = """
type: reward
model: {type: scratch, vocabulary: running_sums}
data: {type: sampled, model: some/model, prompts: {type: running_sums, size: 10}, verifier: exact}
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str, world_size: int = 1) -> Recipe:
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe("recipe.yaml", overrides, world_size)


def lines(text: str, *overrides: str, world_size: int = 1) -> list[str]:
    """The lines of the error, each without its `recipe.yaml: `."""
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides, world_size=world_size)
    found = str(caught.value).splitlines()
    assert all(line.startswith("recipe.yaml: ") for line in found)
    return [line.removeprefix("recipe.yaml: ") for line in found]


def ppo_of(recipe: Recipe) -> Ppo:
    stage = recipe.stages["ppo"]
    assert isinstance(stage, Ppo)
    return stage


# --- what loads ---


def test_a_pipeline_is_its_stages_in_the_order_of_the_file() -> None:
    recipe = load(PIPELINE)
    assert list(recipe.stages) == ["sft", "prm", "ppo"]
    assert [type(stage) for stage in recipe.stages.values()] == [Sft, Reward, Ppo]
    assert recipe.run_folder == Path("runs/demo")
    assert recipe.stage_folder("ppo") == Path("runs/demo/ppo")


def test_references_become_the_paths_of_outputs() -> None:
    recipe = load(PIPELINE, "runs_dir=elsewhere", "name=other")
    assert ppo_of(recipe).model.path == "elsewhere/other/sft/model"  # pyright: ignore
    prm = ppo_of(recipe).rewards[1]
    assert isinstance(prm, ImplicitPrmConfig)
    assert prm.path == "elsewhere/other/prm/model"
    assert Path(prm.path) in recipe.outputs("prm")


def test_a_ppo_stage_leaves_a_prm_for_later_stages() -> None:
    later = "stages.again={type: reward, model: {path: '${stages.ppo.prm}'}, data: '${stages.prm.data}'}"
    assert load(PIPELINE, later).stages["again"].model.path == "runs/demo/ppo/prm"  # pyright: ignore


def test_other_interpolations_are_omegaconfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/somewhere")
    recipe = load(PIPELINE, "runs_dir=${oc.env:PLACE}", "stages.sft.data.seed=${seed}")
    assert recipe.run_folder == Path("/somewhere/demo")
    assert recipe.stages["sft"].data.seed == 3  # pyright: ignore
    assert ppo_of(recipe).data.size == 100  # pyright: ignore
    assert recipe.stages["prm"].data.prompts == recipe.stages["sft"].data.model_copy(update={"seed": 3})  # pyright: ignore


def test_a_single_stage_needs_no_stages_and_writes_into_the_run_folder() -> None:
    recipe = load(SINGLE)
    assert list(recipe.stages) == ["ppo"]
    assert recipe.name == "recipe"
    assert recipe.stage_folder("ppo") == recipe.run_folder == Path("runs/recipe")


def test_a_pipeline_of_one_stage_gives_it_a_folder() -> None:
    recipe = load(PIPELINE, "~stages.prm", "~stages.ppo")
    assert recipe.stage_folder("sft") == Path("runs/demo/sft")


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load(PIPELINE, "runs_dir='~/runs'")
    assert recipe.run_folder == Path("/home/someone/runs/demo")
    assert ppo_of(recipe).model.path == "/home/someone/runs/demo/sft/model"  # pyright: ignore


def test_the_seed_reaches_every_trainer_that_has_none_of_its_own() -> None:
    recipe = load(PIPELINE, "seed=7", "stages.prm.trainer.args.seed=1")
    assert {name: stage.trainer.args["seed"] for name, stage in recipe.stages.items()} == {
        "sft": 7,
        "prm": 1,
        "ppo": 7,
    }
    assert "data_seed" not in recipe.stages["sft"].trainer.args


def test_a_model_is_pretrained_unless_said_otherwise() -> None:
    text = SINGLE.replace("{type: scratch, vocabulary: running_sums}", "{path: some/model, peft: {r: 4}}")
    model = ppo_of(load(text)).model
    assert model.type == "pretrained"
    assert model.peft is not None and model.peft.r == 4


def test_scalars_are_yaml_1_2() -> None:
    recipe = load(SINGLE, "trainer.args.learning_rate=1e-6", "trainer.args.eval_strategy=no")
    args = recipe.stages["ppo"].trainer.args
    assert args["learning_rate"] == 1e-6
    assert args["eval_strategy"] == "no"


def test_a_number_in_quotes_is_a_number_to_the_trainer() -> None:
    assert load(SINGLE, "trainer.args.learning_rate='1e-6'").stages["ppo"].trainer.args["learning_rate"] == 1e-6


def test_anchors_and_merge_keys_are_yamls() -> None:
    text = PIPELINE.replace("data: {type: running_sums, size: 100}", "data: &d {type: running_sums, size: 100}")
    text = text.replace('{type: running_sums, size: "${stages.sft.data.size}"}', "{<<: *d, seed: 5}")
    data = ppo_of(load(text)).data
    assert (data.size, data.seed) == (100, 5)  # pyright: ignore


def test_a_byte_order_mark_is_no_part_of_the_recipe() -> None:
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbf" + SINGLE.strip().encode())
    assert list(load_recipe("bom.yaml").stages) == ["ppo"]


# --- overrides ---


def test_overrides_reach_list_items_and_new_keys_and_are_yaml() -> None:
    recipe = load(
        PIPELINE,
        "stages.ppo.rewards.0.weight=0.5",
        "stages.ppo.rewards.1.online.learning_rate=1e-5",
        "stages.ppo.credit.kl={coefficient: 0.1}",
        "stages.ppo.stop_strings=['#', '=']",
    )
    ppo = ppo_of(recipe)
    assert ppo.rewards[0].weight == 0.5
    assert ppo.rewards[1].online.learning_rate == 1e-5  # pyright: ignore
    assert ppo.credit.kl.coefficient == 0.1
    assert ppo.stop_strings == ("#", "=")


def test_an_override_replaces_a_mapping_and_keeps_the_rest() -> None:
    ppo = ppo_of(load(PIPELINE, "stages.ppo.rewards.1={type: implicit_prm, path: some/prm}"))
    assert ppo.rewards[1].beta == 0.05  # pyright: ignore
    assert ppo.rewards[0].type == "verifier"


def test_an_empty_override_is_null() -> None:
    text = SINGLE + "accuracy_band: {low: 0.1}\n"
    assert ppo_of(load(text)).accuracy_band is not None
    assert ppo_of(load(text, "accuracy_band=")).accuracy_band is None


def test_a_later_override_wins() -> None:
    assert load(SINGLE, "seed=1", "seed=2").seed == 2


def test_a_tilde_deletes_a_list_item() -> None:
    recipe = load(PIPELINE, "~stages.ppo.rewards.1", "stages.ppo.credit.estimator=rloo")
    assert [source.type for source in ppo_of(recipe).rewards] == ["verifier"]


def test_a_tilde_deletes_a_key() -> None:
    recipe = load(PIPELINE, "~stages.ppo.trainer.args.max_steps")
    assert "max_steps" not in recipe.stages["ppo"].trainer.args


def test_an_override_can_add_a_stage() -> None:
    recipe = load(PIPELINE, "stages.more={type: sft, model: {path: '${stages.ppo.model}'}, data: '${stages.sft.data}'}")
    assert list(recipe.stages)[-1] == "more"


def test_an_override_fills_a_place_left_open() -> None:
    text = SINGLE.replace("{type: running_sums, size: 100}", "\n  type: running_sums\n  size: ???")
    assert lines(text) == ["data.size: has no value yet (value '???'); give it one: data.size=..."]
    assert ppo_of(load(text, "data.size=7")).data.size == 7  # pyright: ignore


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("foo", ["malformed override (value 'foo')", "key=value"]),
        ("=3", ["malformed override (value '=3')"]),
        ("a..b=3", ["malformed override"]),
        ("~stages.ppo.rewards.1=x", ["malformed override", "~key"]),
        ("~", ["malformed override"]),
        (
            "stages.ppo.credit.gama=0.9",
            ["stages.ppo.credit.gama: unknown key (value 0.9)", "did you mean 'gamma'?"],
        ),
        ("stages.ppo.rewards.2.weight=1", ["a list without item '2'", "has 2 items"]),
        ("stages.ppo.rewards.-1.weight=1", ["a list without item '-1'"]),
        ("stages.ppo.rewards.first.weight=1", ["a list without item 'first'"]),
        ("stages.pp0.credit.gamma=1", ["no stage 'pp0'", "did you mean 'ppo'?"]),
        ("~stages.ppo.critc", ["stages.ppo.critc: override: nothing to delete there"]),
        ("~stages.ppo.trainer.args.max_step", ["nothing to delete", "did you mean 'max_steps'?"]),
        ("~stages.ppo.rewards.5", ["a list without item '5'"]),
        ("seed=[1", ["seed: override", "not valid YAML"]),
        ("stages.sft.data={size: 1, size: 2}", ["duplicate key"]),
        ("seed=${", ["malformed interpolation"]),
        ("max_steps=3", ["max_steps: unknown key (value 3)", "write stages.ppo.trainer.args.max_steps"]),
        ("credit.gamma=1", ["credit: unknown key", "write stages.ppo.credit"]),
    ],
)
def test_an_override_that_cannot_be_applied_is_one_line(override: str, fragments: list[str]) -> None:
    (line,) = lines(PIPELINE, override)
    for fragment in fragments:
        assert fragment in line


# --- files that are no recipe ---


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"", ["recipe.yaml: the file is empty"]),
        (b"# only a comment\n", ["the file is empty"]),
        (b"null\n", ["the file is empty"]),
        (b"- type: sft\n- type: ppo\n", ["expected a mapping of keys to values, got a list", "stages"]),
        (b"just text\n", ["expected a mapping", "got a single value"]),
        (b"type: sft\nmodel: {path: x\ndata: 3\n", ["line 3, column", "not valid YAML"]),
        (b"type: sft\n\tmodel: 3\n", ["line 2, column 1", "not valid YAML"]),
        (b"type: sft\nmodel: !!python/object:os.system {}\n", ["line 2", "not valid YAML"]),
        (b"a: 1\n---\nb: 2\n", ["line 2", "expected a single document"]),
        (b"type: sft\nseed: 1\nseed: 2\n", ["seed: duplicate key, on lines 2 and 3", "keep one"]),
        (b"a:\n  - b: {c: 1,\n        c: 2}\n", ["a.0.b.c: duplicate key, on lines 2 and 3"]),
        (b"type: sft\n1: 2\n", ["line 2: a key must be text (value '1')", "quotes"]),
        (b"a: &x\n  b: *x\n", ["an anchor that contains itself"]),
        (
            "name: Ünïcode\n".encode("latin-1"),
            ["byte 0xdc at offset 6 is not UTF-8", "save the file as UTF-8"],
        ),
        ("type: sft\n".encode("utf-16"), ["is not UTF-8"]),
        (gzip.compress(b"type: sft\n"), ["is not UTF-8"]),
        (b"name: a\x00b\n", ["not valid YAML"]),
        (b"name: demo\n", ["type: required key is missing", "sft, reward, segment, pairs, preference, "]),
        (b"tpye: sft\n", ["tpye: unknown key (value 'sft')", "did you mean 'type'?"]),
        (b"stage: {sft: {type: sft}}\n", ["stage: unknown key", "did you mean 'stages'?"]),
        (b"stages: [1]\n", ["stages: expected a mapping of named stages, got a list"]),
        (b"stages:\n", ["stages: expected a mapping of named stages, got null"]),
        (b"stages: {}\n", ["stages: expected a mapping of named stages, got an empty mapping"]),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(content: bytes, fragments: list[str]) -> None:
    Path("recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    (line,) = str(caught.value).splitlines()
    for fragment in fragments:
        assert fragment in line


def test_a_missing_file_names_its_neighbours() -> None:
    Path("quickstart.yaml").write_text(SINGLE)
    with pytest.raises(RecipeError, match=r"quickstrat\.yaml: no such recipe file; did you mean quickstart\.yaml\?"):
        load_recipe("quickstrat.yaml")
    with pytest.raises(RecipeError, match=r"zzz\.yml: no such recipe file; the folder has quickstart\.yaml"):
        load_recipe("zzz.yml")
    with pytest.raises(RecipeError, match="no such recipe file; check the path"):
        load_recipe("nowhere/recipe.yaml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


# --- fields ---


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["rewards.0.weigth=0.5"], ["rewards.0.weigth: unknown key (value 0.5); did you mean 'weight'?"]),
        (["creditt={}"], ["creditt: unknown key", "did you mean 'credit'?"]),
        (["credit.xyzzy=1"], ["credit.xyzzy: unknown key (value 1)", "the keys here are estimator, gamma"]),
        (
            ["rewards.0.type=verifer"],
            ["rewards.0.type: unknown type (value 'verifer')", "did you mean 'verifier'?"],
        ),
        (
            ["type=pp0"],
            ["type: unknown type (value 'pp0'); did you mean 'ppo'? (choices: sft, reward, segment, "],
        ),
        (["type=3"], ["type: unknown type (value 3)", "choices: sft, reward, segment, "]),
        (["model.type=scrach"], ["model.type: unknown type (value 'scrach'); did you mean 'scratch'?"]),
        (["data.type=josnl"], ["data.type: unknown type (value 'josnl'); did you mean 'jsonl'?"]),
        (["~data.type"], ["data.type: required key is missing", "jsonl, parquet, hub"]),
        (["~rewards.0.verifier"], ["rewards.0.verifier: required key is missing"]),
        (["~credit"], ["credit: required key is missing; add `credit: ...`"]),
        (["credit=gae"], ["credit: expected a mapping, got text (value 'gae')", "its keys are estimator"]),
        (
            ["model=some/model"],
            ["model: expected a mapping, got text", "write {type: pretrained, path: some/model}"],
        ),
        (["data=[1]"], ["data: expected a mapping, got a list (value [1])", "type"]),
        (["credit.gamma=high"], ["credit.gamma: expected a number, got text (value 'high')"]),
        (["credit.gamma=2"], ["credit.gamma: must be less than or equal to 1 (value 2)"]),
        (["credit.gamma=.nan"], ["credit.gamma", "finite", "nan"]),
        (["rewards.0.weight=.inf"], ["rewards.0.weight", "inf"]),
        (["credit.whiten=maybe"], ["credit.whiten: expected true or false, got text (value 'maybe')"]),
        (
            ["credit.estimator=gea"],
            ["credit.estimator: not a valid choice (value 'gea'); did you mean 'gae'?", "rloo"],
        ),
        (["credit.estimator=[gae]"], ["credit.estimator: not a valid choice (value ['gae'])"]),
        (["data.size=ten"], ["data.size: expected an integer, got text (value 'ten')"]),
        (["data.size=1.5"], ["data.size: expected an integer, got a number (value 1.5)"]),
        (["data.size=true"], ["data.size: expected a number, got true or false (value True); write a number"]),
        (["rewards.0.weight=true"], ["rewards.0.weight: expected a number, got true or false"]),
        (["data.size=0"], ["data.size: must be greater than 0 (value 0)"]),
        (["data.size="], ["data.size: expected an integer, got null"]),
        (
            ["rewards.0.weight=heavy"],
            ["rewards.0.weight: expected a number or a mapping, got text (value 'heavy')"],
        ),
        (["rewards.0.weight={start: 1, end: 0}"], ["rewards.0.weight.steps: required key is missing"]),
        (
            ["rewards.0.weight={start: 1, end: 0, steps: 2, stop: 3}"],
            ["weight.stop: unknown key (value 3)", "'steps'"],
        ),
        (
            ["rewards.0.name=5"],
            ['rewards.0.name: expected text, got an integer (value 5); put it in quotes: "5"'],
        ),
        (["rewards=[]"], ["rewards: needs at least 1 item"]),
        (["rewards={type: verifier}"], ["rewards: expected a list, got a mapping"]),
        (["stop_strings=x"], ["stop_strings: expected a list, got text (value 'x'); write [x]"]),
        (["rewards.0=verifier"], ["rewards.0: expected a mapping, got text (value 'verifier')"]),
        (["trainer.args=[1]"], ["trainer.args: expected a mapping, got a list"]),
        (
            ["trainer.max_steps=3"],
            ["trainer.max_steps: unknown key (value 3)", "write trainer.args.max_steps"],
        ),
        (["max_steps=3"], ["max_steps: unknown key (value 3)", "write trainer.args.max_steps"]),
        (
            ["trainer.args.max_stepz=3"],
            ["trainer.args.max_stepz: unknown argument of trl.GRPOConfig (value 3)"],
        ),
        (["name=a/b"], ["name: must be a plain name (value 'a/b')"]),
        (["name=.."], ["name: must be a plain name"]),
        (["name=2024"], ['name: expected text, got an integer (value 2024); put it in quotes: "2024"']),
        (["seed=-1"], ["seed: must be greater than or equal to 0 (value -1)"]),
        (["seed=x"], ["seed: expected an integer, got text (value 'x')"]),
        (["runs_dir="], ["runs_dir: expected text, got null"]),
        (
            ["model.hidden_size=130"],
            ["model.hidden_size: is no multiple of num_attention_heads (4) (value 130)"],
        ),
        (["data.prompt_template=hello"], ["data: ", "{prompt}"]),
    ],
)
def test_a_wrong_field_is_named_with_value_and_remedy(overrides: list[str], fragments: list[str]) -> None:
    (line,) = lines(SINGLE, *overrides)
    for fragment in fragments:
        assert fragment in line


def test_paths_have_no_trace_of_unions() -> None:
    assert lines(PIPELINE, "stages.ppo.rewards.1.beta=-1") == [
        "stages.ppo.rewards.1.beta: must be greater than 0 (value -1)"
    ]
    assert lines(SINGLE, "rewards.0.verifier=exakt")[0].startswith("rewards.0.verifier: not a valid choice")


def test_a_stage_name_is_a_folder_name() -> None:
    (line,) = lines(
        PIPELINE.replace("  sft:", "  s/t:").replace("stages.sft", "stages.s/t"), "~stages.prm", "~stages.ppo"
    )
    assert "must be a plain name" in line


def test_a_long_value_is_cut_short() -> None:
    (line,) = lines(SINGLE, f"rewards.0.verifier={'x' * 500}")
    assert len(line) < 250
    assert "..." in line


def test_every_problem_is_reported_at_once() -> None:
    found = lines(
        PIPELINE,
        "stages.ppo.data.sizes=3",
        "stages.prm.objective=bce",
        "stages.prm.model.path=${stages.ppo.model}",
        "stages.ppo.credit.gamma=high",
        "stages.ppo.trainer.args.num_generatons=3",
        "stages.ppo.data.seed=${nothing}",
        "nonsense",
        "seed=1.5",
    )
    places = (
        "stages.ppo.data.sizes",
        "stages.prm.objective",
        "stages.prm.model.path",
        "stages.ppo.credit.gamma",
    )
    places += (
        "stages.ppo.trainer.args.num_generatons",
        "stages.ppo.data.seed",
        "malformed override",
        "seed:",
    )
    assert len(found) == len(places)
    for place in places:
        assert sum(line.startswith(place) for line in found) == 1


def paths_of(node: object, path: str = "") -> list[str]:
    """Every dotted path of a recipe."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    inner = [deeper for key, value in items for deeper in paths_of(value, f"{path}.{key}" if path else str(key))]
    return [path, *inner] if path else inner


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["ppo", "sft"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "path", "x"]), inner, max_size=2)
    ),
    max_leaves=3,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.sampled_from([PIPELINE, SINGLE, REWARD]), st.data())
def test_a_recipe_with_any_field_replaced_loads_or_is_refused_in_lines(text: str, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(paths_of(yaml.safe_load(text))))
    value = yaml.safe_dump(data.draw(VALUES), default_flow_style=True, width=10_000).split("\n")[0]
    try:
        assert load(text, f"{path}={value}").stages
    except RecipeError as error:
        assert all(line.startswith("recipe.yaml: ") for line in str(error).splitlines())
        assert all(problem.message for problem in error.problems)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.binary(max_size=60) | st.text("{}[]:,-&*!|>'\"%@`#?~$. \n\tab1", max_size=30).map(str.encode))
def test_any_file_loads_or_is_refused_in_lines(content: bytes) -> None:
    Path("recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    assert all(line.startswith("recipe.yaml: ") for line in str(caught.value).splitlines())


# --- stages and references ---


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("stages.ppo.model.path=${stages.stf.model}", ["there is no stage 'stf'", "did you mean 'sft'?"]),
        (
            "stages.sft.model={path: '${stages.ppo.model}'}",
            ["stages.sft.model.path: stage 'ppo' comes later", "sft, prm"],
        ),
        ("stages.ppo.model.path=${stages.ppo.model}", ["a stage cannot start from its own output"]),
        ("stages.ppo.model.path=${stages.sft.prm}", ["stage 'sft' (type sft) has no output 'prm'", "model"]),
        ("stages.ppo.model.path=${stages.sft.modle}", ["has no output 'modle'", "did you mean 'model'?"]),
        ("runs_dir=${stages.sft.model}", ["runs_dir: a stage's output is for later stages alone"]),
        (
            "stages.ppo.data.size=${stages.sft.data.sice}",
            ["Interpolation key 'stages.sft.data.sice' not found"],
        ),
        ("stages.ppo.data.size=${nowhere}", ["(value '${nowhere}')", "name an existing key"]),
        (
            "stages.sft.model.config={a: '${oc.env:SURELY_NOT_SET}'}",
            ["SURELY_NOT_SET", "${oc.env:NAME,default}"],
        ),
        ("stages.ppo.data.size=${foo:1}", ["Unsupported interpolation type foo"]),
    ],
)
def test_a_broken_reference_is_one_line(override: str, fragments: list[str]) -> None:
    (line,) = lines(PIPELINE, override)
    for fragment in fragments:
        assert fragment in line


def test_a_broken_interpolation_under_a_key_with_a_dot_is_reported() -> None:
    (line,) = lines(SINGLE, "data.columns={a.b: '${nowhere}'}")
    assert line.startswith("data.columns.a.b: Interpolation key 'nowhere' not found")


def test_references_that_go_in_a_circle_are_reported() -> None:
    found = lines(SINGLE, "data.seed=${data.skip}", "data.skip=${data.seed}")
    assert len(found) == 2
    assert all("Recursive interpolation" in line for line in found)


def test_a_malformed_interpolation_is_reported_with_its_field() -> None:
    assert lines(SINGLE.replace("size: 100", 'size: "${"'))[0].startswith("data.size: malformed interpolation")


def test_a_single_stage_has_nothing_to_refer_to() -> None:
    (line,) = lines(SINGLE.replace("{type: scratch, vocabulary: running_sums}", '{path: "${stages.sft.model}"}'))
    assert "this recipe has none to refer to" in line


# --- combinations ---

PRM = "{type: implicit_prm, path: some/prm}"
ONLINE_PRM = "{type: implicit_prm, online: {}}"
JOINT_PRM = "{type: implicit_prm, online: {order: with_policy}}"
VERIFIER = "{type: verifier, verifier: exact}"
PRETRAINED = "model={type: pretrained, path: some/model}"


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (
            ["trainer.args.num_generations=3"],
            ["num_generations: does not divide the 8 completions", "(value 3)"],
        ),
        (
            ["trainer.args.num_generations=1"],
            ["num_generations", "rloo compares completions of a prompt (value 1)"],
        ),
        (["trainer.args.num_generations=1", "credit.estimator=group"], ["group compares completions"]),
        (
            ["credit.estimator=reinforce", "credit.scale=group"],
            ["credit.scale: divides by a group's deviation what reinforce does not centre"],
        ),
        (
            ["credit.estimator=prime"],
            ["credit.estimator: needs a process reward (value 'prime')", "implicit_prm"],
        ),
        (["credit.estimator=min_form"], ["credit.estimator: needs a process reward"]),
        (
            [f"rewards=[{ONLINE_PRM}]", PRETRAINED],
            ["rewards.0.online: an online PRM learns from outcomes", "add a verifier"],
        ),
        (
            [f"rewards=[{ONLINE_PRM}, {{type: function, function: f}}]", PRETRAINED],
            ["no source gives them", "bounded: true"],
        ),
        (["critic={}"], ["critic: is never used by credit.estimator rloo"]),
        (
            ["credit.estimator=gae", "critic={path: some/critic}"],
            ["critic.path: is only for critic.type model"],
        ),
        (
            ["truncation={policy: bootstrap}"],
            ["truncation.policy: needs a critic; rloo has none (value 'bootstrap')"],
        ),
        (["credit.kl={target: 6}"], ["credit.kl.target: cannot adapt a coefficient of 0"]),
        (
            ["credit.kl={coefficient: 0.1, target: 6, adaptation_horizon: 1}"],
            ["credit.kl.adaptation_horizon: is so short that one rollout of 8 completions", "write at least 2"],
        ),
        (["data.modulus=24"], ["data: needs larger numbers than model.vocabulary running_sums has (below 23)"]),
        (["accuracy_band={low: 0.9, high: 0.1}"], ["accuracy_band.low: is greater than high (value 0.9)"]),
        (["accuracy_band={}", f"rewards=[{PRM}]", PRETRAINED], ["accuracy_band: needs outcomes"]),
        (
            ["accuracy_band={}", "credit.estimator=gae", "trainer.args.num_generations=1"],
            ["trainer.args.num_generations: accuracy_band needs groups (value 1)"],
        ),
        (["evaluation={verifier: exact}"], ["evaluation: has no prompts; add eval_data"]),
        (["eval_data={type: running_sums, size: 5}"], ["eval_data: is never used; add evaluation"]),
        (
            ["data={type: sampled, model: a/b, prompts: {type: running_sums, size: 1}, verifier: exact}"],
            ["data.type: labelled samples are for reward stages, this one is ppo"],
        ),
        (
            [f"rewards=[{VERIFIER}, {VERIFIER}]"],
            ["rewards.1.name: has the same name as rewards.0 (value 'verifier')"],
        ),
        (
            [f"rewards=[{VERIFIER}, {{type: implicit_prm, reference: initial}}]", PRETRAINED],
            ["rewards.1: a frozen copy of the policy against itself rewards every token with 0"],
        ),
        ([f"rewards=[{VERIFIER}, {ONLINE_PRM}]"], ["rewards.1: an implicit PRM needs a policy with weights"]),
        (
            [f"rewards=[{VERIFIER}, {JOINT_PRM}, {{name: second, {JOINT_PRM[1:]}]", PRETRAINED],
            ["rewards.2.online.order: one PRM at most trains with the policy (value 'with_policy')"],
        ),
        (["rewards=[{type: verifier, verifier: exact, name: kl}]"], ["rewards.0.name: is a name of the kit's own"]),
        (["credit.step_pattern='('"], ["credit.step_pattern: is no regular expression", "(value '(')"]),
        (["stop_strings=['']"], ["stop_strings: the empty text would end every completion"]),
        (["trainer.args.top_p=2.0"], ["trainer.args.top_p: must be above 0 and at most 1 (value 2.0)"]),
        (["trainer.args.use_liger_kernel=true"], ["trainer.args.use_liger_kernel: has no place"]),
        (["trainer.args.eval_strategy=steps"], ["trainer.args.eval_strategy: there is nothing to evaluate on"]),
        (
            ["trainer.args.eval_on_start=true"],
            ["trainer.args.eval_on_start: there is nothing to evaluate on (value True); add eval_data and evaluation"],
        ),
        (
            ["trainer.args.eval_on_start=true", "eval_data={type: running_sums, size: 5}"],
            ["eval_data: is never used; add evaluation"],
        ),
        (
            ["credit.estimator=gae", "critic={type: model}"],
            ["critic.type: starts from the policy's weights, and a scratch policy has none", "(value 'model')", "sft"],
        ),
        (["trainer.args.load_best_model_at_end=true"], ["load_best_model_at_end: needs evaluations and checkpoints"]),
        (["trainer.args.beta=0.1"], ["trainer.args.beta: is the kit's to set (value 0.1); set credit.kl"]),
    ],
)
def test_a_combination_that_cannot_work_is_refused(overrides: list[str], fragments: list[str]) -> None:
    (line,) = lines(SINGLE, *overrides)
    for fragment in fragments:
        assert fragment in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.args.num_generations=1", "credit.estimator=reinforce"],
        ["trainer.args.num_generations=1", "credit.estimator=gae"],
        ["credit.estimator=gae"],
        ["credit.estimator=gae", "critic={}", "truncation={policy: bootstrap}"],
        ["credit.estimator=gae", "critic={type: model, path: some/critic}"],
        ["credit.estimator=gae", "critic={type: model}", PRETRAINED],
        ["trainer.args.eval_on_start=true", "evaluation={verifier: exact}", "eval_data={type: running_sums, size: 5}"],
        ["credit.estimator=prime", f"rewards=[{VERIFIER}, {ONLINE_PRM}]", PRETRAINED],
        ["credit.estimator=min_form", f"rewards=[{PRM}]", PRETRAINED],
        [f"rewards=[{{type: function, function: f, bounded: true}}, {ONLINE_PRM}]", PRETRAINED],
        ["accuracy_band={}", "credit.kl={target: 6, coefficient: 0.1}"],
        ["evaluation={verifier: exact}", "eval_data={type: running_sums, size: 5}"],
        [f"rewards=[{VERIFIER}, {{type: verifier, verifier: math, name: other}}]"],
        [f"rewards=[{VERIFIER}, {{type: implicit_prm, reference: initial, online: {{}}}}]", PRETRAINED],
    ],
)
def test_a_combination_that_works_passes(overrides: list[str]) -> None:
    assert load(SINGLE, *overrides).stages["ppo"].type == "ppo"


RESAMPLE = ["accuracy_band={mode: resample}", "trainer.args.per_device_train_batch_size=2"]


def test_resampling_needs_whole_groups_on_each_process() -> None:
    (line,) = lines(SINGLE, *RESAMPLE, world_size=2)
    assert line.startswith("accuracy_band.mode: needs whole groups on each process, and 2 rows a process")
    assert "are no multiple of 4 (value 'resample'); change per_device_train_batch_size" in line
    (line,) = lines(SINGLE, *RESAMPLE, "trainer.args.steps_per_generation=3", world_size=2)
    assert "num_generations: does not divide the 12" not in line and "6 rows a process" in line
    assert load(SINGLE, *RESAMPLE, "accuracy_band.mode=mask", world_size=2)
    assert load(SINGLE, *RESAMPLE, "trainer.args.steps_per_generation=4", world_size=2)
    assert load(SINGLE, *RESAMPLE, "trainer.args.generation_batch_size=16", world_size=2)
    (line,) = lines(SINGLE, *RESAMPLE, world_size=3)  # the rollout holds no whole groups either: said once
    assert line.startswith("trainer.args.num_generations: does not divide")


def test_the_batch_is_that_of_all_processes() -> None:
    assert load(SINGLE, "trainer.args.per_device_train_batch_size=2", world_size=2)
    (line,) = lines(SINGLE, "trainer.args.per_device_train_batch_size=2", world_size=3)
    assert "3 processes x 2 per device" in line


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["objective=dpo"], ["data.type: objective dpo learns from pairs"]),
        (["objective=nca"], ["data.type: objective nca learns from pairs"]),
        (
            ["objective=dpo", "data={type: gsm8k_solutions, path: recipe.yaml}"],
            ["data.paired", "paired: true"],
        ),
        (["data={type: gsm8k_solutions, path: recipe.yaml, paired: true}"], ["data.paired", "paired: false"]),
        (
            ["objective=kto", "data={type: gsm8k_solutions, path: recipe.yaml, paired: true}"],
            ["data.paired: objective kto learns from single completions with labels (value True)"],
        ),
        (["objective=kto", "offset=running"], ["offset: is never used by objective kto (value 'running')"]),
        (["trainer.args.beta=0.1"], ["trainer.args.beta: is the kit's to set"]),
        (["objective=bce"], ["objective: not a valid choice (value 'bce'); did you mean 'ce'?"]),
    ],
)
def test_a_reward_stage_gets_the_rows_that_its_objective_learns_from(
    overrides: list[str], fragments: list[str]
) -> None:
    (line,) = lines(REWARD, *overrides)
    for fragment in fragments:
        assert fragment in line


def test_arguments_of_a_reward_stage_are_those_of_its_objective() -> None:
    pairs = "data={type: gsm8k_solutions, path: recipe.yaml, paired: true}"
    assert load(REWARD, "objective=dpo", pairs, "trainer.args.max_length=512")
    (line,) = lines(REWARD, "trainer.args.max_length=512")
    assert "unknown argument of transformers.TrainingArguments" in line


# --- files ---


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["data={type: jsonl, path: nope.jsonl}"], "data.path: no such file (value 'nope.jsonl')"),
        (["data={type: parquet, path: nope.parquet}"], "data.path: no such file"),
        (
            ["eval_data={type: jsonl, path: nope.jsonl}", "evaluation={verifier: exact}"],
            "eval_data.path: no such file",
        ),
        (["model={path: ./nope}"], "model.path: no such model folder (value './nope')"),
        (["model={path: /nope/model}"], "model.path: no such model folder"),
        (["model={path: ~/surely/not/there}"], "model.path: no such model folder"),
        (["model={path: runs/other/sft/model}"], "model.path: no such model folder"),
        (["model={path: a/b, tokenizer: ./nope}"], "model.tokenizer: no such model folder"),
        (
            [f"rewards=[{VERIFIER}, {{type: implicit_prm, path: ./nope}}]", PRETRAINED],
            "rewards.1.path: no such model folder",
        ),
        (["credit.estimator=gae", "critic={type: model, path: ./nope}"], "critic.path: no such model folder"),
    ],
)
def test_a_missing_file_is_named(overrides: list[str], field: str) -> None:
    (line,) = lines(SINGLE, *overrides)
    assert line.startswith(field)


def test_data_beside_the_recipe_is_pointed_out(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "prompts.jsonl").write_text("{}\n")
    (folder / "recipe.yaml").write_text(SINGLE)
    overrides = ["data={type: jsonl, path: prompts.jsonl}"]
    with pytest.raises(RecipeError, match=r"start from the current directory: write recipes/prompts\.jsonl"):
        load_recipe(folder / "recipe.yaml", overrides)
    assert load_recipe(folder / "recipe.yaml", ["data={type: jsonl, path: recipes/prompts.jsonl}"])


def test_hub_ids_and_outputs_of_earlier_stages_are_not_looked_for() -> None:
    assert load(SINGLE, "model={path: some-owner/some-model}")
    assert load(SINGLE, "model={path: gpt2}")
    assert load(SINGLE, "data={type: hub, path: some/data}")
    assert load(PIPELINE, "stages.ppo.model.path=runs/demo/sft/model")
    (line,) = lines(PIPELINE, "stages.ppo.model.path=runs/demo/ppo/model")
    assert "stages.ppo.model.path: no such model folder" in line


# --- warnings ---


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["credit.kl={coefficient: 0.1, where: loss}"], "k1 in the loss has a gradient of 0 in expectation"),
        (
            ["credit.kl={coefficient: 0.1, estimator: k3}"],
            "does not give the gradient of the reverse KL (value 'k3')",
        ),
        (
            ["credit.kl={coefficient: 0.1, estimator: k2}"],
            "does not give the gradient of the reverse KL (value 'k2')",
        ),
        (["credit.lam=0.5"], "credit.lam: is used by gae alone (value 0.5)"),
        (["credit.gamma=0.9"], "credit.gamma: is used by gae and reinforce alone (value 0.9)"),
        (["credit.gamma=0.9", "credit.estimator=group"], "credit.gamma: is used by gae and reinforce alone"),
        (
            ["credit.gamma=0.9", "credit.estimator=prime", f"rewards=[{VERIFIER}, {ONLINE_PRM}]", PRETRAINED],
            "credit.gamma: is used by gae and reinforce alone",
        ),
        (
            ["credit.gamma=0.9", "credit.estimator=min_form", f"rewards=[{PRM}]", PRETRAINED],
            "credit.gamma: is used by gae and reinforce alone",
        ),
        (["credit.step_pattern=x"], "credit.step_pattern: is used by min_form alone"),
        ([f"rewards=[{VERIFIER}, {{type: implicit_prm}}]", PRETRAINED], "rewards.1: a frozen copy of the policy"),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(overrides: list[str], fragment: str) -> None:
    (warning,) = warnings(load(SINGLE, *overrides))
    assert fragment in str(warning)


@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "paged_lion_8bit", "ademamix"])
def test_an_optimizer_of_a_package_that_is_not_installed_is_a_warning(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(SINGLE, f"trainer.args.optim={optimizer}")
    monkeypatch.setattr(recipe_warnings, "find_spec", lambda name: None)
    (warning,) = warnings(recipe)
    assert str(warning).startswith("trainer.args.optim: needs bitsandbytes, which is not installed here")
    assert f"(value '{optimizer}'); pip install bitsandbytes" in str(warning)
    monkeypatch.setattr(recipe_warnings, "find_spec", lambda name: name)
    assert warnings(recipe) == []


@pytest.mark.slow
def test_the_optimizers_of_bitsandbytes_are_those_of_transformers() -> None:
    from transformers import trainer_optimizer

    theirs = {optimizer.value for optimizer in trainer_optimizer._BITSANDBYTES_OPTIMIZERS}
    assert set(recipe_warnings.BITSANDBYTES_OPTIMIZERS) == theirs


def test_warnings_name_the_stage_of_a_pipeline() -> None:
    (warning,) = warnings(load(PIPELINE, "stages.ppo.credit.lam=0.5"))
    assert str(warning).startswith("stages.ppo.credit.lam: ")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["credit.kl={coefficient: 0.1}"],
        ["credit.kl={coefficient: 0.1, estimator: k2, where: loss}"],
        ["credit.kl={estimator: k3}"],
        ["credit.estimator=gae", "credit.lam=0.5", "credit.gamma=0.9"],
        ["credit.estimator=reinforce", "credit.gamma=0.9"],
        ["trainer.args.optim=adamw_torch_8bit"],
    ],
)
def test_what_is_meant_is_no_warning(overrides: list[str]) -> None:
    assert warnings(load(SINGLE, *overrides)) == []


# --- the plan ---


def test_the_plan_states_sources_batch_and_outputs() -> None:
    sections = dict(plan(load(PIPELINE, world_size=2), world_size=2))
    assert list(sections) == ["1. sft", "2. prm (reward)", "3. ppo"]
    ppo = sections["3. ppo"]
    rewards = [text for topic, text in ppo if topic == "reward"]
    assert rewards[0].startswith("verifier: outcome, weight 1")
    assert "beta 0.1" in rewards[1] and "runs/demo/prm/model" in rewards[1]
    rows = dict(ppo)
    assert rows["batch"] == "2 processes x 8 per device x 1 accumulated = 16 completions per update"
    assert rows["rollout"] == "16 completions for 1 update; 4 per prompt = 4 prompts per update"
    assert rows["length"] == "5 updates"
    assert rows["writes"] == "runs/demo/ppo"
    assert dict(sections["2. prm (reward)"])["length"] == "3 epochs over the data"


# --- the resolved recipe ---


@pytest.mark.parametrize("text", [PIPELINE, SINGLE, REWARD])
def test_the_resolved_recipe_loads_as_the_same_recipe(text: str, tmp_path: Path) -> None:
    recipe = load(text)
    path = recipe.write_resolved(tmp_path / "runs" / "x")
    assert path.name == "recipe.resolved.yaml"
    assert load_recipe(path) == recipe
    assert "estimator" not in text or "adaptation_horizon: 10000" in path.read_text()


def test_the_resolved_recipe_needs_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLACE", "here")
    recipe = load(PIPELINE, "runs_dir=${oc.env:PLACE}")
    path = recipe.write_resolved(tmp_path)
    monkeypatch.delenv("PLACE")
    assert load_recipe(path) == recipe


@given(
    st.text(st.characters(codec="utf-8"), min_size=1)
    | st.sampled_from(["${x}", "\\${x}", "\\\\${x}", "no", "1e-5", "~", "<<"])
)
def test_any_text_survives_the_resolved_recipe(text: str) -> None:
    """Through YAML and through OmegaConf's interpolation; `???` alone is OmegaConf's and never in a recipe."""
    if text.strip() != "???":
        content = yaml.load(yaml12.dump({"a": [text]}), Loader=yaml12.Loader)
        assert OmegaConf.to_container(OmegaConf.create(content), resolve=True) == {"a": [text]}


@given(st.text(st.characters(codec="utf-8")))
def test_resolved_text_is_text_to_yaml_1_1_as_well(text: str) -> None:
    assert isinstance(yaml.safe_load(yaml12.dump({"a": text}))["a"], str)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        load(SINGLE).name = "other"  # pyright: ignore


# --- the world size ---


@pytest.mark.parametrize("name", ["cpu_ddp", "ddp", "zero1", "zero2", "zero3"])
def test_the_configurations_of_the_kit_start_a_process_a_gpu_or_two(name: str) -> None:
    assert world_size_of(name, environment={"CUDA_VISIBLE_DEVICES": "0,1,2"}) == (2 if name == "cpu_ddp" else 3)
    assert world_size_of(name, environment={"CUDA_VISIBLE_DEVICES": ""}) == 2
    assert world_size_of(name, environment={"CUDA_VISIBLE_DEVICES": "-1"}) == 2
    assert world_size_of(name, 4, environment={}) == 4


def test_a_single_process_is_a_world_of_one() -> None:
    assert world_size_of("single_gpu", environment={"CUDA_VISIBLE_DEVICES": "0,1"}) == 1
    assert world_size_of(None, environment={}) == 1
    assert world_size_of(None, environment={"WORLD_SIZE": "6"}) == 6


def test_a_configuration_of_ones_own_says_its_processes(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 16\n")
    assert world_size_of(str(own), environment={}) == 16
    own.write_text("num_processes: many\n")
    with pytest.raises(RecipeError, match="num_processes: must be a positive integer"):
        world_size_of(str(own), environment={})
    own.write_text("- 1\n")
    with pytest.raises(RecipeError, match="is no accelerate configuration"):
        world_size_of(str(own), environment={})


def test_an_unknown_configuration_names_the_nearest() -> None:
    with pytest.raises(
        RecipeError, match=r"no such accelerate configuration \(value 'zero22'\); did you mean 'zero2'\?"
    ):
        world_size_of("zero22", environment={})
    with pytest.raises(RecipeError, match="no such accelerate configuration"):
        world_size_of("./nope.yaml", environment={})


# --- the recipes of the kit ---


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("recipes/**/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_the_kit_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert load_recipe(path).stages
