"""The report shows what a run folder holds, from any state of it, and nothing in a run can make it act."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit.errors import RunError
from rlhf_kit.runs.metrics import MetricsWriter, write_samples
from rlhf_kit.runs.report import read_run, render_report, write_report

Parse = Callable[[str], Any]

RECIPE = """\
# Running sums with two sources of reward.
stages:
  sft:
    type: sft
    model: {path: tiny, pad_token: "<|pad|>"}
  ppo:
    type: ppo
    rewards:
      - type: verifier
        weight: 1.0
      - type: implicit_prm
        beta: 0.05
    step_truth: {column: steps, separator: " "}
    trainer:
      args: {max_new_tokens: 64, hub_token: hf_abcdefghijklmnopqrstuvwx}
"""
VERSIONS = {
    "rlhf_kit": "0.1.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "python": "3.12.4",
}


def ppo_metrics(step: int, steps: int, rng: random.Random) -> dict[str, float | None]:
    """Curves such as a run on running sums has: an S-shaped accuracy, a critic and a PRM that learn."""
    progress = step / steps
    skill = 0.12 + 0.7 / (1 + math.exp(-9 * (progress - 0.45)))
    share = 0.75 - 0.3 * progress + rng.gauss(0, 0.03)
    metrics: dict[str, float | None] = {
        "accuracy": min(1.0, max(0.0, skill + rng.gauss(0, 0.05))),
        "reward": skill + 0.2 * progress + rng.gauss(0, 0.05),
        "rewards/verifier/mean": skill + rng.gauss(0, 0.05),
        "rewards/verifier/std": math.sqrt(skill * (1 - skill)),
        "rewards/implicit_prm/mean": 0.02 + 0.3 * progress + rng.gauss(0, 0.03),
        "rewards/implicit_prm/std": 0.12 + 0.05 * progress,
        "credit/share/verifier": share,
        "credit/share/implicit_prm": 1 - share,
        "credit/advantage_std": 0.6 + 0.3 * progress + rng.gauss(0, 0.03),
        "kl": 0.9 * progress**1.5 + abs(rng.gauss(0, 0.02)),
        "entropy": 1.4 * math.exp(-1.6 * progress) + 0.2 + rng.gauss(0, 0.03),
        "completions/mean_length": 18 + 4 * progress + rng.gauss(0, 0.7),
        "completions/clipped_ratio": max(0.0, 0.15 * (1 - 2 * progress) + rng.gauss(0, 0.01)),
        "value/explained_variance": 0.8 - 2.4 * math.exp(-8 * progress) + rng.gauss(0, 0.05),
        "value/loss": 0.25 * math.exp(-3 * progress) + 0.03 + abs(rng.gauss(0, 0.01)),
        "prm/implicit_prm/loss": 0.69 * math.exp(-1.5 * progress) + 0.1 + rng.gauss(0, 0.02),
        "prm/implicit_prm/step_auc": min(0.99, 0.62 + 0.33 * progress**0.4 + rng.gauss(0, 0.015)),
        "prm/implicit_prm/outcome_auc": min(0.995, 0.7 + 0.27 * progress**0.5 + rng.gauss(0, 0.01)),
        "loss": rng.gauss(0, 0.03),
        "learning_rate": 1e-5 * (1 - 0.9 * progress),
        "grad_norm": abs(rng.gauss(0.8, 0.25)) + (3.0 if rng.random() < 0.02 else 0.0),
        "skipped_steps": 1 if progress > 0.63 else 0,
        "num_tokens": step * 5120,
    }
    if step == 1 or step % 10 == 0:
        metrics["eval_accuracy"] = min(1.0, max(0.0, skill + rng.gauss(0, 0.012)))
    return metrics


def running_sums_sample(step: int, steps: int, rng: random.Random) -> dict:
    """A completion that adds up numbers; a wrong step makes the later ones wrong as well."""
    numbers = [rng.randint(2, 19) for _ in range(8)]
    total, wrong, pieces, truth, right = 0, False, [], [], 0
    for number in numbers:
        total, right = total + number, right + number
        if not wrong and rng.random() < 0.16 * (1.1 - step / steps):
            total, wrong = total + rng.choice([-10, 1, 2]), True
        pieces.append(f" {total}" if pieces else str(total))
        if not truth or truth[-1]:
            truth.append(total == right)
    tokens = [part for piece in pieces for part in ((piece[:2], piece[2:]) if len(piece) > 3 else (piece,))]
    tokens.append("<|im_end|>")
    outcome, count = float(not wrong), len(tokens)
    first_wrong = next((i for i, _ in enumerate(tokens) if wrong and i >= count * truth.count(True) // 8), count)
    quality = [
        0.05 + abs(rng.gauss(0, 0.03)) if i < first_wrong else -0.2 - abs(rng.gauss(0, 0.1)) for i in range(count)
    ]
    to_go = [sum(quality[i:]) for i in range(count)]
    return {
        "prompt": f"Give the running sums of {' + '.join(map(str, numbers))}.",
        "completion": "".join(tokens[:-1]),
        "tokens": tokens,
        "advantages": [0.35 * value + (0.3 if outcome else -0.3) + rng.gauss(0, 0.08) for value in to_go],
        "rewards": {"verifier": [0.0] * (count - 1) + [outcome], "implicit_prm": quality},
        "values": [0.4 + 0.1 * value for value in to_go],
        "kl": [abs(rng.gauss(0, 0.01)) for _ in tokens],
        "action_mask": [True] * count,
        "outcome": outcome,
        "step_truth": truth,
    }


def make_run(folder: Path, steps: int = 100, finished: bool = True) -> Path:
    """A pipeline of two stages as the trainers leave it."""
    rng = random.Random(7)
    folder.mkdir(parents=True)
    (folder / "recipe.resolved.yaml").write_text(RECIPE)
    manifest = {
        "versions": VERSIONS,
        "created": 1_750_000_000.0,
        "git": {"commit": "4be1c0d", "dirty": False},
    }
    manifest |= {
        "data": {"ppo": "sha256:77f0"},
        "finished": 1_750_000_700.0 + 38 * steps if finished else None,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with MetricsWriter(folder / "sft") as writer:
        for step in range(5, 65, 5):
            done = step / 60
            metrics = {"loss": 2.2 * math.exp(-2 * done) + 0.4, "mean_token_accuracy": 0.4 + 0.4 * done}
            writer.write(step, metrics | {"learning_rate": 2e-5, "time": 1_750_000_000 + 9 * step})
    (folder / "sft" / "result.json").write_text(json.dumps({"eval_accuracy": 0.12}))
    with MetricsWriter(folder / "ppo") as writer:
        for step in range(1, steps + 1):
            writer.write(step, ppo_metrics(step, steps, rng) | {"time": 1_750_000_700 + 38 * step})
            if step == 1 or step % 10 == 0:
                write_samples(folder / "ppo", step, [running_sums_sample(step, steps, rng) for _ in range(4)])
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "running-sums")


@pytest.fixture(scope="module")
def page(run: Path, parse: Parse) -> Any:
    return parse(write_report(run).read_text(encoding="utf-8"))


class TestReport:
    def test_curve_data_are_the_points_of_the_metrics_file(self, run: Path, page: Any) -> None:
        written = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
        series = [tuple(map(tuple, points)) for panel in curve_data(page).values() for points in panel["series"]]
        for metric in (
            "accuracy",
            "eval_accuracy",
            "rewards/implicit_prm/mean",
            "kl",
            "prm/implicit_prm/step_auc",
        ):
            assert tuple((line["step"], line[metric]) for line in written if metric in line) in series

    @pytest.mark.parametrize(
        "title",
        [
            "Accuracy",
            "verifier",
            "implicit_prm",
            "Share of each source in the advantage",
            "KL from the reference",
            "Entropy",
            "Completion length",
            "Explained variance",
            "Step AUC",
            "Outcome AUC",
            "Gradient norm",
            "Learning rate",
            "Skipped steps",
        ],
    )
    def test_has_the_panel(self, run: Path, title: str) -> None:
        assert f'<div class="title">{title}</div>' in render_report(run)

    def test_a_panel_without_data_is_left_out(self, tmp_path: Path) -> None:
        with MetricsWriter(tmp_path) as writer:
            for step in (1, 2):
                writer.write(step, {"loss": 1.0, "entropy": math.nan})
        text = render_report(tmp_path)
        assert '<div class="title">Loss</div>' in text
        assert "Entropy" not in text

    def test_shows_recipe_versions_and_stages(self, page: Any) -> None:
        for shown in (
            "max_new_tokens",
            "implicit_prm",
            "2.13.0",
            "4be1c0d",
            "sft → ppo",
            "finished",
            "75 min",
        ):
            assert shown in page.text

    def test_shows_no_secret(self, run: Path) -> None:
        text = render_report(run)
        assert "hf_abcdefghijklmnopqrstuvwx" not in text
        assert "&lt;redacted&gt;" in text
        assert "&lt;|pad|&gt;" in text  # a token of the vocabulary is none

    def test_a_secret_in_the_manifest_is_redacted_by_its_name(self, tmp_path: Path) -> None:
        manifest = {
            "command": "train a.yaml trainer.args.hub_token=tops3cret",
            "env": {"api_key": "tops3cret"},
        }
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        assert "tops3cret" not in render_report(tmp_path)

    def test_asks_for_nothing_outside_itself(self, run: Path, page: Any) -> None:
        for tag, attributes in page.elements:
            assert tag not in {"link", "img", "iframe", "object", "embed", "base"}
            assert not {"src", "srcset", "action", "data", "poster"} & attributes.keys()
            assert (attributes.get("href") or "#").startswith("#")
        text = render_report(run)
        assert "url(" not in text
        assert "@import" not in text

    def test_its_policy_allows_its_own_script_alone(self, page: Any) -> None:
        policy = next(a["content"] or "" for _, a in page.elements if "http-equiv" in a)
        (allowed,) = re.findall(r"script-src '(.*?)'", policy)
        runnable = page.scripts[-1]
        assert allowed == "sha256-" + base64.b64encode(hashlib.sha256(runnable.encode()).digest()).decode()
        assert "default-src 'none'" in policy
        assert len(page.scripts) == 2  # the data, and the script

    def test_hostile_text_stays_text(self, tmp_path: Path, parse: Parse, hostile: str, hostile_sample: dict) -> None:
        folder = tmp_path / "run"
        (folder / "ppo").mkdir(parents=True)
        (folder / "recipe.resolved.yaml").write_text(f"stages:\n  ppo: {{type: ppo, note: {json.dumps(hostile)}}}\n")
        (folder / "manifest.json").write_text(json.dumps({"versions": {hostile: hostile}, hostile: hostile}))
        (folder / "ppo" / "result.json").write_text(json.dumps({hostile: hostile}))
        with MetricsWriter(folder / "ppo") as writer:
            for step in (1, 2):
                writer.write(step, {f"rewards/{hostile}/mean": 1.0, hostile: 2.0, "note": hostile})
        write_samples(folder / "ppo", 1, [hostile_sample])
        write_samples(folder / "ppo", 2, [hostile_sample])
        page = parse(render_report(folder))
        assert len(page.scripts) == 2
        assert not [tag for tag, attributes in page.elements if tag == "img" or "onerror" in attributes]
        json.loads(page.scripts[0])
        assert "alert(1)" in page.text  # it is shown, as text

    def test_a_single_stage_stands_in_the_run_folder_itself(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.resolved.yaml").write_text("type: ppo\nstep_truth: {separator: ';'}\n")
        with MetricsWriter(tmp_path) as writer:
            writer.write(1, {"accuracy": 0.5})
        sample = {"completion": "3;9", "tokens": ["3", ";", "9"], "advantages": [1.0, 1.0, -1.0]}
        write_samples(tmp_path, 1, [{**sample, "step_truth": [True, False]}])
        text = render_report(tmp_path)
        assert re.search(r">3</span><b>✓</b>.*>9</span><b class=\"hm-x\">✗</b>", text)
        assert "<h2>ppo<small>" in text

    @pytest.mark.parametrize(
        "kept", [[], ["recipe.resolved.yaml"], ["manifest.json"], ["ppo/metrics.jsonl"], ["ppo/samples"]]
    )
    def test_whatever_a_kill_left_gives_a_report(self, run: Path, tmp_path: Path, kept: list[str]) -> None:
        (tmp_path / "sft").mkdir()
        (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 1, "lo')
        for name in kept:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, tmp_path / name)
        assert "</html>" in write_report(tmp_path).read_text(encoding="utf-8")

    @pytest.mark.parametrize("single", [True, False])
    def test_the_steps_of_a_bootstrap_stand_by_round_and_in_their_order(self, tmp_path: Path, single: bool) -> None:
        recipe = "type: bootstrap\n" if single else "stages:\n  dice: {type: bootstrap}\n  ppo: {type: ppo}\n"
        (tmp_path / "recipe.resolved.yaml").write_text(recipe)
        made = [f"round-{number}/{step}" for number in (10, 2, 0) for step in ("evaluation", "preference", "pairs")]
        for step in [*made, "", "../ppo", "round-2/pairs.superseded-1", "../ppo.superseded-1"]:
            folder = tmp_path / step.removeprefix("../") if single else tmp_path / "dice" / step
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "result.json").write_text("{}")
        with MetricsWriter((tmp_path if single else tmp_path / "dice") / "round-2" / "preference") as writer:
            writer.write(1, {"loss": 1.0})  # the only one that says when it began
        steps = [f"round-{number} {step}" for number in (0, 2, 10) for step in ("pairs", "preference", "evaluation")]
        expected = ["bootstrap", *steps, "ppo"] if single else ["dice", *(f"dice {step}" for step in steps), "ppo"]
        assert [stage.name for stage in read_run(tmp_path).stages] == expected

    def test_a_recipe_alone_says_that_there_are_no_metrics(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.resolved.yaml").write_text("type: ppo\n")
        assert "No metrics yet" in render_report(tmp_path)

    def test_a_run_without_an_end_is_interrupted(self, tmp_path: Path) -> None:
        text = render_report(make_run(tmp_path / "run", steps=3, finished=False))
        assert '<li class="status interrupted">' in text

    def test_a_run_that_logs_now_is_running(self, tmp_path: Path) -> None:
        with MetricsWriter(tmp_path) as writer:
            writer.write(1, {"loss": 1.0})
        assert '<li class="status running">' in render_report(tmp_path)

    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(RunError, match="is not a run folder"):
            write_report(tmp_path)
        with pytest.raises(RunError, match="is not a folder"):
            write_report(tmp_path / "absent")

    def test_a_damaged_manifest_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "manifest.json").write_text("{")
        with pytest.raises(RunError, match=r"manifest\.json is damaged"):
            render_report(tmp_path)

    def test_many_sampled_steps_are_thinned_between_first_and_last(self, tmp_path: Path, parse: Parse) -> None:
        for step in range(0, 1000, 10):
            write_samples(tmp_path, step, [{"tokens": ["x"], "advantages": [1.0]}])
        page = parse(render_report(tmp_path))
        steps = [int(a["data-step"] or "") for tag, a in page.elements if tag == "template"]
        assert (steps[0], steps[-1], len(steps)) == (0, 990, 40)
        assert steps == sorted(set(steps))
        assert "40 of 100 sampled steps are shown" in page.text

    def test_needs_no_torch(self, run: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from rlhf_kit.runs.report import write_report; "
            f"write_report(Path({str(run)!r})); "
            "print(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


def curve_data(page: Any) -> dict:
    return json.loads(page.scripts[0])
