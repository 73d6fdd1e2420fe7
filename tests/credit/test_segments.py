"""Parts of a text: where they are cut in texts written by hand, and that nothing is lost or judged twice."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kit.credit import segments
from rlhf_kit.credit.spans import spread_spans, token_offsets
from rlhf_kit.rollout import Span

PIECES = [
    *["a", "B", "word", "Dr.", "e.g.", "3.5", "x,", "y;", "Is it?", "No!", '"', "”", "'", "(", ")", "...", "…", "."],
    *[" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2028", "\x85", "1. ", "2) ", "- ", "Step 3: "],
    *["🎉", "👩‍👩‍👧", "e\u0301", "日本。", "です！", "हिन्दी।", "\ufffd", "\x00", "\ufeff"],
]
texts = st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(max_size=15)
SEGMENTERS = {
    "completion": segments.completion,
    "steps": segments.steps,
    "own_steps": lambda text: segments.steps(text, r"[.\n]"),
    "sentences": segments.sentences,
    "german": lambda text: segments.sentences(text, "de"),
    "japanese": lambda text: segments.sentences(text, "ja"),
    "subsentences": lambda text: segments.subsentences(text, min_words=2),
}


@pytest.fixture(scope="module")
def tokenizer(byte_level_tokenizer):
    return byte_level_tokenizer()


def parts(ranges, text):
    return [text[start:end] for start, end in ranges]


# -- properties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SEGMENTERS))
@settings(max_examples=150)
@given(text=texts)
def test_parts_are_in_order_apart_trimmed_and_hold_all_that_is_no_space(name, text):
    ranges = SEGMENTERS[name](text)
    bounds = [bound for place in ranges for bound in place]
    assert bounds == sorted(bounds)
    assert all(part and part == part.strip() for part in parts(ranges, text))
    inside = {c for start, end in ranges for c in range(start, end)}
    assert {c for c, character in enumerate(text) if not character.isspace()} <= inside


@given(text=texts)
def test_subsentences_lie_within_sentences(text):
    sentences = segments.sentences(text)
    for start, end in segments.subsentences(text, min_words=2):
        assert any(first <= start and end <= last for first, last in sentences)


@given(text=texts, min_words=st.integers(1, 6))
def test_subsentences_have_at_least_as_many_words_as_asked_for_or_are_whole_sentences(text, min_words):
    sentences = segments.sentences(text)
    for start, end in segments.subsentences(text, min_words):
        assert len(text[start:end].split()) >= min_words or (start, end) in sentences


# -- completion, step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " ", "\n \t\n", "\u3000\u00a0"])
@pytest.mark.parametrize("name", list(SEGMENTERS))
def test_whitespace_has_no_parts(name, text):
    assert SEGMENTERS[name](text) == []


def test_a_completion_is_one_part():
    assert segments.completion("  One. Two.\n") == [(2, 11)]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("First.\n\nSecond.\n \n\nThird", ["First.", "Second.", "Third"]),
        ("First.\r\n\r\nSecond.", ["First.", "Second."]),
        ("One line\nand the next", ["One line\nand the next"]),
        ("Step 1: add\nmore\nStep 2: halve", ["Step 1: add\nmore", "Step 2: halve"]),
        ("Plan:\n**Step 1** add\n## Step 2\nhalve", ["Plan:", "**Step 1** add", "## Step 2\nhalve"]),
        ("Step 1: 2 + 2 = 4. Step 2: 4 / 2 = 2.", ["Step 1: 2 + 2 = 4.", "Step 2: 4 / 2 = 2."]),
        ("We go on as in Step 2: halve.", ["We go on as in Step 2: halve."]),
        ("1. Take 3.5 l.\n2. Stir.\n10) Serve", ["1. Take 3.5 l.", "2. Stir.", "10) Serve"]),
        ("List:\n- a\n  * b\n• c", ["List:", "- a", "* b", "• c"]),
        ("5 - 3 is\n2.5 or so", ["5 - 3 is\n2.5 or so"]),
        ("今日は。\n\n明日は。", ["今日は。", "明日は。"]),
    ],
)
def test_steps(text, steps):
    assert parts(segments.steps(text), text) == steps


def test_steps_of_a_pattern_of_ones_own():
    text = "a; b;c"
    assert parts(segments.steps(text, ";"), text) == ["a;", "b;", "c"]
    assert parts(segments.steps(text, "(?=;)"), text) == ["a", "; b", ";c"]


# -- sentence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Dr. Smith paid 3.5 dollars. He left.", ["Dr. Smith paid 3.5 dollars.", "He left."]),
        ("See e.g. this one, i.e. that. Fine", ["See e.g. this one, i.e. that.", "Fine"]),
        ('"Really?" she said. "Go!" He went.', ['"Really?" she said.', '"Go!"', "He went."]),
        ('He said "go." Then left.', ['He said "go."', "Then left."]),
        ("No final stop", ["No final stop"]),
        ("What?! Yes... No", ["What?!", "Yes...", "No"]),
        ("A line\nanother\n\nthe last.", ["A line", "another", "the last."]),
        ("今日は良い天気ですね。明日は雨です。", ["今日は良い天気ですね。", "明日は雨です。"]),
        ("敏捷的狐狸！你好吗？很好", ["敏捷的狐狸！", "你好吗？", "很好"]),
        ("Hi 🎉. The cafe\u0301 👩‍👩‍👧 is open! 👍🏽 Yes.", ["Hi 🎉.", "The cafe\u0301 👩‍👩‍👧 is open!", "👍🏽 Yes."]),
        ("1. Take milk. Heat it.\n2) Stir.", ["1. Take milk.", "Heat it.", "2) Stir."]),
        ("The answer is\n4.", ["The answer is", "4."]),
    ],
)
def test_sentences(text, sentences):
    assert parts(segments.sentences(text), text) == sentences


def test_the_language_decides_what_is_an_abbreviation():
    text = "Er kam am 3. Mai an. Dann ging er."
    assert parts(segments.sentences(text, "de"), text) == ["Er kam am 3. Mai an.", "Dann ging er."]
    assert parts(segments.sentences(text, "en"), text) == ["Er kam am 3.", "Mai an.", "Dann ging er."]
    assert segments.sentences(text, "no such language") == segments.sentences(text, "en")


@given(st.lists(st.sampled_from(["🎉", "e\u0301", "👩‍👩‍👧", "日", "\u00a0", "हि", "a"]), min_size=1, max_size=8))
def test_places_count_characters_not_bytes(signs):
    """Whatever stands in a sentence moves the next one by its number of characters."""
    first = "Xy " + "".join(signs) + " is."
    assert segments.sentences(f"{first} Next one.") == [(0, len(first)), (len(first) + 1, len(first) + 10)]


@pytest.mark.parametrize("space", ["\u00a0", "\u3000", "\u2028", "\x85"])
def test_wide_space_behind_a_capital_is_no_trouble(space):
    """sentencex 1.0.32 panics on this, with an exception that `except Exception` does not catch."""
    text = f"Plan A{space}. Plan B"
    assert "".join(parts(segments.sentences(text), text)).replace(" ", "") == text.replace(" ", "")


# -- sub-sentence ------------------------------------------------------------------------------------------------------


def subsentences(text, min_words=5):
    return parts(segments.subsentences(text, min_words), text)


def test_subsentences_are_cut_behind_signs():
    expected = [
        "We went to the shop,",
        "saw that it was closed;",
        "they had told no one.",
        "Why oh why did you ask,",
        "when I am not there at all?",
    ]
    assert subsentences(" ".join(expected)) == expected


def test_a_short_first_part_joins_the_next_and_a_short_later_one_the_one_before():
    """Words 5 and 3: the first cut stands with 5, and the comma behind the 3 moves it."""
    assert subsentences("a, b c d e f, g h i j k") == ["a, b c d e f,", "g h i j k"]
    assert subsentences("a b c d e, f g h, i j k l m") == ["a b c d e, f g h,", "i j k l m"]
    assert subsentences("a b c d e, f g h i") == ["a b c d e, f g h i"]


def test_signs_within_words_do_not_cut():
    assert subsentences("a b 1,000 d e f g h i j k") == ["a b 1,000 d e f g h i j k"]
    assert subsentences('a b c "d e," f g h i j') == ['a b c "d e," f g h i j']


def test_one_word_is_enough_if_asked_for():
    assert subsentences("a, b; c", min_words=1) == ["a,", "b;", "c"]


def paper_starts(words, least):
    """First words of the parts by the rule of arXiv 2306.01693 in its own terms: every place behind a sign with `least`
    words after it begins a part; then parts of fewer words are taken away, each into the one before it.

    A first part that is short has none before it, and takes the next in.
    """
    begins = [k for k in range(1, len(words)) if words[k - 1][-1] in ",;!?" and len(words) - k >= least]
    starts = [0]
    for k in begins:
        if k - starts[-1] < least and starts[-1] != 0:
            starts.pop()
        elif k - starts[-1] < least:
            continue
        starts.append(k)
    return starts


@given(st.lists(st.sampled_from(["a", "b,", "c;", "d"]), min_size=1, max_size=30), st.integers(1, 6))
def test_subsentences_follow_the_papers_rule(words, least):
    text = " ".join(words)
    starts = [len(text[:start].split()) for start, _ in segments.subsentences(text, least)]
    assert starts == paper_starts(words, least)


# -- turn, token -------------------------------------------------------------------------------------------------------


def test_turns_are_what_the_policy_said_between_tools():
    """Text "ask [tool] done." in tokens; the end-of-sequence tokens have no characters."""
    text = "ask [tool] done."
    offsets = [(0, 3), (3, 3), (3, 7), (7, 11), (11, 15), (15, 16), (16, 16), (16, 16)]
    mask = [True, True, False, False, True, True, True, False]
    assert parts(segments.turns(text, offsets, mask), text) == ["ask", "done."]
    assert segments.turns(text, offsets, [True] * 8) == [(0, 16)]
    assert segments.turns(text, offsets, [False] * 8) == []
    assert parts(segments.tokens(offsets, mask), text) == ["ask", "done", "."]


def test_a_character_that_two_turns_share_is_in_the_first():
    assert segments.turns("a🎉b", [(0, 2), (1, 2), (1, 3)], [True, False, True]) == [(0, 2), (2, 3)]


@given(data=st.data())
def test_turns_of_a_real_conversation(tokenizer, data):
    """Pieces of policy and tool in turn, tokenised apart: the turns are the policy's pieces, and earn on their ends."""
    pieces = st.text("ab \n🎉é.", min_size=1, max_size=8)
    said = data.draw(st.lists(pieces, min_size=1, max_size=5))
    ids, mask, places, position = [], [], [], 0
    for k, piece in enumerate(said):
        new = [*tokenizer.encode(piece, add_special_tokens=False), tokenizer.eos_token_id]
        ids, mask = ids + new, mask + [k % 2 == 0] * len(new)
        if k % 2 == 0 and piece.strip():
            start = position + len(piece) - len(piece.lstrip())
            places.append((start, start + len(piece.strip())))
        position += len(piece)
    text, offsets = tokenizer.decode(ids, skip_special_tokens=True), token_offsets(tokenizer, ids)
    assert text == "".join(said)
    assert segments.turns(text, offsets, mask) == places
    spans = [Span(start, end, 1.0, "judge") for start, end in places]
    rewards = spread_spans([spans], [offsets], torch.tensor([mask]))
    assert rewards.sum() == len(places)
    own = segments.tokens(offsets, mask)
    assert {c for place in places for c in range(*place)} <= {c for place in own for c in range(*place)}


def test_the_step_pattern_finds_what_separates():
    """Every match is whitespace, so that trimming takes it from the step that it ends."""
    text = "a\n\nb\n1. c\n- d. Step 2: e"
    assert [match.group().strip() for match in re.finditer(segments.STEP_PATTERN, text)] == [""] * 4
