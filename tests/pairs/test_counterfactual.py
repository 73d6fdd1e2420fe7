"""Counterfactual pairs: an instruction shapes what is sampled, and no row that is trained on shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.data.messages import prompt_text
from rlhf_kit.data.outcomes import encode_row
from rlhf_kit.errors import RunError
from rlhf_kit.models.generation import generate_ids
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.pairs.context import PairsContext
from rlhf_kit.pairs.counterfactual import repeats, with_instruction
from rlhf_kit.pairs.files import read_rows
from rlhf_kit.pairs.stage import run_pairs

PIRATE, PLAIN = "Speak as a pirate would.", "Answer in plain and sober words."


def stage(folder: Path | str, path: str = "none", count: int = 1, chat: bool = False, **builder: Any) -> Pairs:
    return Pairs.model_validate(
        {
            "type": "pairs",
            "model": {"path": str(folder)},
            "data": {"type": "jsonl", "path": path, "chat": chat},
            "generation": {"num_generations": count, "max_new_tokens": 6, "prompts_at_once": 2, "temperature": 1e-3},
            "builder": {"type": "counterfactual", **builder},
        }
    )


class Speaking(PairsContext):
    """Samples what `speak` says of a prompt's text, in the model's tokens, closed unless it ends in an ellipsis."""

    def __init__(self, stage: Pairs, speak: Callable[[str], str]) -> None:
        super().__init__(stage, recipe="run")
        self.speak = speak
        self.asked: list[Any] = []

    @property
    def ends(self) -> set[int]:  # type: ignore[override]
        return {self.tokenizer.eos_token_id}  # type: ignore[return-value]

    def sample(self, prompts: Sequence[Any]) -> list[list[int]]:
        self.asked += prompts
        said = [self.speak(prompt_text(prompt)) for prompt in prompts]
        ids: Any = self.tokenizer(said, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return [own if text.endswith("…") else [*own, end] for text, own in zip(said, ids, strict=True)]


def built(context: Speaking, prompts: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows that are kept, and the facts."""
    builder = context.stage.builder.build(context)
    made = builder.finish(builder.build_rows([{"prompt": prompt} for prompt in prompts], 0))
    return list(made.files["paired"]), dict(made.facts)


def manner(text: str) -> str:
    if PIRATE in text:
        return "Arr, aye."
    return "Yes, it is." if PLAIN in text else "Sure!"


class TestDirections:
    @pytest.mark.parametrize(
        ("builder", "chosen", "rejected"),
        [
            ({"encourage": PIRATE}, "Arr, aye.", "Sure!"),
            ({"discourage": PIRATE}, "Sure!", "Arr, aye."),
            ({"encourage": PLAIN, "discourage": PIRATE}, "Yes, it is.", "Arr, aye."),
        ],
    )
    def test_which_side_is_written_under_which_instruction(self, talker, builder, chosen, rejected) -> None:
        context = Speaking(stage(talker, count=2, **builder), manner)
        rows, facts = built(context, ["Is it so?", "And this?"])
        assert [(row["prompt"], row["prompt_index"]) for row in rows] == [("Is it so?", 0)] * 2 + [("And this?", 1)] * 2
        assert {(row["chosen"], row["rejected"]) for row in rows} == {(chosen, rejected)}
        assert context.texts([rows[0]["chosen_ids"], rows[0]["rejected_ids"]]) == [chosen, rejected]
        assert facts["pairs"] == 4 and "dropped" not in rows[0] and rows[0]["recipe"] == "run"

    def test_a_conversation_stays_one(self, talker) -> None:
        prompt = [{"role": "system", "content": "You help."}, {"role": "user", "content": "Is it so?"}]
        context = Speaking(stage(talker, encourage=PIRATE), manner)
        rows, _ = built(context, [prompt])
        assert rows[0]["prompt"] == prompt
        assert rows[0]["chosen"] == [{"role": "assistant", "content": "Arr, aye."}]
        assert rows[0]["rejected"] == [{"role": "assistant", "content": "Sure!"}]


