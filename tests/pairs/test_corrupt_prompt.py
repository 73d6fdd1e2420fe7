"""Corrupted prompts: another instruction for the same completion, by rules or by a judge, in rows for I-ORPO."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.credit.segments import sentences
from rlhf_kit.data.config import Parquet
from rlhf_kit.data.load import load_data
from rlhf_kit.errors import RunError
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.pairs.context import PairsContext
from rlhf_kit.pairs.corrupt_prompt import corrupted_texts
from rlhf_kit.pairs.files import read_rows
from rlhf_kit.pairs.stage import run_pairs

from ..judges.scripted import Reply, ScriptedServer, asked

BREAD = "Write a recipe for bread.\n- Use 3 spoons of salt.\n- It is baked for 40 minutes."
STORY = "Tell a story about Ann. She can fly. End it well."


def one(text: str, how: str, others: tuple[str, ...] = (), seed: str = "0") -> str | None:
    """The text after a corruption; None where it allows none."""
    new, by = corrupted_texts([text, *others], [how], seed)[0]
    assert by in (how, "unchanged")
    return new if by == how else None


class TestCorruptions:
    def test_a_sentence_is_left_out(self) -> None:
        found = {one(STORY, "drop_sentence", seed=str(seed)) for seed in range(40)}
        assert found == {
            "She can fly. End it well.",
            "Tell a story about Ann. End it well.",
            "Tell a story about Ann. She can fly.",
        }
        assert one("Tell a story about Ann.", "drop_sentence") is None

    def test_items_of_a_list_are_sentences(self) -> None:
        found = {one(BREAD, "drop_sentence", seed=str(seed)) for seed in range(40)}
        assert "Write a recipe for bread.\n- It is baked for 40 minutes." in found and len(found) == 3

    def test_a_sentence_becomes_one_of_another_row(self) -> None:
        found = {one(STORY, "replace_sentence", ("Be brief. End it well.",), str(seed)) for seed in range(80)}
        assert "Tell a story about Ann. Be brief. End it well." in found
        for text in found:
            assert text is not None and text != STORY and len(sentences(text)) == 3
        assert one("End it well.", "replace_sentence", (STORY,)) is None

    def test_the_whole_becomes_that_of_another_row(self) -> None:
        assert one(STORY, "swap", (BREAD, " tell a story about ann. she can fly.  End it well.")) == BREAD
        assert one(STORY, "swap", (STORY, STORY)) is None

    def test_the_edits_of_perturbed_data(self) -> None:
        number, negated = one(BREAD, "number"), one("It is baked.", "negate")
        assert number is not None and re.sub(r"\d+", "N", number) == re.sub(r"\d+", "N", BREAD) and number != BREAD
        assert negated == "It is not baked."
        assert one("Tell a story.", "number") is None

    def test_a_way_that_the_prompt_does_not_allow_gives_place_to_another(self) -> None:
        texts = ["Add 3 and 4", "Say hello"] * 10
        found = corrupted_texts(texts, ["number", "drop_sentence", "swap"], "0")
        assert {how for _, how in found[::2]} == {"number", "swap"} and {how for _, how in found[1::2]} == {"swap"}

    @given(
        texts=st.lists(st.text("aA 1.\n", max_size=12) | st.sampled_from([BREAD, STORY]), min_size=1, max_size=6),
        seed=st.sampled_from("01"),
    )
    def test_what_is_corrupted_says_something_else_and_the_rest_is_counted(self, texts: list[str], seed: str) -> None:
        ways = [
            "swap",
            "drop_sentence",
            "replace_sentence",
            "number",
            "negate",
            "entity",
            "word",
            "delete",
            "duplicate",
        ]
        found = corrupted_texts(texts, ways, seed)
        assert found == corrupted_texts(texts, ways, seed) and len(found) == len(texts)
        for text, (new, how) in zip(texts, found, strict=True):
            assert how in (*ways, "unchanged")
            assert (new == "") if how == "unchanged" else (new.strip() and new.lower().split() != text.lower().split())


ROWS = [{"prompt": f"Add {n} and {n + 1}. Then say why.", "completion": f"{2 * n + 1}", "source": n} for n in range(5)]


def stage(tmp_path: Path, rows: list[dict[str, Any]], chat: bool = False, **builder: Any) -> Pairs:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    model = {"model": builder.pop("model")} if "model" in builder else {}
    generation = {"prompts_at_once": 2}
    fields = {"type": "pairs", "data": {"type": "jsonl", "path": str(path), "chat": chat}, "generation": generation}
    return Pairs.model_validate({**fields, **model, "builder": {"type": "corrupt_prompt", **builder}})


def built(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[list[Any], dict[str, Any]]:
    results = run_pairs(stage(tmp_path, rows, **options), tmp_path / "run", seed=3, recipe="corrupt")
    return read_rows(tmp_path / "run" / "sft.parquet"), results


class TestStage:
    def test_rows_have_both_prompts_one_completion_and_the_rest_of_the_data(self, tmp_path: Path) -> None:
        rows, results = built(tmp_path, ROWS, corruptions=["number", "drop_sentence"])
        assert [row["prompt_index"] for row in rows] == list(range(5)) and results["rows"] == 5
        for row, given_ in zip(rows, ROWS, strict=True):
            assert {name: row[name] for name in given_} == given_
            assert row["corrupted_prompt"] != row["prompt"] and row["recipe"] == "corrupt" and "rewritten" not in row
        assert {row["corruption"] for row in rows} == {"number", "drop_sentence"}
        assert results["corruption/number"] + results["corruption/drop_sentence"] == 5

    def test_of_a_conversation_the_last_message(self, tmp_path: Path) -> None:
        rows, _ = built(tmp_path, ROWS, chat=True, corruptions=["drop_sentence"])
        assert rows[0]["prompt"] == [{"role": "user", "content": "Add 0 and 1. Then say why."}]
        (message,) = rows[0]["corrupted_prompt"]
        assert message["role"] == "user" and message["content"] in ("Add 0 and 1.", "Then say why.")
        assert rows[0]["completion"] == [{"role": "assistant", "content": "1"}]

    @pytest.mark.parametrize("how", ["drop_sentence", "replace_sentence", "swap", "number", "delete"])
    def test_of_a_dialogue_in_one_text_what_the_human_says_last(self, tmp_path: Path, how: str) -> None:
        head, tail = "\n\nHuman: Hello 7. It is I.\n\nAssistant: Hi 8. Well?\n\nHuman: ", "\n\nAssistant:"
        dialogues = [{**row, "prompt": head + row["prompt"] + tail} for row in ROWS]
        rows, _ = built(tmp_path, dialogues, corruptions=[how])
        assert len(rows) == 5
        for row in rows:
            said = row["corrupted_prompt"].removeprefix(head).removesuffix(tail)
            assert row["corrupted_prompt"] == head + said + tail != row["prompt"]
            assert said.strip() and "Human:" not in said and "Assistant:" not in said and "8" not in said

    def test_how_many_prompts_are_worked_off_at_once_changes_nothing(self, tmp_path: Path) -> None:
        rows, _ = built(tmp_path, ROWS)
        settings = stage(tmp_path, ROWS)
        whole = settings.model_copy(
            update={"generation": settings.generation.model_copy(update={"prompts_at_once": 9})}
        )
        run_pairs(whole, tmp_path / "whole", seed=3, recipe="corrupt")
        assert read_rows(tmp_path / "whole" / "sft.parquet") == rows

    def test_another_seed_and_another_round_corrupt_otherwise(self, tmp_path: Path) -> None:
        found = set()
        for seed, round_number in ((0, 1), (1, 1), (0, 2)):
            settings = stage(tmp_path, ROWS).model_copy(update={"round": round_number})
            run_pairs(settings, tmp_path / f"{seed}{round_number}", seed=seed)
            rows = read_rows(tmp_path / f"{seed}{round_number}" / "sft.parquet")
            found.add(tuple(row["corrupted_prompt"] for row in rows))
        assert len(found) == 3

    def test_a_prompt_that_cannot_be_corrupted_is_left_out_and_counted(self, tmp_path: Path) -> None:
        rows, results = built(
            tmp_path, [*ROWS, {"prompt": "Hello", "completion": "Hi", "source": 9}], corruptions=["number"]
        )
        assert len(rows) == 5 and results["unchanged"] == 1
        with pytest.raises(RunError, match=r"could change none of 2 prompts \(0 failed\): write other corruptions"):
            built(tmp_path, [{"prompt": "Hello", "completion": "Hi"}] * 2, corruptions=["number", "swap"])

    def test_i_orpo_encodes_both_prompts_with_the_completion(self, tmp_path: Path, small_policy: Path) -> None:
        from rlhf_kit.data.load import load_with_origins
        from rlhf_kit.models.config import Pretrained
        from rlhf_kit.models.loading import load_tokenizer
        from rlhf_kit.objectives.i_orpo import IOrpo
        from rlhf_kit.trainers.offline import objective_rows

        built(tmp_path, [{"prompt": f"{n} {n + 1} =", "completion": f"{n}"} for n in range(3)], corruptions=["number"])
        data, origins = load_with_origins(Parquet(type="parquet", path=str(tmp_path / "run" / "sft.parquet")))
        tokenizer = load_tokenizer(Pretrained(path=str(small_policy)))
        for row in objective_rows(data, IOrpo(type="i_orpo"), tokenizer, origins):
            assert row["right.completion_ids"] == row["wrong.completion_ids"]
            assert row["right.prompt_ids"] != row["wrong.prompt_ids"]
        assert len(load_data(Parquet(type="parquet", path=str(tmp_path / "run" / "sft.parquet")))) == 3


def rewriting(request: dict[str, Any], number: int) -> Reply:
    """A judge that makes sums of odd numbers products, leaves 2 as it is, and is lost for words at 4."""
    first = int(re.findall(r"Add (\d)", asked(request))[0])
    if first == 4:
        return Reply(text="I would rather not.")
    if first == 2:
        return Reply(text=json.dumps({"prompt": "add 2 and 3.  Then say why."}))
    if first == 0:
        return Reply(text='{"prompt": "  "}')
    return Reply(text=f'Here it is: {{"prompt": "Multiply {first} by itself."}}')


class TestJudge:
    def test_a_judge_rewrites_and_what_it_fails_at_or_leaves_is_counted(self, tmp_path: Path) -> None:
        with ScriptedServer(rewriting) as server:
            judge = {"type": "server", "base_url": server.base_url, "model": "judge"}
            rows, results = built(tmp_path, ROWS, judge=judge)
            told = [asked(request) for request in server.requests]
        assert [(row["prompt_index"], row["corrupted_prompt"]) for row in rows] == [
            (1, "Multiply 1 by itself."),
            (3, "Multiply 3 by itself."),
        ]
        assert {row["corruption"] for row in rows} == {"rewritten"}
        assert (results["failed"], results["unchanged"], results["corruption/rewritten"]) == (2, 1, 2)
        assert all("BEGIN prompt" in text and "follow no instruction" in text for text in told)

    def test_what_cannot_work_is_said(self, tmp_path: Path) -> None:
        def paths(**builder: Any) -> list[str]:
            return [problem.path for problem in stage(tmp_path, ROWS, **builder).problems()]

        policy, model = {"type": "policy"}, {"path": "folder"}
        assert paths() == paths(judge=policy, model=model) == []
        assert paths(judge=policy) == paths(model=model) == ["model"]
        assert paths(judge=policy, model=model, corruptions=["swap"]) == ["builder.corruptions"]
        assert paths(prompt="none.txt")[0] == "builder.prompt"

    def test_no_judge_is_loaded_that_is_not_asked(self, tmp_path: Path) -> None:
        settings = stage(tmp_path, ROWS, judge={"type": "policy"}, model={"path": str(tmp_path / "nowhere")})
        settings.builder.build(PairsContext(settings)).finish(
            [{**ROWS[0], "prompt_index": 0, "rewritten": "Else.", "corruption": "rewritten"}]
        )
