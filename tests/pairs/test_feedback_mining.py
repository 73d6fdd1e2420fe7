"""Feedback in logs: what users say next labels answers and pairs them with revisions; nothing personal is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.data.config import Parquet
from rlhf_kit.data.load import load_data
from rlhf_kit.errors import RunError
from rlhf_kit.judges.base import Answer
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.pairs.context import PairsContext
from rlhf_kit.pairs.feedback import FeedbackRules, exchanges, read_rules
from rlhf_kit.pairs.feedback_mining import dialogue_of, label_of, revisions
from rlhf_kit.pairs.files import read_rows
from rlhf_kit.pairs.stage import run_pairs
from rlhf_kit.redact import EMAIL, PHONE, REDACTED

from ..judges.scripted import Reply, ScriptedServer, asked

RULES = read_rules(None)


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """A dialogue: the user begins."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def label(feedback: str, question: str = "What is it?") -> str:
    (exchange,) = exchanges(chat(question, "It is so.", feedback))
    return RULES.classify(exchange)[0]


class TestExchanges:
    def test_every_answer_has_what_stood_before_it_and_what_the_user_said_next(self) -> None:
        log = chat("Hello?", "Hi.", "Why?", "So.", system="Be kind.")
        first, second = exchanges(log)
        assert (first.prompt, first.completion, first.feedback, first.asked) == (log[:2], log[2:3], "Why?", "Hello?")
        assert (second.prompt, second.completion, second.feedback) == (log[:4], log[4:], None)

    def test_an_answer_with_tools_is_one_and_turns_in_a_row_are_joined(self) -> None:
        called = [
            {"role": "assistant", "tool_calls": [{"function": {"name": "sum", "arguments": {"a": 1}}}]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ]
        said = [{"role": "user", "content": "Thanks."}, {"role": "user", "content": "Bye."}]
        (exchange,) = exchanges([{"role": "user", "content": "1 + 2?"}, *called, *said])
        assert exchange.completion == called and exchange.feedback == "Thanks.\n\nBye."

    @pytest.mark.parametrize(
        "log",
        [
            [],
            chat("Hello?"),
            chat("Hello?", " ", "Why?"),
            [{"role": "assistant", "content": "Welcome."}, {"role": "user", "content": "Thanks."}],
        ],
    )
    def test_an_answer_that_says_nothing_or_to_nobody_is_none(self, log) -> None:
        assert exchanges(log) == []


class TestRules:
    @pytest.mark.parametrize(
        "text",
        [
            "Thanks!",
            "thank youuu!!!",
            "Ok thx, and what about the second one?",
            "Great! Can you write the essay now?",
            "That’s really helpful.",
            "That's a good idea. Where do I begin?",
            "I love it",
            "It works now",
            "That makes sense.",
            "Well done",
            "I really appreciate your help",
            "you're not mistaken, thanks",
            "I tried this and it works, nothing broke",
        ],
    )
    def test_satisfied(self, text: str) -> None:
        assert label(text) == "satisfied"

    @pytest.mark.parametrize(
        "text",
        [
            "That's wrong, it was in 1969.",
            "No, that is incorrect.",
            "your answer is not correct",
            "That is not what I asked for",
            "I asked you about the second law.",
            "You did not provide a single source.",
            "You forgot the last step",
            "The code still doesn’t work",
            "I still don't get it.",
            "This is too long",
            "Too much text, summarize it",
            "it's not entertaining",
            "That's not a good answer.",
            "I don't like it.",
            "That's not an essay, that's a poem.",
            "You suck.",
            "You are just wrong.",
            "I tried this and nothing happened.",
            "I tried it, it worked but now it does not.",
            "Please try again.",
            "Could you finish your last sentence?",
            "Thanks for nothing",
            "Thanks, but that's wrong.",
            "I like it, but you're overdoing it.",
        ],
    )
    def test_dissatisfied(self, text: str) -> None:
        assert label(text) == "dissatisfied"

    @pytest.mark.parametrize(
        "text",
        [
            "And in the year 2020?",
            "Tell me more about Apollo 11.",
            "What do you mean by that?",
            "Yes, go on.",
            "No, thanks.",
            "Thanks to the rain it was green.",
            "Can you write a thank you note to her?",
            "It's wrong to steal, isn't it?",
            "What if it doesn't work?",
            "Great Britain or Ireland?",
            "Can you try again with more detail?",
            "Is it too long a walk?",
            "Why is the sky blue?",
            "Interesting, but what about Rust?",
            "Thanks but would one browser be simpler?",
            "You are not wrong.",
            "You're never wrong",
            "I tried this and nothing broke.",
            "I tried it and it still works.",
        ],
    )
    def test_neither(self, text: str) -> None:
        assert label(text) == "neither"

    def test_the_first_rule_that_holds_decides_within_the_beginning(self) -> None:
        fields = {"within": 10, "pieces": {"good": "<fine>|good", "fine": "fine"}}
        rules = FeedbackRules.model_validate(
            {
                **fields,
                "rules": [
                    {"name": "bad", "label": "dissatisfied", "patterns": ["bad", "poor"]},
                    {"name": "good", "label": "satisfied", "patterns": [r"\b(?:<good>)\b"]},
                ],
            }
        )
        found = [
            rules.classify(exchanges(chat("a", "b", text))[0])
            for text in ("GOOD bad", "so fine", "goods", "a" * 9 + " bad")
        ]
        assert found == [("dissatisfied", "bad"), ("satisfied", "good"), ("neither", ""), ("neither", "")]

    @pytest.mark.parametrize(
        ("before", "now", "found"),
        [
            ("How do I bake good bread?", "how do I bake good bread", "dissatisfied"),
            ("How do I bake good bread?", "How do I bake very good bread?", "dissatisfied"),
            ("How do I bake good bread?", "How do I eat it?", "neither"),
            ("Yes, go on.", "Yes, go on.", "neither"),
        ],
    )
    def test_a_question_that_is_asked_again_was_not_answered(self, before: str, now: str, found: str) -> None:
        assert label(now, before) == found

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("I'm sorry, here it is.", True),
            ("Apologies, my mistake. Here it is.", True),
            ("You’re right! It was 1969.", True),
            ("Indeed, that was a poem. I apologise for it.", True),
            ("It was 1969.", False),
            ("To say sorry, one bows. The other one bows as well. An apology follows.", False),
        ],
    )
    def test_an_answer_that_opens_with_an_apology(self, text: str, found: bool) -> None:
        assert RULES.apologises(text) is found

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("{", "holds no rules"),
            ('{"rules": []}', "holds no rules"),
            ('{"rules": [{"name": "a", "label": "good", "patterns": ["a"]}]}', "holds no rules"),
            ('{"rules": [{"name": "a", "label": "neither", "patterns": ["("]}]}', "is no regular expression"),
            (json.dumps({"rules": [{"name": "a", "label": "neither", "patterns": ["b"]}] * 2}), "have one name"),
        ],
    )
    def test_a_file_that_holds_no_rules_is_refused(self, tmp_path: Path, content: str, said: str) -> None:
        (tmp_path / "rules.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            read_rules(str(tmp_path / "rules.json"))


class TestRevisions:
    @pytest.mark.parametrize(
        ("labels", "no_complaint", "satisfied"),
        [
            ("ds", [(0, 1)], [(0, 1)]),
            ("dn", [(0, 1)], []),
            ("d-", [(0, 1)], []),
            ("dds", [(0, 2)], [(0, 2)]),
            ("ndsds-", [(1, 2), (3, 4)], [(1, 2), (3, 4)]),
            ("dd", [], []),
            ("df", [], []),
            ("s-", [], []),
            ("", [], []),
        ],
    )
    def test_a_first_answer_and_what_ended_the_complaints(self, labels: str, no_complaint: Any, satisfied: Any) -> None:
        named = {"d": "dissatisfied", "s": "satisfied", "n": "neither", "f": "failed", "-": None}
        given_ = [named[one] for one in labels]
        assert list(revisions(given_, "no_complaint")) == no_complaint
        assert list(revisions(given_, "satisfied")) == satisfied


LOGS = [
    chat("When was it?", "In 1968.", "That's wrong.", "In 1969.", "Thanks!", "Any time."),
    chat("Write a poem.", "An essay.", "That is not a poem.", "Sorry. Roses are red.", "Too short.", "Violets too."),
    chat("Who?", "He.", "And where?", "There.", "Great, thanks."),
]


def stage(path: Path, rows: list[Any], **builder: Any) -> Pairs:
    path.write_text("\n".join(json.dumps(row if isinstance(row, dict) else {"messages": row}) for row in rows))
    columns = {"prompt": "messages"} if not isinstance(rows[0], dict) else {}
    model = {"model": builder.pop("model")} if "model" in builder else {}
    fields = {"type": "pairs", "data": {"type": "jsonl", "path": str(path), "columns": columns}, **model}
    generation = {"prompts_at_once": 2}
    return Pairs.model_validate({**fields, "generation": generation, "builder": {"type": "feedback_mining", **builder}})


def mined(tmp_path: Path, rows: list[Any], **builder: Any) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """The pairs, the labelled answers and the facts."""
    results = run_pairs(stage(tmp_path / "logs.jsonl", rows, **builder), tmp_path / "run", recipe="mine")
    return *(read_rows(tmp_path / "run" / f"{name}.parquet") for name in ("paired", "unpaired")), results


def said(row: dict[str, Any], *names: str) -> tuple[str, ...]:
    return tuple(row[name][-1]["content"] for name in names)


class TestStage:
    def test_answers_are_labelled_and_paired_with_their_revisions(self, tmp_path: Path) -> None:
        paired, unpaired, results = mined(tmp_path, LOGS)
        assert [said(row, "prompt", "chosen", "rejected") for row in paired] == [
            ("When was it?", "In 1969.", "In 1968."),
            ("Write a poem.", "Violets too.", "An essay."),
        ]
        assert [(*said(row, "prompt", "completion"), row["label"]) for row in unpaired] == [
            ("When was it?", "In 1968.", False),
            ("That's wrong.", "In 1969.", True),
            ("Write a poem.", "An essay.", False),
            ("That is not a poem.", "Sorry. Roses are red.", False),
            ("And where?", "There.", True),
        ]
        assert unpaired[1]["prompt"] == LOGS[0][:3] and unpaired[1]["feedback"] == "Thanks!"
        assert [row["prompt_index"] for row in unpaired] == [0, 0, 1, 1, 2] and unpaired[0]["recipe"] == "mine"
        expected = {"turns": 6, "satisfied": 2, "dissatisfied": 3, "neither": 1, "failed": 0, "pairs": 2, "rows": 5}
        assert {name: results[name] for name in expected} == expected
        assert results["rule/thanks"] == 2 and results["rule/wrong"] == 1

    def test_what_is_written_can_be_loaded_as_conversations(self, tmp_path: Path) -> None:
        mined(tmp_path, LOGS)
        rows = load_data(Parquet(type="parquet", path=str(tmp_path / "run" / "paired.parquet"))).to_list()
        assert rows[0]["prompt"] == LOGS[0][:1] and rows[0]["chosen"] == LOGS[0][3:4]

    def test_with_satisfied_a_revision_must_have_pleased(self, tmp_path: Path) -> None:
        paired, _, _ = mined(tmp_path, LOGS, accept="satisfied")
        assert [said(row, "chosen") for row in paired] == [("In 1969.",)]

    @pytest.mark.parametrize("apologies", ["drop", "keep"])
    def test_a_revision_that_apologises_answers_another_prompt(self, tmp_path: Path, apologies: str) -> None:
        logs = [chat("When?", "1968.", "That's wrong.", "I'm sorry, 1969."), LOGS[0]]
        paired, _, results = mined(tmp_path, logs, apologies=apologies)
        assert len(paired) == (1 if apologies == "drop" else 2)
        assert results["apology"] == (1 if apologies == "drop" else 0)

    def test_rows_are_written_once_and_contradictory_ones_not_at_all(self, tmp_path: Path) -> None:
        """A tree of replies, as a log of all its branches: they share their beginnings."""
        begun = ("Why?", "So.", "That's wrong.")
        logs = [
            chat(*begun, "Because."),
            chat(*begun, "Thus.", "Thanks."),
            chat(*begun, "So."),
            chat("Who?", "He.", "Thanks."),
            chat("Who?", "He.", "Wrong."),
        ]
        paired, unpaired, results = mined(tmp_path, logs)
        assert [said(row, "chosen") for row in paired] == [("Because.",), ("Thus.",)]
        assert [said(row, "completion") for row in unpaired] == [("So.",), ("Thus.",)]
        assert (results["repeated"], results["contradictory"], results["identical"]) == (2, 2, 1)

    def test_nothing_to_be_found_is_an_error_that_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(
            RunError, match=r"nothing among 1 turns .* \(0 satisfied, 0 dissatisfied, 1 neither, 0 failed"
        ):
            mined(tmp_path, [chat("Who?", "He.", "And where?"), chat("Who?")])

    def test_dialogues_as_text_and_completions_that_continue_them(self, tmp_path: Path) -> None:
        rows = [
            {"prompt": "\n\nHuman: Who?\n\nAssistant: He.\n\nHuman: Wrong.\n\nAssistant:", "completion": " She."},
            {"prompt": "\n\nHuman: Where?\n\nAssistant:", "completion": " There.\n\nHuman: Thanks."},
        ]
        paired, unpaired, _ = mined(tmp_path, rows)
        assert [said(row, "prompt", "rejected") for row in paired] == [("Who?", "He.")]
        assert paired[0]["chosen"] == [{"role": "assistant", "content": "She."}]
        assert [(*said(row, "completion"), row["label"]) for row in unpaired] == [("He.", False), ("There.", True)]

    def test_text_that_is_no_dialogue_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match=r"prompt 2 is no dialogue but text \('Once upon"):
            mined(tmp_path, [{"prompt": "\n\nHuman: Who?\n\nAssistant: He."}, {"prompt": "Once upon a time"}])

    def test_own_rules(self, tmp_path: Path) -> None:
        rules = {"rules": [{"name": "where", "label": "dissatisfied", "patterns": ["where"]}]}
        (tmp_path / "rules.json").write_text(json.dumps(rules))
        paired, unpaired, _ = mined(tmp_path, LOGS, rules=str(tmp_path / "rules.json"))
        assert [said(row, "chosen") for row in paired] == [("There.",)] and len(unpaired) == 1


