"""The audit on run folders that are written by hand, and on checkpoints of small models."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_kit.errors import RunError
from rlhf_kit.evals.audit import checkpoints_of
from rlhf_kit.evals.run import run_eval
from rlhf_kit.evals.stage import Eval
from rlhf_kit.evals.steps import accuracy_interval

UPDATES = range(1, 51)
HELD_OUT = {"type": "running_sums", "size": 1000, "skip": 600}  # 400 rows


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A stage's folder: by name the value of a metric at each update, held-out scores, samples, held-out data."""

    def write(
        metrics: dict[str, Callable[[int], float]],
        held_out: dict[int, float],
        samples: Any = (),
        eval_data: Mapping[str, Any] = HELD_OUT,
    ) -> Path:
        path = tmp_path / "run" / "ppo"
        (path / "samples").mkdir(parents=True)
        rows = [{"step": step, "eval_accuracy": value} for step, value in held_out.items()]
        rows += [{"step": step, **{name: value(step) for name, value in metrics.items()}} for step in UPDATES]
        rows.sort(key=lambda row: row["step"])
        content = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 51, "rew'  # a kill cut it off
        (path / "metrics.jsonl").write_text(content)
        for step, rows in samples:
            lines = [
                json.dumps({"step": step, "action_mask": [True] * n, "completion": t, "rewards": {"r": [y]}})
                for n, t, y in rows
            ]
            (path / "samples" / f"step-{step:08}.jsonl").write_text("\n".join(lines))
        recipe = {"stages": {"ppo": {"eval_data": dict(eval_data)}}}
        (tmp_path / "run" / "recipe.resolved.yaml").write_text(json.dumps(recipe))
        return path

    return write


def audited(path: Path, into: Path, **fields: Any) -> dict[str, Any]:
    stage = Eval.model_validate(
        {"type": "eval", "evals": {"audit": {"type": "audit", "run_folder": str(path), **fields}}}
    )
    run_eval(stage, into)
    return json.loads((into / "evals" / "audit.json").read_text())


METRICS: dict[str, Callable[[int], float]] = {
    "reward": lambda step: 0.1 * step,
    "completions/mean_length": lambda step: 10 + 0.2 * step,
    "kl": lambda step: 0.01 * step,
    "rewards/r/mean": lambda step: 0.1 * step,
    "credit/share/r": lambda step: 1.0,
}


def test_a_reward_that_rises_while_the_held_out_score_falls_is_over_optimisation(folder, tmp_path):
    found = audited(folder(METRICS, {0: 0.5, 10: 0.7, 50: 0.4}), tmp_path / "audit")
    figures = found["figures"]
    assert any(note.startswith("Over-optimisation: the reward rose") for note in found["notes"])
    assert figures["held_out.best"]["value"] == 0.7
    assert figures["held_out.drop_from_best"]["value"] == pytest.approx(0.3)
    spread = 1.96 * math.sqrt(0.7 * 0.3 / 400 + 0.4 * 0.6 / 400)
    assert figures["held_out.drop_from_best"]["high"] == pytest.approx(0.3 + spread, abs=1e-4)
    assert figures["reward.change"]["value"] == pytest.approx(0.1 * 40)  # means of 1..10 and of 41..50
    assert figures["reward_on_length.slope"]["value"] == pytest.approx(0.5)
    assert figures["reward_on_length.correlation"]["value"] == pytest.approx(1)


def test_a_change_that_two_parts_drawn_alike_would_hide_has_an_interval(folder, tmp_path):
    """Both fifths swing in step by 5 about means that differ by 0.01: that is no rise, and the fall no hacking."""
    swings = {**METRICS, "reward": lambda step: 5.0 * (step % 10 < 5) + 0.01 * (step > 40)}
    found = audited(folder(swings, {0: 0.7, 50: 0.4}), tmp_path / "audit")
    change = found["figures"]["reward.change"]
    assert change["value"] == pytest.approx(0.01)
    assert change["low"] < -2 and change["high"] > 2
    assert not any("Over-optimisation" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        ({"size": 50, "skip": 20}, 30),
        ({"size": 50, "skip": 20, "limit": 10}, 10),
        ({"size": 50, "skip": 45, "limit": 10}, 5),
    ],
)
def test_the_held_out_rows_are_those_that_were_kept(folder, tmp_path, data, rows):
    path = folder(METRICS, {0: 0.4, 50: 0.6}, eval_data={"type": "running_sums", "terms": 2, **data})
    figures = audited(path, tmp_path / "audit")["figures"]
    low, high = accuracy_interval([True] * round(0.6 * rows) + [False] * round(0.4 * rows))
    assert figures["held_out.end"] == {"value": 0.6, "low": low, "high": high, "count": rows}