class TestWithInstruction:
    def test_text_has_it_in_front(self) -> None:
        assert with_instruction("Q: why?\nA:", "Be brief.", "user") == "Be brief.\n\nQ: why?\nA:"
        assert with_instruction("Q: why?\nA:", None, "user") == "Q: why?\nA:"

    SYSTEM, ASK = {"role": "system", "content": "You help."}, {"role": "user", "content": "Why?"}
    ANSWER, AGAIN = {"role": "assistant", "content": "So."}, {"role": "user", "content": "Really?"}

    @pytest.mark.parametrize(
        ("prompt", "place", "expected"),
        [
            ([ASK, ANSWER, AGAIN], "user", [ASK, ANSWER, {"role": "user", "content": "Be brief.\n\nReally?"}]),
            ([ASK, ANSWER], "user", [{"role": "user", "content": "Be brief.\n\nWhy?"}, ANSWER]),
            ([ASK], "system", [{"role": "system", "content": "Be brief."}, ASK]),
            ([SYSTEM, ASK], "system", [{"role": "system", "content": "You help.\n\nBe brief."}, ASK]),
            ([SYSTEM, ASK], "user", [SYSTEM, {"role": "user", "content": "Be brief.\n\nWhy?"}]),
            ([ANSWER], "user", [{"role": "system", "content": "Be brief."}, ANSWER]),
        ],
    )
    def test_messages_have_it_where_it_is_asked_for(self, prompt, place, expected) -> None:
        before = [dict(message) for message in prompt]
        assert with_instruction(prompt, "Be brief.", place) == expected
        assert prompt == before

    def test_a_message_in_parts(self) -> None:
        image = {"type": "image"}
        asked = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}
        (message,) = with_instruction([asked], "Be brief.", "user")
        assert message["content"] == [{"type": "text", "text": "Be brief.\n\n"}, *asked["content"]]  # type: ignore[index]


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="…"), max_size=30)
STYLES = st.lists(st.text("bdfgkmpqz", min_size=3, max_size=7), min_size=2, max_size=5).map(" ".join)


@st.composite
def prompts(draw: st.DrawFn) -> Any:
    """Text, or messages with and without a system turn."""
    if draw(st.booleans()):
        return draw(TEXTS.filter(str.strip))
    turns = draw(st.lists(TEXTS, min_size=1, max_size=3))
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return [{"role": "system", "content": draw(TEXTS)}, *messages] if draw(st.booleans()) else messages


class TestNothingLeaks:
    @given(
        prompt=prompts(),
        styles=st.tuples(STYLES, STYLES).filter(lambda two: two[0] not in two[1] and two[1] not in two[0]),
        given_=st.sampled_from([(True, False), (False, True), (True, True)]),
        place=st.sampled_from(["user", "system"]),
        echo=st.booleans(),
    )
    def test_no_instruction_is_in_what_is_trained_on(self, talker, prompt, styles, given_, place, echo) -> None:
        """Whatever the prompt, and also of a model that repeats all that it reads."""
        names = [name for name, wanted in zip(("encourage", "discourage"), given_, strict=True) if wanted]
        told = {name: styles[number] for number, name in enumerate(names)}
        context = Speaking(stage(talker, place=place, **told), lambda text: text if echo else f"{len(text)}")
        builder = context.stage.builder.build(context)
        rows = builder.build_rows([{"prompt": prompt}], 0)
        assert [sum(style in prompt_text(asked) for asked in context.asked) for style in told.values()] == [1] * len(
            told
        )
        assert [row["prompt"] for row in rows] == [prompt]
        if echo:
            there = any(repeats(prompt_text(prompt), style) for style in told.values())
            assert rows[0]["dropped"] == ("in_prompt" if there else "leaked")
        for row in rows:
            for side in ("chosen", "rejected"):
                ids = encode_row(context.tokenizer, row["prompt"], row[side], row[f"{side}_ids"])
                trained = ids["prompt_ids"] if row["dropped"] else ids["prompt_ids"] + ids["completion_ids"]
                read = context.tokenizer.decode(trained)
                assert not any(style in read for style in told.values())

    def test_a_prompt_that_has_the_instruction_already_is_dropped(self, talker) -> None:
        context = Speaking(stage(talker, encourage=PIRATE), manner)
        rows, facts = built(context, [f"Please: speak, as a PIRATE would! {PIRATE}", "Is it so?"])
        assert [row["prompt"] for row in rows] == ["Is it so?"]
        assert facts["in_prompt"] == 1

    @pytest.mark.parametrize(
        ("said", "leaked"),
        [
            ("You asked me to speak as a pirate would. Arr.", True),
            ("SPEAK -- as a *pirate*\nwould: arr.", True),
            ("I speak as a pirate, arr.", True),
            ("I speak as any pirate would.", False),
            ("A pirate would speak as a man.", False),
            ("Speakas apirate would", False),
        ],
    )
    def test_a_completion_that_repeats_it_is_dropped_and_counted(self, talker, said, leaked) -> None:
        context = Speaking(
            stage(talker, encourage=PIRATE, leaked_words=4), lambda text: said if PIRATE in text else "A"
        )
        builder = context.stage.builder.build(context)
        rows = builder.build_rows([{"prompt": "Is it so?"}], 0)
        assert rows[0]["dropped"] == ("leaked" if leaked else "")

    def test_either_side_may_leak_either_instruction(self, talker) -> None:
        context = Speaking(
            stage(talker, encourage=PLAIN, discourage=PIRATE), lambda text: "?" if PIRATE in text else PIRATE
        )
        assert context.stage.builder.build(context).build_rows([{"prompt": "So?"}], 0)[0]["dropped"] == "leaked"

    @pytest.mark.parametrize(
        ("text", "instruction", "in_a_row", "expected"),
        [
            ("Because of that", "Be", None, False),
            ("be, of all", "Be", None, True),
            ("one two three", "two three four", None, False),
            ("one two three", "two three four", 2, True),
            ("one two three", "two four three", 2, False),
            ("one two", "one two", 9, True),
            ("", "one", None, False),
            ("好的，请用简短的话回答。", "用简短的话", None, True),
            ("好的，请用很短的话回答。", "用简短的话", None, False),
        ],
    )
    def test_words_in_a_row(self, text, instruction, in_a_row, expected) -> None:
        assert repeats(text, instruction, in_a_row) is expected