SECRETS = {
    "ann.lee@example.org": EMAIL,
    "ann (at) example dot org": EMAIL,
    "+44 20 7946 0958": PHONE,
    "call 555-0143": f"call {PHONE}",
    "sk-" + "a1B2" * 6: REDACTED,
}


class TestRedaction:
    @given(
        secrets=st.lists(st.sampled_from(sorted(SECRETS)), min_size=6, max_size=6),
        numbers=st.lists(st.sampled_from(["1969", "3.50", "1,000,000", "$25", "2023-05-02"]), min_size=6, max_size=6),
    )
    def test_nothing_personal_is_in_a_row_and_ordinary_numbers_are(
        self, secrets: list[str], numbers: list[str]
    ) -> None:
        extra = [f" ({number}; {secret})" for secret, number in zip(secrets, numbers, strict=True)]
        texts = ["Be kind.", "Who?", "He.", "That's wrong.", "She.", "Thanks!"]
        system, *turns = [text + more for text, more in zip(texts, extra, strict=True)]
        log = chat(*turns, system=system)
        config = Pairs.model_validate(
            {
                "type": "pairs",
                "data": {"type": "jsonl", "path": "none"},
                "builder": {"type": "feedback_mining"},
            }
        )
        builder = config.builder.build(PairsContext(config))
        rows = builder.build_rows([{"prompt": log}], 0)
        built = builder.finish(rows)
        assert [len(built.files[name]) for name in ("paired", "unpaired")] == [1, 2]
        for content in (rows, built.files):
            written = repr(content)
            assert not any(secret in written for secret in SECRETS)
        prompt = built.files["unpaired"][1]["prompt"]
        expected = [
            f"{text} ({number}; {SECRETS[secret]})"
            for text, number, secret in zip(texts, numbers, secrets, strict=True)
        ]
        assert [message["content"] for message in prompt] == expected[:4]
        assert built.files["unpaired"][1]["feedback"] == expected[5]

    def test_of_a_message_only_what_a_model_reads_is_kept(self) -> None:
        facts = {
            "hashed_ip": "ab12",
            "timestamp": "2023-05-02",
            "country": "NL",
            "name": "Ann",
            "header": {"agent": "x"},
        }
        log = [{"role": "user", "content": "Who?", **facts}, {"role": "assistant", "content": "He.", **facts}]
        assert dialogue_of({"prompt": log}, 0) == chat("Who?", "He.")

    def test_calls_of_tools_and_parts_are_redacted_as_well(self) -> None:
        call = {"type": "function", "function": {"name": "mail", "arguments": {"to": "ann@example.org", "n": 3}}}
        log = [
            {"role": "user", "content": [{"type": "text", "text": "Mail ann@example.org", "image": None}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "sent to ann@example.org", "name": "mail"},
        ]
        assert dialogue_of({"prompt": log}, 0) == [
            {"role": "user", "content": [{"type": "text", "text": f"Mail {EMAIL}"}]},
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "mail", "arguments": {"to": EMAIL, "n": 3}}}],
            },
            {"role": "tool", "content": f"sent to {EMAIL}", "name": "mail"},
        ]


