"""The report shows what a run folder holds, from any state of it, and nothing in a run can make it act."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_kit.runs.curves import build_panels, drawing, smooth, ticks
from rlhf_kit.runs.errors import RunError
from rlhf_kit.runs.heatmap import NEGATIVE, POSITIVE, advantage_scale, colour, heatmap_html, heatmap_page
from rlhf_kit.runs.metrics import MetricsWriter, write_samples
from rlhf_kit.runs.report import render_report, write_report

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
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
VERSIONS = {"rlhf_kit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0", "python": "3.12.4"}


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
    quality = [0.05 + abs(rng.gauss(0, 0.03)) if i < first_wrong else -0.2 - abs(rng.gauss(0, 0.1)) for i in range(count)]
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
    manifest = {"versions": VERSIONS, "created": 1_750_000_000.0, "git": {"commit": "4be1c0d", "dirty": False}}
    manifest |= {"data": {"ppo": "sha256:77f0"}, "finished": 1_750_004_500.0 if finished else None}
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


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text of script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text += data

    def tokens(self) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if "data-tip" in attributes]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "running-sums")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))