def test_the_held_out_rows_of_a_range_of_hashes_are_counted(folder, tmp_path):
    data = {"type": "running_sums", "terms": 2, "size": 400, "hash_range": [0.0, 0.25]}
    count = audited(folder(METRICS, {0: 0.4, 50: 0.6}, eval_data=data), tmp_path / "audit")["figures"]
    assert 60 < count["held_out.end"]["count"] < 140


def test_held_out_data_that_are_gone_give_no_interval(folder, tmp_path):
    path = folder(METRICS, {0: 0.7, 50: 0.4}, eval_data={"type": "jsonl", "path": str(tmp_path / "gone.jsonl")})
    found = audited(path, tmp_path / "audit")
    assert found["figures"]["held_out.end"] == {"value": 0.4, "low": None, "high": None, "count": 0}
    assert any(note.startswith("Held-out score: no interval") for note in found["notes"])


@pytest.mark.parametrize("held_out", [{0: 0.5, 10: 0.6, 50: 0.7}, {0: 0.5, 10: 0.51, 50: 0.5}])
def test_a_score_that_holds_is_not(folder, tmp_path, held_out):
    found = audited(folder(METRICS, held_out), tmp_path / "audit")
    assert not any("Over-optimisation" in note for note in found["notes"])


def test_a_held_out_score_that_falls_without_a_rising_reward_is_no_hacking(folder, tmp_path):
    flat = {**METRICS, "reward": lambda step: 1.0 - 0.01 * step}
    found = audited(folder(flat, {0: 0.7, 50: 0.4}), tmp_path / "audit")
    assert not any("Over-optimisation" in note for note in found["notes"])


def test_the_distance_is_the_root_of_a_completions_kl(folder, tmp_path):
    found = audited(folder(METRICS, {0: 0.5, 50: 0.4}), tmp_path / "audit")
    (plot,) = [plot for plot in found["plots"] if plot["title"] == "Over-optimisation in training"]
    held_out = plot["lines"][1]["points"]
    assert held_out[0][0] == 0.0
    assert held_out[1][0] == pytest.approx(math.sqrt(0.5 * 20))  # 0.5 nats a token, 20 tokens
    assert [point["value"] for _, point in held_out] == [0.5, 0.4]


def test_samples_within_an_update_repetition_and_refusals(folder, tmp_path):
    # The reward rises with the step and with the length, but falls with the length within a step.
    samples = [
        (step, [(2, "a b c d e", step + 1.0), (4, "I'm sorry" if step > 20 else "a a a a a a", step + 0.0)])
        for step in range(0, 50, 2)
    ]
    found = audited(folder(METRICS, {}, samples), tmp_path / "audit")
    figures = found["figures"]
    assert figures["r_on_length_within_steps.slope"]["value"] == pytest.approx(-0.5)
    assert figures["r_on_length_within_steps.correlation"]["value"] == pytest.approx(-1)
    assert figures["refusals.change"]["value"] == pytest.approx(0.5)
    assert figures["repetition.start"]["value"] == pytest.approx((0 + 2 / 3) / 2)
    assert figures["repetition.end"]["value"] == 0.0
    assert any("No held-out score" in note for note in found["notes"])


def test_a_folder_without_a_reward_is_said(folder, tmp_path):
    path = folder({"loss": lambda step: 1.0}, {})
    with pytest.raises(RunError, match="there is no reward in it"):
        audited(path, tmp_path / "audit")


# --- checkpoints ---