def letter(request: dict[str, Any], number: int) -> Reply:
    """What a judge says who looks for words of the user's alone; a question about birds fails."""
    told = asked(request)
    if "bird" in told:
        return Reply(status=400, text="no")
    chosen = (
        "A" if "Merci" in told.split("BEGIN message")[1] else "B" if "Non" in told.split("BEGIN message")[1] else "C"
    )
    return Reply(top=[(one, -0.1 if one == chosen else -3.0) for one in "ABC"])


class TestJudge:
    LOGS = (
        chat("Qui?", "Lui.", "Non!", "Elle.", "Merci."),
        chat("Merci?", "Non.", "Et où?"),
        chat("Quoi?", "Un bird.", "Merci.", "Bien."),
        chat("ann@example.org?", "Oui.", "Merci."),
    )

    def test_a_judge_reads_what_the_user_said(self, tmp_path: Path) -> None:
        with ScriptedServer(letter) as server:
            judge = {"type": "server", "base_url": server.base_url, "model": "judge"}
            paired, unpaired, results = mined(tmp_path, list(self.LOGS), judge=judge)
            told = [asked(request) for request in server.requests]
        assert [said(row, "chosen", "rejected") for row in paired] == [("Elle.", "Lui.")]
        assert [(*said(row, "completion"), row["label"]) for row in unpaired] == [
            ("Lui.", False), ("Elle.", True), ("Oui.", True)
        ]  # fmt: skip
        counts = {name: results[name] for name in ("satisfied", "dissatisfied", "neither", "failed")}
        assert counts == {"satisfied": 2, "dissatisfied": 1, "neither": 1, "failed": 1}
        assert not any("ann@example.org" in text for text in told)
        assert sum("Elle." in text.split("BEGIN answer")[1].split("END answer")[0] for text in told) == 1

    def test_the_models_own_weights_as_judge(self, talker: Path, tmp_path: Path) -> None:
        settings = stage(tmp_path / "logs.jsonl", LOGS, judge={"type": "policy"}, model={"path": str(talker)})
        rows = settings.builder.build(PairsContext(settings)).build_rows([{"prompt": log} for log in LOGS], 0)
        turns = [row["feedback_label"] for row in rows if row["kind"] == "turn"]
        assert len(turns) == 6 and set(turns) <= {"satisfied", "dissatisfied", "neither"}

    @pytest.mark.parametrize(
        ("probabilities", "sure", "expected"),
        [
            ((0.6, 0.3, 0.1), 0.5, "satisfied"),
            ((0.1, 0.8, 0.1), 0.5, "dissatisfied"),
            ((0.45, 0.35, 0.2), 0.5, "neither"),
            ((0.45, 0.35, 0.2), 0.4, "satisfied"),
            ((0.3, 0.06, 0.04), 0.7, "satisfied"),
            ((0.2, 0.2, 0.6), 0.5, "neither"),
        ],
    )
    def test_a_label_needs_its_probability_among_the_three(
        self, probabilities: Any, sure: float, expected: str
    ) -> None:
        assert label_of(Answer(log_probs=[math.log(value) for value in probabilities]), sure) == expected

    def test_no_answer_is_a_failure(self) -> None:
        assert label_of(Answer(error="timeout"), 0.5) == "failed"


def test_what_cannot_work_is_said(tmp_path: Path) -> None:
    def paths(**builder: Any) -> list[str]:
        return [problem.path for problem in stage(tmp_path / "logs.jsonl", LOGS, **builder).problems()]

    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    assert paths() == []
    assert paths(model={"path": "folder"}) == ["model"]
    assert paths(judge={"type": "policy"}) == ["model"]
    assert paths(judge={"type": "policy"}, model={"path": "folder"}) == []
    assert paths(rules=str(broken)) == ["builder.rules"]
    assert paths(prompt=str(broken)) == ["builder.prompt", "builder.prompt"]
