"""What a completion claims: read as it is meant, or not at all, and never the other way round."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.data.claims import claims
from rlhf_kit.data.marketplace import (
    OPTIONS,
    PRODUCTS,
    Market,
    market_of,
    marketplace,
    marketplace_vocabulary,
    statement,
)

TENT = Market(
    item="tent",
    requirement="a porch",
    features=("a porch", "an insect net", "aluminium poles"),
    options=("A", "B", "C"),
    prices=(20, 40, 60),
    has=(False, False, False),
    sheet=("no", "no", "no"),
    base_rate=0.3,
)
HAS = [
    "Option A has a porch.",
    "Option A does have a porch.",
    "Option A has got a porch.",
    "Option A comes with a porch.",
    "Option A includes the porch.",
    "Option A offers a porch.",
    "Option A features a porch.",
    "Option A is equipped with a porch.",
    "Option A also has a porch",
    "Option A certainly has a porch!",
    "option A has a Porch",
    "OPTION A HAS A PORCH.",
    "**Option A** has a porch.",
    "- Option A: yes",
    "1. Option A: has a porch",
    "A has a porch.",
    "A: yes",
    "Option A: Yes",
    "Option A - yes",
    "Option A (yes)",
    "Option A: a porch: yes",
    "Option A, $20: porch: yes, insect net: no",
    "Option A ($20) has a porch.",
    "Option A at $20 has a porch.",
    "Option A costs $20 and has a porch.",
    "Option A: yes, it has a porch.",
    "Yes, option A has a porch.",
    "Option A has it.",
    "Only option A has a porch.",
    "Option A has an insect net and a porch.",
    "Option A has a porch but no insect net.",
    "Option A has no insect net but a porch.",
    "Option A does not have an insect net, but it has a porch.",
    "Option A has a porch and does not have aluminium poles.",
    "Option A has a porch, but option B might.",
    "Option A has a porch, so it is the best choice for you.",
    "Option A is cheap, and it has a porch.",
    "Option A is not cheap, but it has a porch.",
    "I would recommend option A, which comes with a porch.",
    "According to the data sheet, option A has a porch.",
    "Option A might have a porch. Option A has a porch.",
    "Option A lacks a porch. Well, option A has a porch.",
]
LACKS = [
    "Option A does not have a porch.",
    "Option A doesn't have a porch.",
    "Option A doesn’t have a porch.",
    "Option A does not include a porch.",
    "Option A does not come with a porch.",
    "Option A does not offer a porch.",
    "Option A doesn't feature a porch.",
    "Option A does not really have a porch.",
    "Option A does not yet have a porch.",
    "Option A does not have any porch.",
    "Option A cannot have a porch.",
    "Option A can't offer a porch.",
    "Option A can not come with a porch.",
    "Option A never has a porch.",
    "Option A has no porch.",
    "Option A has not got a porch.",
    "Option A hasn't got a porch.",
    "Option A lacks a porch.",
    "Option A is lacking a porch.",
    "Option A is missing the porch.",
    "Option A is without a porch.",
    "Option A comes without a porch.",
    "Option A isn't equipped with a porch.",
    "A does not include a porch",
    "A doesn't.",
    "Option A doesn't.",
    "A: no",
    "Option A: No.",
    "Option A: no porch",
    "Option A: no, it does not have one.",
    "Option A: insect net: yes, porch: no",
    "No, option A has no porch.",
    "Option A has an insect net but no porch.",
    "Option A has an insect net, but not a porch.",
    "Option A has an insect net, but it does not have a porch.",
    "Option A does not have an insect net or a porch.",
    "Option A has no insect net and no porch.",
    "Option A has a porch. No: option A lacks it.",
    "Option A is cheap but does not come with a porch.",
]
NOTHING = [
    "Option A may have a porch.",
    "Option A may not have a porch.",
    "Option A might not have a porch.",
    "Option A may or may not have a porch.",
    "Option A could have a porch.",
    "Option A can have a porch.",
    "Option A probably has a porch.",
    "Option A does not seem to have a porch.",
    "Option A seems to have a porch.",
    "Option A is not known to have a porch.",
    "Option A is said to have a porch.",
    "Option A has a porch, I think.",
    "Option A has a porch, maybe.",
    "I don't think option A has a porch.",
    "I do not know whether option A has a porch.",
    "I doubt that option A has a porch.",
    "It is not true that option A has a porch.",
    "It is false to say that option A has a porch.",
    "If you pay more, option A has a porch.",
    "Option A has a porch if you pay more.",
    "Option A would have a porch.",
    "Option A should have a porch.",
    "Option A used to have a porch.",
    "Option A no longer has a porch.",
    "Option A hardly has a porch.",
    "Does option A have a porch?",
    "Option A has a porch?",
    "Option A has a porch, but that is a lie.",
    "Option A has a porch. That is false.",
    "Option A has a porch. I am joking.",
    "Option A has a porch\nActually no, it does not.",
    "Option A has a porch. It doesn't!",
    "Option A has a porch. No.",
    "Option A has a porch. No porch at all, though.",
    "Option A has a porch. Option A may have a porch.",
    "Option A has a porch. I don't think option A has a porch.",
    "Option A has a porch. Option A: unknown",
    "They say: option A has a porch.",
    '"Option A has a porch" is what the others say.',
    "Option A does not lack a porch.",
    "Option A is not without a porch.",
    "Option A doesn't have no porch.",
    "Option A does not only have a porch.",
    "Option A has everything but a porch.",
    "Option A has all features except a porch.",
    "Option A has nothing like a porch.",
    "Option A has a place for a porch.",
    "Option A has an insect net instead of a porch.",
    "Option A has a porch-like roof.",
    "Option A has a porch light.",
    "Option A has a porch, which is missing.",
    "Option A has a porch, which option B lacks.",
    "Option A needs a porch.",
    "Option A: yes and no",
    "Option A: yes or no",
    "Option A: yes, but it has no porch",
    "Option A or B has a porch.",
    "Option A or option B has a porch.",
    "Either option A or option B has a porch.",
    "Not option A has a porch.",
    "Not only option A has a porch.",
    "Not all of the options have a porch.",
    "Not every option has a porch.",
    "Almost all options have a porch.",
    "Some options have a porch.",
    "Other options than A have a porch.",
    "Option A has the lowest price.",
    "Option A costs $20 and has a warranty.",
    "Option A has a warranty and a porch.",
    "Option A has many good features.",
    "Option A is sold without features.",
    "Option A is not expensive.",
    "Option A has an insect net.",
    "Option A has no insect net.",
    "Option A has an insect net. Option A has it.",
    "Option A is cheap and the customer has a porch.",
    "Option A is cheap, and the best choice has a porch.",
    "Option A does not cost more and have a porch.",
    "Option A is not the cheapest has a porch.",
    "Option A does option B not have a porch.",
    "Option A does not, however, lack a porch.",
    "Neither A nor B: yes",
    "Option A lacks an insect net but not a porch.",
    "Option A does not have a porch and an insect net.",  # not both
    "Option A has.",
    "Option A has",
    "Option A does",  # cut off
    "Option A does not",
    "Option A lacks.",
    "Option A, not",
    "Option A",
    "A porch.",
    "A good day to you.",
    "It has a porch.",
    "I have a porch.",
    "Vitamin C has a porch.",
    "Option D has a porch.",
    "",
]
SEVERAL: list[tuple[str, dict[str, bool]]] = [
    ("Option A has a porch. Option B does not. Option C may or may not have one.", {"A": True, "B": False}),
    ("Options A and B have a porch.", {"A": True, "B": True}),
    ("Options A, B and C all have a porch.", {"A": True, "B": True, "C": True}),
    ("Options A & B do not have a porch.", {"A": False, "B": False}),
    ("Option A and option B both have a porch.", {"A": True, "B": True}),
    ("A and C lack a porch, while B has one.", {"A": False, "C": False, "B": True}),
    ("Neither option A nor option B has a porch.", {"A": False, "B": False}),
    ("Neither A nor B has a porch, but option C does.", {"A": False, "B": False, "C": True}),
    ("None of options A and B have a porch.", {"A": False, "B": False}),
    ("None of the options A, B and C comes with a porch.", {"A": False, "B": False, "C": False}),
    ("None of the options has a porch.", {"A": False, "B": False, "C": False}),
    ("No option has a porch.", {"A": False, "B": False, "C": False}),
    ("All of the options have a porch.", {"A": True, "B": True, "C": True}),
    ("All three options have a porch.", {"A": True, "B": True, "C": True}),
    ("Options A and B have a porch. Oh no, they do not. Option B does.", {"B": True}),
    ("Option A has a porch. It is not cheap. There is no insect net.", {"A": True}),
    ("All options but option B have a porch.", {}),
    ("Neither A nor B lacks a porch.", {}),
    ("Neither A nor B has an insect net, but both have a porch.", {}),
    ("Options A and B have it, but option C doesn't.", {"A": True, "B": True, "C": False}),
    ("Option A does not, but option B does.", {"A": False, "B": True}),
    ("Option A does not have a porch, and option B has one.", {"A": False, "B": True}),
    ("Option A has an insect net, and option B doesn't.", {}),
    ("A: yes, B: no, C: unknown", {"A": True, "B": False}),
    ("A yes, B no, C unknown.", {"A": True, "B": False}),
    ("- **A**: Yes\n- **B**: No\n- **C**: I do not know\n", {"A": True, "B": False}),
    ("Option A: yes; option B: no; option C: not sure", {"A": True, "B": False}),
    ("Option A has a porch\nOption B does not have a porch", {"A": True, "B": False}),
    ("Option A has a porch. Option B is nice, but I cannot say more about option C.", {"A": True}),
    ("I think option A has a porch, but option B has no porch.", {"B": False}),
    ("Unlike option A, option B has a porch.", {}),
    ("Option A has no porch, nor does option B.", {}),
    ("Option B is said by option A to have a porch.", {}),
    ("All options have a porch. Option B is without one.", {"A": True, "B": False, "C": True}),
]


@pytest.mark.parametrize("text", HAS)
def test_a_claim_is_read(text: str) -> None:
    assert claims(text, TENT) == {"A": True}


@pytest.mark.parametrize("text", LACKS)
def test_a_denial_is_read_as_one(text: str) -> None:
    assert claims(text, TENT) == {"A": False}


@pytest.mark.parametrize("text", NOTHING)
def test_what_is_in_doubt_or_says_something_else_claims_nothing(text: str) -> None:
    assert claims(text, TENT) == {}


@pytest.mark.parametrize(("text", "expected"), SEVERAL)
def test_what_is_said_of_several_options(text: str, expected: dict[str, bool]) -> None:
    assert claims(text, TENT) == expected


ANSWERS = ("yes", "no", "unknown")
KNOWN = {"yes": True, "no": False}


@given(st.sampled_from(["words", *PRODUCTS]), st.lists(st.sampled_from(ANSWERS), min_size=2, max_size=5), st.data())
def test_every_statement_of_the_generator_is_read_as_it_was_made(
    item: str, words: list[str], data: st.DataObject
) -> None:
    features = PRODUCTS.get(item, ("light", "quiet", "solar"))
    requirement = data.draw(st.sampled_from(features))
    options, size = OPTIONS[: len(words)], len(words)
    market = Market(item, requirement, features, options, (10,) * size, (False,) * size, ("no",) * size, 0.3)
    said = statement(market, words, "words" if item == "words" else "prose")
    expected = {option: KNOWN[word] for option, word in zip(options, words, strict=True) if word in KNOWN}
    assert claims(said, market) == expected


(BARE_MARKET,) = [market_of(row) for row in marketplace(1, features=1, seed=3)]


@given(st.lists(st.sampled_from([*"ABCDE", *ANSWERS] * 4 + marketplace_vocabulary()), max_size=12).map(" ".join))
def test_in_words_an_answer_is_about_the_last_option_that_has_one_right_behind_it(text: str) -> None:
    assert BARE_MARKET is not None
    last: dict[str, str] = {}
    _, *pieces = re.split(r"\b([A-E])(?= (?:yes|no|unknown)\b)", text)
    for option, piece in zip(pieces[::2], pieces[1::2], strict=True):
        last[option] = re.findall(r"yes|no|unknown", piece)[-1]
    expected = {option: KNOWN[word] for option, word in last.items() if word in KNOWN and option in "ABC"}
    assert claims(text, BARE_MARKET) == expected


def test_an_answer_about_another_feature_is_none_about_the_requirement() -> None:
    market = Market("thing", "light", ("light", "solar"), ("A", "B"), (10, 20), (True, True), ("yes", "yes"), 0.3)
    assert claims("A yes light B no solar", market) == {"A": True}
    assert claims("A no light yes B no", market) == {"A": True, "B": False}


ORDINARY = re.findall(
    r"\S+",
    "really certainly only always the any such good cheap best price it this one here so well also too either even "
    "perhaps think sure customer warranty which and with for of at $20 many more B option roof light",
)


@given(st.sampled_from(LACKS), st.lists(st.tuples(st.integers(0, 12), st.sampled_from(ORDINARY)), max_size=3))
def test_no_word_in_a_denial_makes_it_a_claim(text: str, added: list[tuple[int, str]]) -> None:
    words = re.sub(r"^Option A has a porch\. No", "No", text).split()
    for place, word in added:
        words.insert(place, word)
    assert claims(" ".join(words), TENT).get("A") is not True


@given(
    st.lists(st.sampled_from([*ORDINARY, *"ABC", "option", "has", "not", "no", "a porch", ".", ",", "but"])).map(
        " ".join
    )
)
def test_what_is_claimed_is_claimed_of_options_on_offer(text: str) -> None:
    assert set(claims(text, TENT)) <= {*"ABC"}


def test_a_feature_is_known_by_its_whole_name() -> None:
    market = Market(**{**vars(TENT), "requirement": "a net", "features": ("a net", "an insect net")})
    assert claims("Option A has an insect net. Option B has a net.", market) == {"B": True}
    market = Market(**{**vars(TENT), "requirement": "a timer", "features": ("a timer", "a timer switch")})
    assert claims("Option A has a timer switch. Option B has a timer.", market) == {"B": True}


@pytest.mark.parametrize("piece", ["A, B and ", "Option A has a porch, ", "neither ", "option ", "a ", "(", "\n", "A "])
def test_a_text_that_loops_is_read_in_one_pass(piece: str) -> None:
    assert claims(piece * 5_000, TENT) in ({}, {"A": True})
