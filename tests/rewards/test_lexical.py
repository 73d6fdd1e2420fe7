"""Lexical measures on sentences written by hand: what they mark, what it costs, and what they ask to be installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf_kit.rewards.lexical import LexicalConfig, edited_places
from rlhf_kit.rollout import Rollout, Status, TokenRewards


def rollout(*texts: str, tools: Sequence[tuple[int, int]] = ()) -> Rollout:
    """Completions whose every character is a token, and an end-of-sequence token; in `tools` a tool wrote them."""
    width = max(map(len, texts)) + 1
    place = torch.arange(width)
    lengths = torch.tensor([len(text) for text in texts])[:, None]
    present = place <= lengths
    actions = present.clone()
    for start, end in tools:
        actions[:, start:end] = False
    prompt = torch.ones(len(texts), 1, dtype=torch.long)
    return Rollout(
        prompts=["p"] * len(texts),
        completions=texts,
        prompt_ids=prompt,
        prompt_mask=prompt.bool(),
        completion_ids=torch.tensor([[ord(sign) for sign in text.ljust(width, "\0")] for text in texts]),
        completion_mask=present,
        action_mask=actions,
        texts=texts,
        offsets=[[(min(k, len(text)), min(k + 1, len(text))) for k in range(width)] for text in texts],
    )


def build(measure: dict[str, Any], **fields: Any) -> Callable[[Rollout], TokenRewards]:
    config = LexicalConfig.model_validate({"type": "lexical", "measure": measure, **fields})
    assert not list(config.problems(None, []))  # pyright: ignore
    return config.build(None).score  # pyright: ignore


def totals(rewards: TokenRewards) -> list[float]:
    return rewards.tokens.sum(dim=1).tolist()


def marked(rewards: TokenRewards, given: Rollout) -> list[list[tuple[str, float]]]:
    """The text of each span, and its reward."""
    rows = zip(rewards.spans, given.texts, strict=True)
    return [[(text[span.start : span.end], span.reward) for span in spans] for spans, text in rows]


# -- length ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"unit": "words", "target": 2}, [-1.0, 0.0, -1.0]),
        ({"unit": "words", "target": 2, "side": "over"}, [0.0, 0.0, -1.0]),
        ({"unit": "words", "target": 2, "side": "under"}, [-1.0, 0.0, 0.0]),
        ({"unit": "words", "target": 0, "per": 4}, [0.0, -0.5, -1.0]),
        ({"unit": "characters", "target": 10, "per": 2}, [-5.0, -2.0, -0.5]),
        ({"unit": "tokens", "target": 8, "side": "both"}, [-7 / 8, 0.0, -0.5]),
    ],
)
def test_length_costs_by_its_distance_from_the_target(fields, expected) -> None:
    """Lengths in words 0, 2, 4; in characters 0, 6, 11; in tokens, with all spaces and the last one, 1, 8, 12."""
    given = rollout("", "a  bcd ", "a bb,\ncc dd")
    rewards = build({"type": "length", **fields})(given)
    assert totals(rewards) == pytest.approx(expected)
    last = given.action_mask.sum(dim=1) - 1  # it judges the whole: its reward lies on the end-of-sequence token
    assert all(rewards.tokens[row, last[row]] == pytest.approx(expected[row]) for row in range(3))


def test_what_a_tool_said_is_not_counted() -> None:
    given = rollout("ask this [it is 7] so 7", tools=[(9, 18)])
    for unit, length in (("words", 4), ("characters", 8 + 4), ("tokens", 24 - 9)):
        assert totals(build({"type": "length", "unit": unit, "target": 0, "per": 1})(given)) == [-length]


# -- repetition --------------------------------------------------------------------------------------------------------


def test_repeated_ngrams_are_marked_and_cost_their_share() -> None:
    """Bigrams: the dog, dog the, THE dog (again), dog ran - one of four repeats; the others have none."""
    given = rollout("the dog the  Dog ran", "one two three", "word", "")
    rewards = build({"type": "repetition", "n": 2, "reward": -2.0})(given)
    assert marked(rewards, given) == [[("the  Dog", -0.5)], [], [], []]
    assert totals(rewards) == [-0.5, 0, 0, 0]
    assert rewards.tokens[0].nonzero().flatten().tolist() == [len("the dog the  Dog") - 1]
    assert rewards.status.tolist() == [Status.OK] * 4
    assert rewards.metrics == {"spans": 0.25}


def test_a_loop_is_marked_from_its_second_round_on() -> None:
    given = rollout("a b a b a b")
    rewards = build({"type": "repetition", "n": 2, "reward": -5.0})(given)
    assert marked(rewards, given) == [[("a b", -1.0), ("b a", -1.0), ("a b", -1.0)]]


@given(st.lists(st.sampled_from("abc"), max_size=20), st.integers(1, 4))
def test_the_share_of_repetition_is_one_less_the_share_of_different_ngrams(words, n) -> None:
    """seq-rep-n = 1 - |different n-grams| / |n-grams| (arXiv 1908.04319)."""
    text = " ".join(words)
    grams = [tuple(words[k : k + n]) for k in range(len(words) - n + 1)]
    expected = 1 - len(set(grams)) / len(grams) if grams else 0.0
    assert totals(build({"type": "repetition", "n": n, "reward": 1.0})(rollout(text))) == pytest.approx([expected])
    assert totals(build({"type": "repetition", "n": n, "reward": 1.0, "unit": "tokens"})(rollout("".join(words)))) == (
        pytest.approx([expected])
    )


def test_repetition_of_what_a_tool_said_is_none() -> None:
    """The policy says "seven" once; no bigram runs over the tool's text."""
    given = rollout("it is [seven it is] seven", tools=[(6, 19)])
    assert totals(build({"type": "repetition", "n": 1})(given)) == [0]
    given = rollout("a b [x] a b", tools=[(4, 7)])
    assert marked(build({"type": "repetition", "n": 2})(given), given) == [[("a b", -0.5)]]
    assert totals(build({"type": "repetition", "n": 3, "unit": "tokens"})(given)) == [-0.5]