@pytest.fixture
def checkpoints(folder: Callable[..., Path], small_policy: Path) -> Path:
    """A run folder whose checkpoints move away from the small policy, step by step."""
    path = folder(METRICS, {})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(small_policy)
    for step in (10, 20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(path / "checkpoints" / f"checkpoint-{step}")
        AutoTokenizer.from_pretrained(small_policy).save_pretrained(path / "checkpoints" / f"checkpoint-{step}")
    return path


RESAMPLE = {
    "data": {"type": "running_sums", "size": 20, "terms": 2, "modulus": 7},
    "gold": "exact",
    "num_completions": 3,
    "max_new_tokens": 5,
}


def test_checkpoints_are_found_by_their_step_and_the_model_behind_them(checkpoints, small_policy):
    assert [step for step, _ in checkpoints_of(checkpoints)] == [10, 20]
    shutil.copytree(small_policy, checkpoints / "model")
    (checkpoints / "result.json").write_text('{"updates": 25}')
    (checkpoints / "checkpoints" / "checkpoint-22").mkdir()  # killed while it was written
    assert [step for step, _ in checkpoints_of(checkpoints)] == [10, 20, 25]


def test_proxy_gold_and_distances_of_checkpoints(checkpoints, stage, tmp_path):
    own = stage(evals={"audit": {"type": "audit", "run_folder": str(checkpoints), "resample": RESAMPLE}}, batch_size=16)
    figures = run_eval(own, tmp_path / "audit")["evals"]["audit"]
    assert figures["step_0.kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert figures["step_0.kl_k3"]["value"] == pytest.approx(0, abs=1e-5)
    assert 0 < figures["step_10.kl_k3"]["value"] < figures["step_20.kl_k3"]["value"]
    assert 0 < figures["step_10.kl"]["value"] < figures["step_20.kl"]["value"]
    assert figures["step_20.log_prob"]["value"] < figures["step_0.log_prob"]["value"]
    assert all(0 <= figures[f"step_{step}.gold"]["value"] <= 1 for step in (0, 10, 20))
    assert figures["step_0.proxy"]["count"] == 20  # prompts
    kept = list((tmp_path / "audit" / "checkpoints").iterdir())
    assert len(kept) == 3
    one = json.loads(kept[0].read_text())["measured"]
    assert {len(values) for values in one.values()} == {60}


def test_checkpoints_that_are_measured_are_not_measured_again(checkpoints, stage, tmp_path):
    evals = {"audit": {"type": "audit", "run_folder": str(checkpoints), "resample": RESAMPLE}}
    own = stage(evals=evals, batch_size=16)
    run_eval(own, tmp_path / "audit")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "audit" / "checkpoints").iterdir()}
    (tmp_path / "audit" / "evals" / "audit.json").unlink()  # killed before it was written
    run_eval(own, tmp_path / "audit")
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_gold_may_be_a_source_which_then_leaves_the_proxy(checkpoints, stage, prm, tmp_path):
    resample = {name: value for name, value in RESAMPLE.items() if name != "gold"} | {"gold_source": "verifier"}
    rewards = [
        {"type": "verifier", "verifier": "exact", "weight": 100},
        {"type": "implicit_prm", "path": str(prm), "beta": 0.5, "weight": 2},
    ]
    evals = {"audit": {"type": "audit", "run_folder": str(checkpoints), "resample": resample}}
    figures = run_eval(stage(evals=evals, rewards=rewards, batch_size=16), tmp_path / "a")["evals"]["audit"]
    by_verifier = {"audit": {"type": "audit", "run_folder": str(checkpoints), "resample": RESAMPLE}}
    alone = run_eval(stage(evals=by_verifier, batch_size=16), tmp_path / "b")["evals"]["audit"]
    for step in (0, 10, 20):
        assert figures[f"step_{step}.gold"]["value"] == pytest.approx(alone[f"step_{step}.gold"]["value"])
        assert figures[f"step_{step}.proxy"]["value"] == pytest.approx(
            2 * alone[f"step_{step}.proxy"]["value"], rel=1e-4
        )


def test_a_run_without_checkpoints_is_said(folder, stage, tmp_path):
    own = stage(evals={"audit": {"type": "audit", "run_folder": str(folder(METRICS, {})), "resample": RESAMPLE}})
    with pytest.raises(RunError, match="holds no checkpoints: train with save_strategy"):
        run_eval(own, tmp_path / "audit")


def test_kl_of_the_checkpoints_is_that_of_their_samples(checkpoints, stage, small_policy, tmp_path):
    """k1 of a completion is the sum of its tokens' log-ratios; recomputed from plain log-probabilities."""
    from rlhf_kit.evals.audit import Audit
    from rlhf_kit.evals.audit_checkpoints import _Start
    from rlhf_kit.evals.context import EvalContext

    own = stage(evals={"audit": {"type": "audit", "run_folder": str(checkpoints), "resample": RESAMPLE}}, batch_size=16)
    context = EvalContext(own, tmp_path / "audit")
    audit = own.evals["audit"]
    assert isinstance(audit, Audit)
    assert audit.resample is not None
    rows = context.load(audit.resample.data)
    start = _Start(context, audit.resample, rows)
    path = checkpoints / "checkpoints" / "checkpoint-20"
    model = context.load_model(context.policy_config.model_copy(update={"path": str(path)}))
    sampled = start.completions(model)
    ours, before, features = start.looks(sampled, model)
    plain = {
        name: AutoModelForCausalLM.from_pretrained(where) for name, where in (("after", path), ("start", small_policy))
    }
    prompt = context.tokenizer(rows[0]["prompt"])["input_ids"]
    ids = torch.tensor([[*prompt, *sampled[0]["completion_ids"]]])
    for name, found in (("after", ours[0]), ("start", before[0])):
        with torch.no_grad():
            output = plain[name](ids, output_hidden_states=True)
        taken = output.logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        expected = taken.gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert found == pytest.approx(expected.numpy(), abs=1e-5)
    mean = output.hidden_states[-1][0, len(prompt) :].mean(dim=0).numpy()
    assert features[0] == pytest.approx(mean, abs=1e-5)
    assert np.isfinite(features).all()
