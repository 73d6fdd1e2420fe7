"""Segment rewards that are learnt during PPO: from which outcomes, by whose optimiser, and what a resumed run has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_kit.rollout import Rollout, Status, TokenRewards
from rlhf_kit.trainers.scoring import Scores

LORA = {"peft": {"type": "lora", "r": 2, "alpha": 4}}
WHOLE = {"peft": None}


def even(completion_ids, **_):
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def rewards(before: tuple[dict[str, Any], ...] = (), **fields: Any) -> list[dict[str, Any]]:
    source = {"type": "decomposed", "segments": {"by": "token"}, "online": {"learning_rate": 1e-2}, **fields}
    return [{"type": "function", "function": "even", "bounded": True}, *before, source]


@pytest.fixture
def make(build):
    def made(model=LORA, args=None, **fields):
        sources = rewards(**fields)
        return build({"even": even}, rewards=sources, model=model, credit={"estimator": "prime"}, args=args)

    return made


def source_of(trainer):
    return trainer.scoring.sources[-1]


@pytest.mark.parametrize("model", [WHOLE, LORA], ids=["whole", "lora"])
def test_it_learns_from_the_rollout_that_it_then_scores(model, make, logged) -> None:
    trainer = make(model, {"max_steps": 4})
    trainer.train()
    entries = logged(trainer)
    first, *_ = trainer.samples
    # All rewards are 0 yet, and a completion of nothing but its end has no segment, and a loss of 0.
    squares = [row["outcome"] ** 2 if row["completion"] else 0.0 for row in first]
    assert entries[0]["prm/decomposed/loss"] == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    assert all(entry["prm/decomposed/grad_norm"] > 0 for entry in entries)
    assert any(reward != 0 for row in first for reward in row["rewards"]["decomposed"])
    assert "prm/decomposed/outcome_auc" in {name for entry in entries for name in entry}


@pytest.mark.parametrize("model", [WHOLE, LORA], ids=["whole", "lora"])
def test_it_has_an_optimiser_of_its_own(model, make) -> None:
    trainer = make(model, {"max_steps": 1})
    trainer.train()
    own = source_of(trainer).trainable_parameters()
    policy = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert not {p.data_ptr() for p in own} & {p.data_ptr() for p in policy}
    assert all(p.grad is None and not p.requires_grad for p in own)
    (rollout,) = trainer.rollouts
    rollout = with_offsets(rollout)
    for parameter in policy:
        parameter.grad = torch.full_like(parameter, 7.0)
    before = [parameter.detach().clone() for parameter in policy]
    all_rows, outcomes = torch.ones(len(rollout), dtype=torch.bool), torch.tensor(even(ids_of(rollout)))
    mine = [parameter.detach().clone() for parameter in own]
    assert trainer.scoring.online["decomposed"].step(rollout, outcomes, all_rows)["grad_norm"] > 0
    assert all((parameter.grad == 7).all() for parameter in policy)
    assert all(map(torch.equal, before, policy))
    assert not all(map(torch.equal, mine, own))


def ids_of(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]


def with_offsets(rollout: Rollout) -> Rollout:
    """One character a token, which is all that segments by token ask for."""
    width = rollout.completion_ids.shape[1]
    ranges = [(place, place + 1) for place in range(width)]
    return replace(rollout, texts=["x" * width] * len(rollout), offsets=[ranges] * len(rollout))


def test_it_learns_the_same_with_gradient_checkpointing(make, logged) -> None:
    """Layers are computed again in the backward pass, by which time another adapter may be the active one."""
    ends, logs = [], []
    for checkpointing in (False, True):
        trainer = make(LORA, {"max_steps": 3, "gradient_checkpointing": checkpointing})
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        ends.append([parameter.detach().clone() for parameter in source_of(trainer).trainable_parameters()])
        logs.append([entry["prm/decomposed/loss"] for entry in logged(trainer)])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    for without, with_it in zip(*ends, strict=True):
        torch.testing.assert_close(without, with_it, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [WHOLE, LORA], ids=["whole", "lora"])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(model, make, tmp_path) -> None:
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = make(model, args, sampled=2), make(model, args, sampled=2)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-2"))
    parts = [(list(t.model.parameters()), source_of(t).trainable_parameters()) for t in (whole, resumed)]
    for before, after in zip(*parts, strict=True):
        assert len(before) > 0
        assert all(map(torch.equal, before, after))
    assert source_of(whole).head.linear.weight.abs().max() > 0


def test_another_source_is_its_local_signal(make, logged) -> None:
    """A PRM that learns has given rewards by the time that this source learns from them."""
    prm = {"type": "implicit_prm", "beta": 5.0, "online": {"learning_rate": 3e-2}}
    shaped = make(LORA, {"max_steps": 1}, before=(prm,), local={"source": "implicit_prm", "weight": 0.5})
    shaped.train()
    (rows,) = shaped.samples
    # Every reward of its own is 0 yet, so that each target's error is the target.
    squares = [row["outcome"] ** 2 if row["completion"] else 0.0 for row in rows]
    local = [square_of_segments(row["rewards"]["implicit_prm"], row["tokens"]) for row in rows]
    expected = (sum(squares) + 0.5 * sum(local)) / len(rows)
    assert logged(shaped)[0]["prm/decomposed/loss"] == pytest.approx(expected, rel=1e-4)
    assert max(local) > 1e-3


def square_of_segments(rewards: list[float], tokens: list[str]) -> float:
    """Mean square of what the tokens with text were given, each with the special tokens behind it."""
    sums = [0.0]
    starts = [place for place, token in enumerate(tokens) if not token.startswith("<")]
    for place, reward in enumerate(rewards):
        if place in starts[1:]:
            sums.append(0.0)
        sums[-1] += reward
    return sum(value**2 for value in sums) / len(sums) if starts else 0.0


def test_what_a_source_did_not_judge_is_no_local_signal() -> None:
    status = torch.tensor([Status.OK, Status.FAILED, Status.NOT_APPLICABLE]).int()
    scores = Scores({"judge": TokenRewards(torch.tensor([[1.0, 0.0]] * 3), status)}, torch.ones(3, dtype=torch.bool))
    given = scores.given()["judge"]
    assert given[0].tolist() == [1.0, 0.0]
    assert given[1:].isnan().all()