# -- format and regex --------------------------------------------------------------------------------------------------


def test_a_format_is_that_of_the_whole_completion() -> None:
    texts = ("<think>a\nb</think> 4", "<think>a</think> 4\n", "x<think>a</think> 4", "")
    assert totals(build({"type": "format", "pattern": r"(?s)<think>.*</think> \d"})(rollout(*texts))) == [1, 0, 0, 0]
    given = build({"type": "format", "pattern": r"<think>.*</think> \d", "reward": 2.0, "otherwise": -1.0})
    assert totals(given(rollout(*texts))) == [-1, -1, -1, -1]


def test_a_regex_marks_every_match() -> None:
    given = rollout("7 of 12 🎉 3", "none")
    rewards = build({"type": "regex", "pattern": r"\d+", "reward": 0.5})(given)
    assert marked(rewards, given) == [[("7", 0.5), ("12", 0.5), ("3", 0.5)], []]
    assert rewards.tokens[0].nonzero().flatten().tolist() == [0, 6, 10]
    first = build({"type": "regex", "pattern": r"\d+", "limit": 2})(given)
    assert marked(first, given) == [[("7", 1.0), ("12", 1.0)], []]
    mean = build({"type": "regex", "pattern": r"\d+"}, per_segment="mean", placement="spread")(given)
    assert totals(mean) == pytest.approx([1.0, 0.0])
    assert mean.tokens[0, [5, 6]].tolist() == pytest.approx([1 / 6, 1 / 6])


def test_a_regex_passes_over_empty_matches_and_what_a_tool_said() -> None:
    given = rollout("7 [8 9] 10 ", tools=[(2, 7)])
    rewards = build({"type": "regex", "pattern": r"\d*", "limit": 2})(given)
    assert marked(rewards, given) == [[("7", 1.0), ("10", 1.0)]]
    assert totals(build({"type": "regex", "pattern": r"\s$"})(given)) == [1]


# -- sentiment ---------------------------------------------------------------------------------------------------------


def test_sentiment_of_completions() -> None:
    rewards = build({"type": "sentiment"})(rollout("I love this, it is great!", "It is awful and sad.", "It is.", ""))
    good, bad, plain, nothing = totals(rewards)
    assert good > 0.5 and bad < -0.5 and plain == nothing == 0
    assert rewards.tokens[0, -1] == pytest.approx(good)