class TestDropped:
    def test_sides_that_are_cut_off_or_alike_are_dropped_and_counted(self, talker) -> None:
        def speak(text: str) -> str:
            styled = PIRATE in text
            if "cut" in text:
                return ("aye…" if styled else "no") if "chosen" in text else ("aye" if styled else "no…")
            return "same" if "alike" in text else ("aye" if styled else "no")

        asked = ["cut chosen", "cut rejected", "alike", "fine"]
        rows, facts = built(Speaking(stage(talker, encourage=PIRATE), speak), asked)
        assert [(row["prompt"], row["prompt_index"]) for row in rows] == [("fine", 3)]
        assert {name: facts[name] for name in ("in_prompt", "truncated", "leaked", "identical")} == {
            "in_prompt": 0, "truncated": 2, "leaked": 0, "identical": 1
        }  # fmt: skip
        kept, facts = built(Speaking(stage(talker, encourage=PIRATE, truncated="keep"), speak), asked)
        assert [row["prompt"] for row in kept] == ["cut chosen", "cut rejected", "fine"]
        assert facts["truncated"] == 0

    def test_if_none_is_kept_it_says_why(self, talker) -> None:
        context = Speaking(stage(talker, encourage=PIRATE), lambda text: "same")
        with pytest.raises(RunError, match=r"none of 2 pairs \(0 in_prompt, 0 truncated, 0 leaked, 2 identical\)"):
            built(context, ["one", "two"])


def test_both_sides_are_the_models_own_of_the_prompts_that_are_meant(talker: Path, tmp_path: Path) -> None:
    """At a temperature next to 0 a sample is the likeliest completion."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "the film"}\n{"prompt": "the story"}\n{"prompt": "I like"}\n')
    settings = stage(talker, str(path), chat=True, encourage=PIRATE, truncated="keep")
    results = run_pairs(settings, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "paired.parquet")
    assert len(rows) == results["pairs"] == 3
    context = PairsContext(settings)
    for row in rows:
        content = row["prompt"][0]["content"]
        for side, told in (("chosen", f"{PIRATE}\n\n{content}"), ("rejected", content)):
            prompt = [{"role": "user", "content": told}]
            own = generate_ids(context.policy, context.tokenizer, [prompt], max_new_tokens=6)  # type: ignore[arg-type]
            assert row[f"{side}_ids"] == own[0]
            assert row[side] == [{"role": "assistant", "content": context.texts(own)[0]}]


def test_what_cannot_work_is_said(tmp_path: Path) -> None:
    def paths(**builder: Any) -> list[str]:
        return [problem.path for problem in stage(tmp_path, **builder).problems()]

    assert paths() == ["builder.encourage"]
    assert paths(encourage="Be brief.", discourage="be BRIEF") == ["builder.discourage"]
    assert paths(encourage="Be brief.", discourage="Be long.") == paths(discourage="Be long.") == []
