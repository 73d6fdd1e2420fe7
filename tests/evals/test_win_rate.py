"""Win rates by a judge on a real HTTP server, in both orders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from rlhf_kit.errors import RunError
from rlhf_kit.evals.run import run_eval
from rlhf_kit.evals.stage import Eval

from ..judges.scripted import Reply, ScriptedServer, asked

ROWS = [
    {"prompt": "1", "ours": "good good", "reference": "bad"},  # wins
    {"prompt": "2", "ours": "bad", "reference": "good one indeed"},  # loses
    {"prompt": "3", "ours": "so", "reference": "lala"},  # undecided: whatever stands first
    {"prompt": "4", "ours": "the same", "reference": "the same"},  # not asked
    {"prompt": "5", "ours": "good", "reference": "bad bad"},  # wins
]


def letter(better: str) -> Reply:
    """The judge is 9 to 1 for a letter."""
    odds = {"A": 0.9, "B": 0.1} if better == "A" else {"A": 0.1, "B": 0.9}
    return Reply(top=[(name, math.log(value)) for name, value in odds.items()])


def prefers_good(request: dict[str, Any], number: int) -> Reply:
    """What holds "good" is better; between two others, what stands first."""
    first, second = asked(request).split("B is the second")
    return letter("B" if "\ngood" in second and "\ngood" not in first else "A")


@pytest.fixture
def serve() -> Iterator[Any]:
    with ExitStack() as stack:
        yield lambda script: stack.enter_context(ScriptedServer(script))


def judge(server: ScriptedServer, **fields: Any) -> dict[str, Any]:
    return {"type": "server", "base_url": server.base_url, "model": "m", "timeout": 10.0, "concurrency": 4, **fields}


def make(jsonl: Any, server: ScriptedServer, rows: Any = ROWS, **fields: Any) -> Eval:
    evaluation = {"type": "win_rate", "data": jsonl(rows), "column": "ours", "judge": judge(server), **fields}
    return Eval.model_validate({"type": "eval", "evals": {"wins": evaluation}})


def test_wins_ties_and_losses_over_both_orders(jsonl, serve, tmp_path):
    server = serve(prefers_good)
    figures = run_eval(make(jsonl, server), tmp_path)["evals"]["wins"]
    values = {name: figure["value"] for name, figure in figures.items()}
    assert len(server.requests) == 8  # two for each pair of different texts
    assert (values["wins"], values["ties"], values["losses"]) == (0.4, 0.4, 0.2)
    assert values["win_rate"] == pytest.approx((1 + 0 + 0.5 + 0.5 + 1) / 5)
    assert values["first_place"] == pytest.approx((0.5 + 0.5 + 1 + 0.5) / 4)
    assert values["consistent"] == pytest.approx(3 / 4)
    assert values["words"] == pytest.approx((2 + 1 + 1 + 2 + 1) / 5)
    assert values["reference_words"] == pytest.approx((1 + 3 + 1 + 2 + 2) / 5)
    assert values["win_rate_where_longer"] == 1.0
    assert values["win_rate_where_shorter"] == 0.5
    assert 0 <= figures["win_rate"]["low"] <= 0.6 <= figures["win_rate"]["high"] <= 1


def test_a_judge_that_sees_only_places_gives_ties_and_is_found_out(jsonl, serve, tmp_path):
    figures = run_eval(make(jsonl, serve(lambda request, number: letter("A"))), tmp_path)["evals"]["wins"]
    assert figures["win_rate"]["value"] == 0.5
    assert figures["ties"]["value"] == 1.0
    assert figures["first_place"]["value"] == 1.0


def test_a_row_whose_judgement_failed_is_left_out(jsonl, serve, tmp_path):
    def script(request: dict[str, Any], number: int) -> Reply:
        return Reply(status=400, text="no") if "lala" in asked(request) else prefers_good(request, number)

    stage = make(jsonl, serve(script))
    figures = run_eval(stage, tmp_path)["evals"]["wins"]
    assert figures["win_rate"]["count"] == 4
    assert figures["win_rate"]["value"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)


def test_a_judge_that_never_answers_stops_the_evaluation(jsonl, serve, tmp_path):
    stage = make(jsonl, serve(lambda request, number: Reply(status=400, text="no")), rows=ROWS[:3])
    with pytest.raises(RunError, match=r"evals\.wins: the judge answered none of 6 questions"):
        run_eval(stage, tmp_path)


def test_two_models_against_each_other(jsonl, serve, tmp_path, small_policy, prm):
    rows = [{"prompt": f"{number} ="} for number in range(7)]
    server = serve(lambda request, number: letter("A"))
    evaluation = {"type": "win_rate", "data": jsonl(rows), "judge": judge(server), "opponent": {"path": str(prm)}}
    content = {
        "type": "eval",
        "model": {"path": str(small_policy)},
        "evals": {"wins": evaluation | {"max_new_tokens": 5}},
    }
    figures = run_eval(Eval.model_validate(content), tmp_path)["evals"]["wins"]
    assert figures["win_rate"]["value"] == 0.5
    assert figures["win_rate"]["count"] == 7
    assert 0 < len(server.requests) <= 14
    same = {**content, "evals": {"wins": {**content["evals"]["wins"], "opponent": {"path": str(small_policy)}}}}
    before = len(server.requests)
    assert run_eval(Eval.model_validate(same), tmp_path)["evals"]["wins"]["ties"]["value"] == 1.0
    assert len(server.requests) == before  # greedily the same texts


def test_a_local_judge(jsonl, talker, tmp_path):
    stage = Eval.model_validate(
        {
            "type": "eval",
            "evals": {
                "wins": {
                    "type": "win_rate",
                    "data": jsonl(ROWS),
                    "column": "ours",
                    "judge": {"type": "local", "model": {"path": str(talker)}},
                }
            },
        }
    )
    figures = run_eval(stage, tmp_path)["evals"]["wins"]
    assert 0 <= figures["win_rate"]["value"] <= 1
    assert figures["win_rate"]["count"] == 5