def test_a_bounded_sentiment_is_an_outcome() -> None:
    given = rollout("I love this, it is great!", "It is awful and sad.", "It is.")
    plain = totals(build({"type": "sentiment"})(given))
    outcomes = totals(build({"type": "sentiment", "bounded": True})(given))
    assert outcomes == pytest.approx([(1 + score) / 2 for score in plain]) and outcomes[1] < 0.5 < outcomes[0]
    labels = {"sentiment": {"bounded": True}, "format": {"pattern": "x", "bounded": True}}
    assert all(config({"type": name, **fields}).labels_outcomes for name, fields in labels.items())
    assert (
        not config({"type": "sentiment"}).labels_outcomes
        and not config({"type": "length", "target": 3}).labels_outcomes
    )


def test_sentiment_of_sentences() -> None:
    given = rollout("What a wonderful film. The end was horrible!", "No words")
    rewards = build({"type": "sentiment", "segments": {"by": "sentence"}})(given)
    (first, second), (third,) = marked(rewards, given)
    assert first[0] == "What a wonderful film." and first[1] > 0.3
    assert second[0] == "The end was horrible!" and second[1] < -0.3
    assert third[0] == "No words"
    alone = build({"type": "sentiment"})(rollout("What a wonderful film.", "The end was horrible!"))
    assert [first[1], second[1]] == pytest.approx(totals(alone))


def test_the_sentiment_of_a_tool_is_not_the_policys() -> None:
    given = rollout("It is. [horrible] Fine", tools=[(7, 17)])
    assert totals(build({"type": "sentiment"})(given)) == pytest.approx(
        totals(build({"type": "sentiment"})(rollout("It is.\nFine")))
    )


# -- grammar -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grammar() -> Callable[[Rollout], TokenRewards]:
    return build({"type": "grammar", "reward": -0.5})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Their is a cat on the roof.", ["Their"]),
        ("There is a cat on the roof.", []),
        ("She don't like it. I have went home, and we was happy.", ["don't", "went", "was"]),
        ("🎉 Cafe\u0301 👩‍👩‍👧: your welcome. The affect was large!", ["your", "affect"]),
        ("isnt it\n\nHe looked passed the tree", ["isnt", "passed"]),
        ("The the dog barked.", ["The"]),
        ("She walks to school every day and enjoys the lessons.", []),
        ("", []),
        (" \n", []),
    ],
)
def test_grammar_marks_the_words_to_be_edited(grammar, text, words) -> None:
    given = rollout(text)
    assert marked(grammar(given), given) == [[(word, -0.5) for word in words]]


def test_the_first_subword_of_a_word_speaks_for_it() -> None:
    """What a later piece of a word is tagged, behind an apostrophe or a combining mark, edits nothing."""
    text = "don't cafe\u0301x!"
    tokens = ["[CLS]", "don", "'", "t", "cafe", "##\u0301", "##x", "!", "[SEP]"]
    offsets = [(0, 0), (0, 3), (3, 4), (4, 5), (6, 10), (10, 11), (11, 12), (12, 13), (0, 0)]
    assert edited_places(text, tokens, offsets, [True] * 9) == {(0, 5), (6, 10), (12, 13)}
    later = [False, False, True, True, False, True, True, False, True]
    assert edited_places(text, tokens, offsets, later) == set()


def test_the_verdict_on_a_sentence_does_not_depend_on_the_others(grammar) -> None:
    texts = [
        "We was here.",
        "It is a long sentence, with many words in it, and none of them is wrong.",
        "Their is one.",
    ]
    together = grammar(rollout(*texts, texts[1] + " " + texts[0] + " " + texts[2]))
    alone = [[span.reward for span in grammar(rollout(text)).spans[0]] for text in texts]
    assert [[span.reward for span in row] for row in together.spans[:3]] == alone
    last = rollout(*texts, texts[1] + " " + texts[0] + " " + texts[2])
    assert [word for word, _ in marked(together, last)[3]] == ["was", "Their"]


def test_a_sentence_longer_than_the_tagger_reads_at_once_is_read_to_its_end(grammar) -> None:
    """Of 128 tokens, that is."""
    given = rollout("He took the book from the table and put it in the bag; " * 14 + "she don't like it.")
    assert marked(grammar(given), given) == [[("don't", -0.5)]]


