"""Each objective against its formula, worked by hand on a few tokens, and against its own gradient's meaning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from rlhf_kit.objectives import ObjectiveConfig
from rlhf_kit.objectives.base import Objective, Rows, Scored
from rlhf_kit.objectives.orpo import log1mexp, log_odds_of


def objective(**fields: Any) -> Objective:
    return TypeAdapter(ObjectiveConfig).validate_python(fields)


def scored(*rows: list[float], **fields: list[list[float]]) -> Scored:
    """Completions whose tokens have these probabilities; shorter rows are padded."""
    width = max(map(len, rows))
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])

    def logs(values: Any) -> torch.Tensor:
        padded = torch.tensor([[*row, *[1.0] * (width - len(row))] for row in values], dtype=torch.float64)
        return padded.log()

    extra = {name: logs(values) if name != "kl" else torch.tensor(values) for name, values in fields.items()}
    return Scored(logs(rows).requires_grad_(), mask, **extra)


def gradient(objective: Objective, rows: Rows, of: Scored) -> torch.Tensor:
    """d loss / d log-probability of each token."""
    return torch.autograd.grad(objective.loss(rows).rows.sum(), of.log_probs)[0]


def test_orpo() -> None:
    rows = Rows({"chosen": scored([0.5, 0.5]), "rejected": scored([0.25, 0.25, 0.25])})
    # odds 1 and 1/3: the log odds ratio is log 3, and -logsigmoid(log 3) = log(4/3)
    expected = math.log(2) + 0.4 * math.log(4 / 3)
    loss = objective(type="orpo", beta=0.4).loss(rows)
    assert loss.rows.tolist() == pytest.approx([expected])
    assert loss.metrics["log_odds_ratio"].tolist() == pytest.approx([math.log(3)])


def test_the_likelihood_of_orpo_can_cover_the_prompt() -> None:
    chosen = scored([0.5, 0.5], prompt_log_probs=[[0.25, 0.125]])
    chosen = Scored(chosen.log_probs, chosen.mask, chosen.prompt_log_probs, torch.tensor([[True, True]]))
    rows = Rows({"chosen": chosen, "rejected": scored([0.25])})
    both = objective(type="orpo", beta=0, nll="prompt_and_completion")
    assert both.needs == {"prompt"} and objective(type="orpo").needs == frozenset()
    assert both.loss(rows).rows.tolist() == pytest.approx([(1 + 1 + 2 + 3) * math.log(2) / 4])


def test_orpo_is_that_of_trl() -> None:
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    chosen, rejected = torch.rand(2, 50).mul(-6)
    shell = trainer.__new__(trainer)
    shell.beta = 0.3
    shell.accelerator = type("Here", (), {"device": torch.device("cpu")})
    theirs, *_ = shell.odds_ratio_loss(chosen, rejected)
    mask = torch.ones(50, 1, dtype=torch.bool)
    rows = Rows({"chosen": Scored(chosen[:, None], mask), "rejected": Scored(rejected[:, None], mask)})
    loss = objective(type="orpo", beta=0.3).loss(rows)
    torch.testing.assert_close(loss.rows - loss.metrics["nll"], -theirs)


@pytest.mark.parametrize("x", [-1e-12, -1e-6, -0.1, -0.69, -0.7, -5.0, -50.0])
def test_log1mexp_keeps_its_digits(x: float) -> None:
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    exact = float((1 - Decimal(x).exp()).ln())
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(exact, rel=1e-14)


def test_log_odds_of_a_certain_completion_are_finite_and_so_is_the_gradient() -> None:
    log_prob = torch.zeros(1, requires_grad=True)
    odds = log_odds_of(log_prob)
    odds.sum().backward()
    assert odds.isfinite().all() and log_prob.grad is not None and log_prob.grad.isfinite().all()


def test_i_orpo_compares_two_prompts_for_one_response() -> None:
    rows = Rows({"right": scored([0.5]), "wrong": scored([0.25])})
    assert objective(type="i_orpo").beta == 0.4
    assert objective(type="i_orpo").loss(rows).rows.tolist() == pytest.approx([math.log(2) + 0.4 * math.log(4 / 3)])
    roles = objective(type="i_orpo").roles
    assert roles == {"right": ("prompt", "completion"), "wrong": ("corrupted_prompt", "completion")}


def test_cringe_learns_the_right_rows_and_contrasts_the_wrong_ones() -> None:
    rows = Rows(
        {"completion": scored([0.5, 0.25], [0.5, 0.2], contrast=[[0.1, 0.1], [0.25, 0.6]])},
        {"label": torch.tensor([1.0, 0.0])},
    )
    wrong = (-math.log(0.25 / 0.75) - math.log(0.6 / 0.8)) / 2
    loss = objective(type="cringe", alpha=0.5).loss(rows)
    assert loss.rows.tolist() == pytest.approx([1.5 * math.log(2), 0.5 * wrong])
    pushed = gradient(objective(type="cringe"), rows, rows["completion"])
    assert (pushed[0] < 0).all() and (pushed[1] > 0).all()  # descent raises the right row's tokens, lowers the other's
    # d softplus(s - s*) = e^s / (e^s + e^s*)
    assert pushed[1].tolist() == pytest.approx([0.5 / 0.75 / 2, 0.2 / 0.8 / 2])


def test_the_gate_of_pairwise_cringe_closes_on_pairs_that_are_apart() -> None:
    rows = Rows(
        {
            "chosen": scored([0.5], [0.5], contrast=[[0.1], [0.1]]),
            "rejected": scored([0.5], [0.125], contrast=[[0.5], [0.5]]),
        }
    )
    loss = objective(type="pairwise_cringe", margin=math.log(2), tau=0.5).loss(rows)
    # M is 0 and log 4: the gates are sigmoid(2 log 2) = 4/5 and sigmoid(-2 log 2) = 1/5
    assert loss.metrics["gate"].tolist() == pytest.approx([0.8, 0.2])
    bodies = [math.log(2) - math.log(0.5), math.log(2) - math.log(0.5 / 0.625)]
    assert loss.rows.tolist() == pytest.approx([0.8 * bodies[0], 0.2 * bodies[1]])
    chosen = gradient(objective(type="pairwise_cringe", margin=math.log(2), tau=0.5), rows, rows["chosen"])
    assert chosen[:, 0].tolist() == pytest.approx([-0.8, -0.2])  # the gate is a weight


@pytest.mark.parametrize("labels", [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
def test_pmpo_takes_positives_negatives_or_both(labels: list[float]) -> None:
    rows = Rows(
        {"completion": scored([0.5, 0.5], [0.25, 0.25], kl=[[0.1, 0.2], [0.3, 0.0]])}, {"label": torch.tensor(labels)}
    )
    sums = [-2 * math.log(2), -4 * math.log(2)]
    gains = [0.7 * s if label else -0.3 * s for s, label in zip(sums, labels, strict=True)]
    loss = objective(type="pmpo", alpha=0.7, beta=2.0).loss(rows)
    assert loss.rows.tolist() == pytest.approx([2 * 0.3 - gains[0], 2 * 0.3 - gains[1]])


def test_cut_unlearns_what_the_judgment_makes_likelier() -> None:
    plain, judged = scored([0.5, 0.5], [0.5, 0.5], [0.5, 0.5]), scored([0.6, 0.52], [0.6, 0.52], [0.6, 0.52])
    rows = Rows(
        {"plain": plain, "judged": judged},
        {"label": torch.tensor([0.0, 0.0, 1.0]), "weight": torch.tensor([1.0, 0.5, 1.0])},
    )
    # the first token's ratio is 1.2 > 1.1, the second's 1.04; each row has its own weight, a good one no unlearning
    told = -(math.log(0.6) + math.log(0.52)) / 2
    unlearnt = [(w * math.log(2) + math.log(2)) / 2 for w in (1.0, 0.5, 1.0)]
    loss = objective(type="cut").loss(rows)
    assert loss.rows.tolist() == pytest.approx([0.5 * (told + u) for u in unlearnt])
    assert loss.metrics["inappropriate"].tolist() == pytest.approx([0.5, 0.5, 0.0])
    pushed = gradient(objective(type="cut"), rows, plain)
    # 0.5 / 2 * w * p / (1 - p) for the unlearnt token, -0.5 / 2 for every other
    assert pushed.flatten().tolist() == pytest.approx([0.25, -0.25, 0.125, -0.25, -0.25, -0.25])


def test_cut_bears_a_certain_token() -> None:
    rows = Rows(
        {"plain": scored([1.0]), "judged": scored([1.0])}, {"label": torch.tensor([0.0]), "weight": torch.tensor([1.0])}
    )
    assert objective(type="cut", threshold=0.5).loss(rows).rows.isfinite().all()


def test_c3po_is_dpo_in_scope_and_likelihood_elsewhere() -> None:
    chosen = scored([0.5], [0.5], [0.5], reference=[[0.25], [0.5], [0.5]])
    rejected = scored([0.25], [0.9], [0.9], reference=[[0.5], [0.5], [0.5]])
    rows = Rows({"chosen": chosen, "rejected": rejected}, {"scope": torch.tensor([0.0, 1.0, 2.0])})
    margin = math.log(2) + math.log(2)
    expected = [math.log(1 + math.exp(-0.1 * margin)), 0.1 * math.log(2), 0.2 * math.log(2)]
    loss = objective(type="c3po")
    assert loss.loss(rows).rows.tolist() == pytest.approx(expected)
    assert (gradient(loss, rows, rejected)[1:] == 0).all()
    assert loss.ranking(rows)[0].item() == pytest.approx(margin) and loss.ranking(rows)[1:].isnan().all()


def test_ce_and_nca_are_on_beta_times_the_log_ratio() -> None:
    completion = scored([0.5, 0.5], [0.25], reference=[[0.25, 0.5], [0.5]])
    columns = {"label": torch.tensor([1.0, 0.0]), "offset": torch.tensor([0.0, 0.3])}
    rewards = [2 * math.log(2), -2 * math.log(2)]
    loss = objective(type="ce", beta=2.0).loss(Rows({"completion": completion}, columns))
    expected = [math.log(1 + math.exp(-rewards[0])), math.log(1 + math.exp(rewards[1] + 0.3))]
    assert loss.rows.tolist() == pytest.approx(expected)

    pair = Rows({"chosen": scored([0.5], reference=[[0.25]]), "rejected": scored([0.25], reference=[[0.5]])})

    def minus_log_sigmoid(x: float) -> float:
        return math.log(1 + math.exp(-x))

    w, r = rewards
    nca = minus_log_sigmoid(w) + 0.5 * minus_log_sigmoid(-w) + 0.5 * minus_log_sigmoid(-r)
    assert objective(type="nca", beta=2.0).loss(pair).rows.tolist() == pytest.approx([nca])


@pytest.mark.parametrize("kind", ["orpo", "i_orpo", "pairwise_cringe", "nca"])
def test_descent_prefers_the_chosen_completion(kind: str) -> None:
    extra = {"reference": [[0.3, 0.3]], "contrast": [[0.2, 0.2]]}
    better, worse = scored([0.3, 0.4], **extra), scored([0.4, 0.3], **extra)
    first, second = objective(type=kind).roles
    rows = Rows({first: better, second: worse})
    assert (gradient(objective(type=kind), rows, better) < 0).all()
    assert (gradient(objective(type=kind), rows, worse) > 0).all()
