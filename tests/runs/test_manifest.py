"""The manifest says what made a run: versions, commit, and the contents of every file that a stage read."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from rlhf_kit.errors import RunError
from rlhf_kit.recipe import Recipe, load_recipe
from rlhf_kit.runs.folder import record_stage
from rlhf_kit.runs.manifest import describe_run, describe_stage, read_manifest, write_manifest

PIPELINE = """
name: demo
runs_dir: {folder}/runs
stages:
  sft:
    type: sft
    model: {{path: {folder}/base}}
    data: {{type: jsonl, path: {folder}/data.jsonl}}
  prm:
    type: reward
    model: {{path: "${{stages.sft.model}}"}}
    reference: {{path: owner/model}}
    data:
      type: sampled
      model: ${{stages.sft.model}}
      prompts: {{type: jsonl, path: {folder}/data.jsonl}}
      verifier: exact
  ppo:
    type: ppo
    model: {{path: "${{stages.sft.model}}"}}
    data: {{type: running_sums, size: 10}}
    rewards:
      - {{type: verifier, verifier: exact}}
      - {{type: implicit_prm, path: "${{stages.prm.model}}", beta: 0.1}}
    credit: {{estimator: prime}}
    trainer: {{args: {{per_device_train_batch_size: 8, num_generations: 4, max_steps: 5}}}}