def test_confidence_decides_which_edits_count() -> None:
    given = rollout("She don't like it. Their is a cat.")
    assert marked(build({"type": "grammar", "confidence": 0.95})(given), given) == [[("Their", -1.0)]]


def test_grammar_of_a_tool_is_not_the_policys(grammar) -> None:
    given = rollout("I am. [We was here.] We was there.", tools=[(6, 20)])
    (found,) = marked(grammar(given), given)
    assert found == [("was", -0.5)]
    assert grammar(given).spans[0][0].start > 20


# -- configuration -----------------------------------------------------------------------------------------------------


def config(measure: dict[str, Any], **fields: Any) -> LexicalConfig:
    return LexicalConfig.model_validate({"type": "lexical", "measure": measure, **fields})


def test_what_judges_the_whole_is_an_outcome() -> None:
    kinds = {
        "length": config({"type": "length", "target": 1}).kind,
        "format": config({"type": "format", "pattern": "x"}).kind,
        "sentiment": config({"type": "sentiment"}).kind,
        "sentences": config({"type": "sentiment", "segments": {"by": "sentence"}}).kind,
        "regex": config({"type": "regex", "pattern": "x"}).kind,
        "repetition": config({"type": "repetition"}).kind,
        "grammar": config({"type": "grammar"}).kind,
    }
    assert {name for name, kind in kinds.items() if kind == "outcome"} == {"length", "format", "sentiment"}
    assert config({"type": "length", "target": 1}).build(None).kind == "outcome"  # pyright: ignore
    assert config({"type": "repetition"}).build(None).kind == "process"  # pyright: ignore


def test_a_source_is_called_as_its_measure_unless_it_has_a_name() -> None:
    assert config({"type": "regex", "pattern": "x"}).source_name == "regex"
    assert config({"type": "regex", "pattern": "x"}, name="digits").source_name == "digits"


@pytest.mark.parametrize(
    ("measure", "fields", "path", "said"),
    [
        ({"type": "length", "target": 0}, {}, "measure.per", "what a unit costs"),
        ({"type": "regex", "pattern": "(x"}, {}, "measure.pattern", "no regular expression"),
        ({"type": "format", "pattern": "[x"}, {}, "measure.pattern", "no regular expression"),
        ({"type": "sentiment", "segments": {"pattern": "x"}}, {}, "measure.segments.pattern", "only for by: step"),
        ({"type": "sentiment", "segments": {"by": "turn"}, "bounded": True}, {}, "measure.bounded", "of each turn"),
        ({"type": "format", "pattern": "x", "otherwise": -1, "bounded": True}, {}, "measure.otherwise", "[0, 1]"),
        ({"type": "length", "target": 5}, {"placement": "start"}, "placement", "does nothing"),
        ({"type": "sentiment"}, {"per_segment": "mean"}, "per_segment", "does nothing"),
    ],
)
def test_what_cannot_work_is_said_with_its_place(measure, fields, path, said) -> None:
    (problem,) = config(measure, **fields).problems(None, [])  # pyright: ignore
    assert problem.path == path and said in problem.message and problem.remedy


def test_all_that_does_nothing_is_said() -> None:
    unused = config({"type": "length", "target": 5}, placement="each", per_segment="mean")
    assert [problem.path for problem in unused.problems(None, [])] == ["placement", "per_segment"]  # pyright: ignore


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(ValidationError, match="length"):
        config({"type": "spelling"})


@pytest.mark.parametrize(("measure", "missing"), [("sentiment", "vaderSentiment"), ("grammar", "quire_grammar_model")])
def test_a_missing_package_is_named_with_how_to_install_it(measure, missing, monkeypatch) -> None:
    """Without the folders of installed packages Python finds none of them."""
    for name in [name for name in sys.modules if name.partition(".")[0] in (missing, "onnxruntime")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    importlib.invalidate_caches()
    (problem,) = config({"type": measure}).problems(None, [])  # pyright: ignore
    assert problem.path == "measure.type" and missing in problem.message
    assert problem.remedy == "pip install 'rlhf-kit[lexical]'"
    assert not list(config({"type": "regex", "pattern": "x"}).problems(None, []))  # pyright: ignore
