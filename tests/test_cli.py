"""The command line as a person meets it: exit codes, where output goes, and nothing heavy before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_kit import __version__
from rlhf_kit.cli import app

RECIPE = """
stages:
  sft:
    type: sft
    model: {type: scratch, vocabulary: running_sums}
    data: {type: running_sums, size: 100}
    trainer: {args: {max_steps: 10, learning_rate: 1e-3}}
  ppo:
    type: ppo
    model: {path: "${stages.sft.model}"}
    data: {type: running_sums, size: 100}
    rewards:
      - {type: verifier, verifier: exact}
      - {type: implicit_prm, online: {}}
    credit: {estimator: prime}
    trainer: {args: {per_device_train_batch_size: 8, num_generations: 4, max_steps: 5}}
"""
HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate", "peft", "wandb", "pandas", "numpy")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlhf_kit", *arguments]
    unset = {"WORLD_SIZE", "RANK", "LOCAL_RANK"}
    variables = {name: value for name, value in os.environ.items() if name not in unset} | environment
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr + done.stdout
    return done


def test_check_prints_what_will_run(folder: Path) -> None:
    done = run(folder, "check", "recipe.yaml")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "1. sft" in done.stdout and "2. ppo" in done.stdout
    assert "1 process x 8 per device x 1 accumulated = 8 completions per update" in done.stdout
    assert done.stdout.splitlines()[-1] == "recipe is valid"


def test_check_prints_warnings_and_stays_valid(folder: Path) -> None:
    done = run(folder, "check", "recipe.yaml", "stages.ppo.credit.lam=0.5")
    assert done.returncode == 0
    warning, last = done.stdout.splitlines()[-2:]
    assert warning.startswith("warning: stages.ppo.credit.lam: is used by gae alone (value 0.5)")
    assert last == "recipe is valid"


def test_output_that_is_no_terminal_has_no_colour_and_no_wrapping(folder: Path) -> None:
    done = run(folder, "check", "recipe.yaml", f"runs_dir={'x' * 200}")
    assert "\x1b" not in done.stdout
    assert f"run folder {'x' * 200}/recipe" in done.stdout


@pytest.mark.parametrize("command", ["check", "train"])
def test_errors_are_lines_on_stderr_and_the_exit_code_is_2(folder: Path, command: str) -> None:
    done = run(folder, command, "recipe.yaml", "stages.ppo.rewards.0.weigth=0.5", "stages.sft.typ=1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "recipe.yaml: stages.sft.typ: unknown key (value 1); did you mean 'type'?",
        "recipe.yaml: stages.ppo.rewards.0.weigth: unknown key (value 0.5); did you mean 'weight'?",
    ]
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_missing_recipe_is_one_line(folder: Path, command: str) -> None:
    done = run(folder, command, "recpie.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "recpie.yaml: no such recipe file; did you mean recipe.yaml?\n"


def test_deleting_and_overriding_make_another_arm(folder: Path) -> None:
    arguments = ("name=outcome-only", "~stages.ppo.rewards.1", "stages.ppo.credit.estimator=rloo")
    done = run(folder, "check", "recipe.yaml", *arguments)
    assert done.returncode == 0
    assert "implicit_prm" not in done.stdout
    assert "runs/outcome-only/ppo" in done.stdout


def test_the_world_size_is_that_of_the_configuration(folder: Path) -> None:
    (folder / "four.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    assert "4 processes x 8 per device" in run(folder, "check", "recipe.yaml", "--config", "four.yaml").stdout
    assert "6 processes x 8" in run(folder, "check", "recipe.yaml", "--config", "zero2", "--num-processes", "6").stdout
    assert (
        "3 processes x 8"
        in run(folder, "check", "recipe.yaml", "stages.ppo.trainer.args.num_generations=2", WORLD_SIZE="3").stdout
    )
    done = run(folder, "check", "recipe.yaml", "--config", "four.yaml", "stages.ppo.trainer.args.num_generations=5")
    assert done.returncode == 2
    assert "does not divide the 32 completions of a rollout (value 5)" in done.stderr


def test_an_unknown_configuration_is_one_line(folder: Path) -> None:
    done = run(folder, "check", "recipe.yaml", "--config", "zero9")
    assert done.returncode == 2
    assert done.stderr.startswith("--config: no such accelerate configuration (value 'zero9'); did you mean 'zero")


def test_train_with_the_configuration_of_many_processes_says_how_to_start_them(folder: Path) -> None:
    done = run(folder, "train", "recipe.yaml", "--config", "zero2", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "./launch.sh --config zero2 recipe.yaml" in done.stderr


@pytest.mark.slow
def test_a_run_that_cannot_start_is_one_line_and_exit_code_1(folder: Path) -> None:
    (folder / "runs" / "recipe").mkdir(parents=True)
    (folder / "runs" / "recipe" / "notes.txt").write_text("mine")
    done = run(folder, "train", "recipe.yaml")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("runs/recipe is not empty and holds no run")


def test_only_the_first_process_speaks(folder: Path) -> None:
    done = run(folder, "train", "recipe.yaml", "seed=x", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_report_of_what_is_no_run_folder_is_one_line(folder: Path) -> None:
    for name in ("nowhere", "recipe.yaml", "."):
        done = run(folder, "report", name)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [(), ("check",), ("train",), ("eval",), ("report",)])
def test_help_shows_an_example_of_each_command(folder: Path, arguments: tuple[str, ...]) -> None:
    done = run(folder, *arguments, "--help")
    assert done.returncode == 0
    for command in arguments or ("check", "train", "report"):
        assert f"rlhf-kit {command} " in done.stdout


def test_no_command_is_help_and_an_unknown_one_is_an_error(folder: Path) -> None:
    assert "Usage: rlhf-kit" in run(folder).stdout
    assert run(folder, "chekc").returncode == 2


def test_version(folder: Path) -> None:
    assert run(folder, "--version").stdout == f"rlhf-kit {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("check", "--help"),
        ("train", "--help"),
        ("eval", "--help"),
        ("check", "recipe.yaml"),
        ("check", "recipe.yaml", "stages.ppo.credit.gamma=high"),
        ("train", "recipe.yaml", "stages.ppo.trainer.args.max_stepz=1"),
    ],
)
def test_nothing_heavy_is_imported_before_training(folder: Path, arguments: tuple[str, ...]) -> None:
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules]))\n"
        f"sys.argv = ['rlhf-kit', *{arguments!r}]\n"
        "from rlhf_kit.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("command", ["check", "train"])
def test_what_cannot_run_under_deepspeed_is_said_before_anything_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(
        "{type: ppo, model: {path: owner/name}, data: {type: hub, path: owner/data}, credit: {estimator: gae},"
        " critic: {warmup_steps: 3}, rewards: [{type: verifier, verifier: math},"
        " {type: implicit_prm, online: {order: with_policy}}],"
        " trainer: {args: {per_device_train_batch_size: 4, num_generations: 4, num_iterations: 2}}}"
    )
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"} if command == "train" else {}
    arguments = [command, "recipe.yaml", *(["--config", "zero2"] if command == "check" else [])]
    result = CliRunner().invoke(app, arguments, env=environment)
    assert result.exit_code == 2
    fields = [line.split(": ")[1] for line in result.output.splitlines()]
    assert fields == ["critic.warmup_steps", "rewards.1.online.order"]