"""


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A pipeline that reads a data file and a base model of two files of weights."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "base").mkdir()
    for name, content in (
        ("b.safetensors", b"two"),
        ("a.safetensors", b"one"),
        ("config.json", b"{}"),
        ("README.md", b""),
    ):
        (tmp_path / "base" / name).write_bytes(content)
    file = tmp_path / "recipe.yaml"
    file.write_text(PIPELINE.format(folder=tmp_path))
    return load_recipe(file)


class TestFile:
    def test_fields_are_merged(self, tmp_path: Path) -> None:
        assert read_manifest(tmp_path) == {}
        write_manifest(tmp_path, name="demo", world_size=1)
        write_manifest(tmp_path, world_size=2, finished=3.5)
        assert read_manifest(tmp_path) == {"name": "demo", "world_size": 2, "finished": 3.5}
        assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]

    def test_a_write_that_was_cut_off_leaves_the_last_whole_one(self, tmp_path: Path) -> None:
        write_manifest(tmp_path, name="demo")
        (tmp_path / "manifest.partial").write_text('{"name": "de')
        assert read_manifest(tmp_path) == {"name": "demo"}
        write_manifest(tmp_path, world_size=1)
        assert read_manifest(tmp_path) == {"name": "demo", "world_size": 1}

    def test_secrets_are_taken_out_and_it_stays_json(self, tmp_path: Path) -> None:
        command = 'train recipe.yaml trainer.args.hub_token="s3cretOfTheHub" name=x'
        write_manifest(tmp_path, command=command, nested={"api_key": "s3cretOfTheHub", "size": 3})
        text = (tmp_path / "manifest.json").read_text()
        assert "s3cret" not in text and text.count("<redacted>") == 2
        assert json.loads(text)["nested"]["size"] == 3
        assert read_manifest(tmp_path)["command"].startswith("train recipe.yaml ")

    def test_what_json_has_no_form_for_is_text(self, tmp_path: Path) -> None:
        write_manifest(tmp_path, place=Path("runs/é"))
        assert read_manifest(tmp_path) == {"place": "runs/é"}


class TestRun:
    def test_says_what_was_started_and_on_what(self, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["rlhf-kit", "train", "recipe.yaml", "seed=1"])
        begun = time.time()
        described = describe_run(recipe)
        assert begun <= described["created"] <= time.time()
        assert described["name"] == "demo"
        assert described["command"] == "rlhf-kit train recipe.yaml seed=1"
        versions = described["versions"]
        assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
        assert {name: versions[name] for name in ("torch", "trl", "transformers", "rlhf-kit")} == {
            name: version(name) for name in ("torch", "trl", "transformers", "rlhf-kit")
        }

    def test_the_commit_has_a_plus_where_a_tracked_file_has_changed(
        self, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repository = tmp_path / "repository"
        repository.mkdir()
        monkeypatch.chdir(repository)
        (repository / "file").write_text("first")
        git("init", "--quiet")
        git("add", "file")
        git("-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false", "commit", "--quiet", "-m", "one")
        commit = git("rev-parse", "HEAD")
        (repository / "untracked").write_text("")
        assert describe_run(recipe)["git_commit"] == commit
        (repository / "file").write_text("second")
        assert describe_run(recipe)["git_commit"] == f"{commit}+"

    @pytest.mark.parametrize("git_is_installed", [True, False])
    def test_without_a_repository_or_git_there_is_no_commit(
        self, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, git_is_installed: bool
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        if not git_is_installed:
            monkeypatch.setenv("PATH", str(tmp_path))
        assert describe_run(recipe)["git_commit"] is None


class TestStage:
    def test_files_and_local_models_have_their_sha_256(self, recipe: Recipe) -> None:
        described = describe_stage(recipe, "sft")
        assert described["parents"] == []
        assert described["inputs"] == {
            "data.path": sha256(b'{"prompt": "a", "completion": "b"}\n'),
            "model.path": sha256(b"onetwo{}"),  # weights and configuration in the order of their names, and no other
        }

    def test_one_changed_byte_gives_another(self, recipe: Recipe, tmp_path: Path) -> None:
        before = describe_stage(recipe, "sft")["inputs"]
        (tmp_path / "base" / "a.safetensors").write_bytes(b"onf")
        after = describe_stage(recipe, "sft")["inputs"]
        assert after["model.path"] != before["model.path"] and after["data.path"] == before["data.path"]

    @pytest.mark.parametrize("name", ["model.gguf", "pytorch_model.bin"])
    def test_weights_of_other_formats_have_theirs(self, recipe: Recipe, tmp_path: Path, name: str) -> None:
        for file in (tmp_path / "base").iterdir():
            file.unlink()
        (tmp_path / "base" / name).write_bytes(b"weights")
        assert describe_stage(recipe, "sft")["inputs"]["model.path"] == sha256(b"weights")

    def test_a_file_larger_than_one_read_is_read_to_its_end(self, recipe: Recipe, tmp_path: Path) -> None:
        content = bytes(range(256)) * 5000
        (tmp_path / "data.jsonl").write_bytes(content)
        assert describe_stage(recipe, "sft")["inputs"]["data.path"] == sha256(content)

    def test_the_earlier_stages_that_it_builds_on_are_its_parents(self, recipe: Recipe) -> None:
        for stage, weights in (("sft", b"policy"), ("prm", b"prm")):
            folder = recipe.stage_folder(stage) / "model"
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(weights)
        prm = describe_stage(recipe, "prm")
        assert prm["parents"] == ["sft"]
        assert {field: prm["inputs"][field] for field in ("model.path", "data.model")} == {
            "model.path": sha256(b"policy"),
            "data.model": sha256(b"policy"),
        }
        assert describe_stage(recipe, "ppo") == {
            "parents": ["sft", "prm"],
            "inputs": {"model.path": sha256(b"policy"), "rewards.1.path": sha256(b"prm")},
        }

    @pytest.mark.parametrize(
        ("field", "changed"),
        [
            ("rewards.0.prompt", "critic.txt"),
            ("rewards.0.examples", "examples.jsonl"),
            ("rewards.0.judge.model.path", "judge/config.json"),
            ("rewards.1.reference", "reference/model.safetensors"),
            ("rewards.2.follow_ups", "follow_ups.json"),
            ("rewards.3.prompts.rating", "rating.txt"),
            ("model.chat_template", "chat.jinja"),
            ("critic.path", "critic/config.json"),
        ],
    )
    def test_a_stage_does_not_go_on_with_another_file_of_any_field(
        self, recipe: Recipe, tmp_path: Path, field: str, changed: str
    ) -> None:
        files = ("critic.txt", "examples.jsonl", "follow_ups.json", "rating.txt", "chat.jinja")
        folders = ("judge/config.json", "reference/model.safetensors", "critic/config.json")
        for name in (*files, *folders):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("before")
        where = {Path(name).stem: str(tmp_path / name) for name in files}
        judge = {"type": "local", "model": {"path": str(tmp_path / "judge")}}
        rewards = [
            {"type": "llm_critic", "prompt": where["critic"], "examples": where["examples"], "judge": judge},
            {"type": "dpo_implicit", "path": "owner/model", "reference": str(tmp_path / "reference")},
            {"type": "follow_up", "follow_ups": where["follow_ups"]},
            {"type": "hindsight", "prompts": {"rating": where["rating"]}, "judge": {"type": "policy"}},
        ]
        ppo = recipe.stages["ppo"].model_dump(exclude={"rewards", "critic"})
        ppo |= {"rewards": rewards, "critic": {"type": "model", "path": str(tmp_path / "critic")}}
        ppo["model"]["chat_template"] = where["chat"]
        recipe = Recipe.model_validate({**recipe.model_dump(), "stages": {"ppo": ppo}})
        recipe.run_folder.mkdir(parents=True)
        record_stage(recipe, "ppo", begun=False)
        record_stage(recipe, "ppo", begun=True)
        (tmp_path / changed).write_text("after")
        with pytest.raises(RunError, match=f"was begun with other contents of {re.escape(field)}, and cannot go on"):
            record_stage(recipe, "ppo", begun=True)

    def test_what_a_stage_writes_itself_is_no_input(self, recipe: Recipe, tmp_path: Path) -> None:
        (tmp_path / "cache.sqlite").write_text("grows with every answer")
        judge = {"type": "server", "base_url": "http://127.0.0.1:1/v1", "model": "any"}
        critic = {"type": "llm_critic", "judge": {**judge, "cache": str(tmp_path / "cache.sqlite")}}
        ppo = {**recipe.stages["ppo"].model_dump(), "rewards": [critic]}
        described = Recipe.model_validate({**recipe.model_dump(), "stages": {"ppo": ppo}})
        assert describe_stage(described, "ppo")["inputs"] == {}

    def test_the_prompts_of_sampled_data_are_an_input_and_a_hub_id_is_none(self, recipe: Recipe) -> None:
        inputs = describe_stage(recipe, "prm")["inputs"]
        assert inputs["data.prompts.path"] == sha256(b'{"prompt": "a", "completion": "b"}\n')
        assert "reference.path" not in inputs


def git(*args: str) -> str:
    return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()
