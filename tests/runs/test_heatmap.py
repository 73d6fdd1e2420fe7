"""The heat map tells each token's credit, and a completion cannot make it act."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_kit.runs.heatmap import NEGATIVE, POSITIVE, advantage_scale, colour, heatmap_html, heatmap_page

Parse = Callable[[str], Any]


def test_the_sign_of_the_advantage_is_the_colour(parse: Parse) -> None:
    sample = {"tokens": ["a", "b", "c"], "advantages": [2.0, -1.0, 0.0]}
    styles = [token["style"] for token in parse(heatmap_html(sample)).tokens()]
    assert styles == [
        f"background:rgba({POSITIVE},0.72)",
        f"background:rgba({NEGATIVE},0.36)",
        "background:transparent",
    ]


def test_the_scale_is_symmetric_and_saturates() -> None:
    assert colour(5.0, scale=1.0) == colour(1.0, scale=1.0)
    assert colour(-0.5, scale=1.0) == colour(0.5, scale=1.0).replace(POSITIVE, NEGATIVE)
    assert colour(None, scale=1.0) == "transparent"


def test_one_outlier_does_not_set_the_scale() -> None:
    sample = {"tokens": ["x"] * 100, "advantages": [-1.0] * 99 + [1000.0]}
    assert advantage_scale([sample]) == 1.0


def test_tokens_of_the_environment_neither_count_nor_have_a_colour(parse: Parse) -> None:
    sample = {"tokens": ["a", "b"], "advantages": [1.0, 50.0], "action_mask": [True, False]}
    assert advantage_scale([sample]) == 1.0
    action, environment = parse(heatmap_html(sample)).tokens()
    assert "style" not in environment
    assert environment["class"] == "hm-other"
    assert POSITIVE in (action["style"] or "")


def test_pointing_at_a_token_tells_its_rewards_by_source(parse: Parse) -> None:
    sample = {
        "tokens": ["4", "2"],
        "advantages": [0.5, -0.25],
        "rewards": {"verifier": [0.0, 1.0], "implicit_prm": [0.125, None]},
        "values": [0.75, 0.5],
        "kl": [0.01, -0.02],
    }
    first, second = (dict(read_tip(token)) for token in parse(heatmap_html(sample)).tokens())
    shared = {"reward verifier": "0", "reward implicit_prm": "+0.125", "value": "+0.75", "KL": "+0.01"}
    assert first == {"advantage": "+0.5", **shared}
    assert second["reward verifier"] == "+1"
    assert second["reward implicit_prm"] == "–"
    assert second["KL"] == "−0.02"


def test_the_tokens_are_the_completion(parse: Parse) -> None:
    tokens = ["Say", " <b>", "é\n", "  now", "&amp;"]
    shown = parse(heatmap_html({"tokens": tokens, "advantages": [0.0] * 5})).text
    assert "".join(tokens).replace("\n", "↵\n") in shown


def test_a_hostile_completion_stays_text(parse: Parse, hostile: str, hostile_sample: dict) -> None:
    page = parse(heatmap_page([hostile_sample]))
    assert page.scripts == []
    assert {tag for tag, _ in page.elements} <= {
        "style", "div", "span", "article", "details", "summary", "pre", "b", "i",
    }  # fmt: skip
    assert not [attributes for _, attributes in page.elements if "onerror" in attributes]
    assert hostile in page.text


def test_control_characters_are_not_passed_on() -> None:
    text = heatmap_html({"tokens": ["\x1b[31m", "\x00", "\ud800"], "advantages": [0.0] * 3})
    assert not {"\x1b", "\x00", "\ud800"} & set(text)
    text.encode("utf-8")


def test_a_completion_cannot_turn_text_round(parse: Parse) -> None:
    """Explicit directions are shown as such; letters that run from right to left are left as they are."""
    controls = [chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))]
    shown = parse(heatmap_html({"tokens": [*controls, "سلام", "\u200d"], "advantages": [0.0] * 11})).text
    assert not set(controls) & set(shown)
    assert "\ufffd" * 9 + "سلام\u200d" in shown


def test_a_sources_total_is_not_what_rounding_leaves(parse: Parse) -> None:
    third = 0.3333333432674408  # 1/3 in float32
    rewards = {"critic": [third, third, third, -1.0], "small": [1e-7, 0.0, 0.0, 0.0]}
    shown = parse(heatmap_html({"tokens": ["x"] * 4, "advantages": [0.0] * 4, "rewards": rewards})).text
    assert re.search(r"critic\s*0\s*small\s*1e−7", shown)


def test_steps_of_known_truth_are_marked_under_their_last_token() -> None:
    sample = {
        "completion": "22 241 9",
        "tokens": ["22", " 2", "41", " ", "9", "<|im_end|>"],
        "advantages": [0.0] * 6,
        "step_truth": [True, False],
    }
    shown = re.sub(r"<span[^>]*>|</span>", "", heatmap_html(sample).split('hm-steps">')[1])
    assert shown.startswith('22<b>✓</b> 241<b class="hm-x">✗</b> 9&lt;|im_end|&gt;')


SPANS = {
    "completion": "good bad so",
    "tokens": ["go", "od", " ba", "d", " so", "<|im_end|>"],
    "advantages": [0.0] * 6,
    "rewards": {"critic": [0.0, 0.5, 0.0, -1.0, 0.0, 0.0]},
    "spans": {"critic": [[0, 4, 0.5], [5, 8, -1.0]], "other": [[6, 9, 0.25], [9, 11, 0.0]]},
}


def pieces(html: str) -> list[tuple[str, str]]:
    """Each underlined piece of the first card: its class, and its text."""
    shown = html.split("<article")[1]
    return [(kind or "", text) for kind, text in re.findall(r'<u(?: class="(.*?)")?>(.*?)</u>', shown)]


def test_judged_characters_are_underlined_by_the_sign_of_their_reward() -> None:
    """A span ends within a token; where spans overlap, their sum counts."""
    found = pieces(heatmap_html(SPANS))
    assert found == [
        ("hm-up", "go"),
        ("hm-up", "od"),
        ("hm-down", "ba"),
        ("hm-down", "d"),
        ("hm-up", " "),
        ("", "so"),
    ]


def test_pointing_at_a_token_tells_the_spans_on_it(parse: Parse) -> None:
    tips = [dict(read_tip(token)) for token in parse(heatmap_html(SPANS)).tokens()]
    spans = [{name: value for name, value in tip.items() if name.startswith("span ")} for tip in tips]
    assert spans == [
        {"span critic": "+0.5"},
        {"span critic": "+0.5"},
        {"span critic": "−1", "span other": "+0.25"},
        {"span critic": "−1", "span other": "+0.25"},
        {"span other": "0"},
        {},
    ]
    assert tips[1]["reward critic"] == "+0.5"


def test_many_spans_on_one_token_are_cut_and_counted(parse: Parse) -> None:
    spans = {"critic": [[0, 1, 1.0]] * 9}
    sample = {"completion": "x", "tokens": ["x"], "advantages": [0.0], "spans": spans}
    (token,) = parse(heatmap_html(sample)).tokens()
    assert (token["data-tip"] or "").splitlines()[-1] == "and 3 more spans"
    assert (token["data-tip"] or "").count("span critic") == 6


def test_a_character_that_two_tokens_share_is_written_once_and_underlined_in_both() -> None:
    sample = {
        "completion": "a🎉b",
        "tokens": ["a", "🎉", "🎉", "<pad>", "b"],
        "advantages": [0.0] * 5,
        "spans": {"critic": [[1, 2, 1.0]]},
    }
    assert pieces(heatmap_html(sample)) == [("hm-up", "🎉"), ("hm-up", "<i>·</i>")]
    sample["spans"] = {"critic": [[2, 3, -1.0]]}
    assert pieces(heatmap_html(sample)) == [("hm-down", "b")]


def test_offsets_say_which_of_two_equal_characters_a_token_has(parse: Parse) -> None:
    """Four tokens of two emoji, and one that ends the second and goes on: only the second is judged."""
    sample = {
        "completion": "🎉🎉 ok",
        "tokens": ["🎉", "🎉", "🎉", "🎉 o", "k", "<eos>"],
        "offsets": [[0, 1], [0, 1], [1, 2], [1, 4], [4, 5], [5, 5]],
        "advantages": [0.0] * 6,
        "spans": {"critic": [[1, 2, 1.0]]},
    }
    html = heatmap_html(sample)
    told = ["span critic" in dict(read_tip(token)) for token in parse(html).tokens()]
    assert told == [False, False, True, True, False, False]
    assert "🎉·🎉 ok<eos>" in parse(html).text
    assert pieces(html) == [("hm-up", "🎉")]


def test_the_legend_names_the_lines_only_where_there_are_any(parse: Parse) -> None:
    assert "span with a reward" in parse(heatmap_page([{**SPANS, "spans": {}}, SPANS])).text
    assert "span with a reward" not in parse(heatmap_page([{**SPANS, "spans": {"critic": []}}])).text


def test_hostile_text_and_names_stay_text_within_spans(parse: Parse, hostile: str, hostile_sample: dict) -> None:
    hostile_sample["spans"] = {hostile: [[0, 3, 1.0], [1, len(hostile), float("nan")]]}
    page = parse(heatmap_page([hostile_sample]))
    assert page.scripts == []
    assert {tag for tag, _ in page.elements} <= {
        "style", "div", "span", "article", "details", "summary", "pre", "b", "i", "u",
    }  # fmt: skip
    assert not [attributes for _, attributes in page.elements if "onerror" in attributes]
    assert hostile in page.text
    assert f"span {hostile}" in (page.tokens()[0]["data-tip"] or "")


@pytest.mark.parametrize(("outcome", "shown"), [(1.0, "right"), (0.0, "wrong"), (0.4, "outcome 0.4")])
def test_the_outcome_is_told(outcome: float, shown: str, parse: Parse) -> None:
    assert shown in parse(heatmap_html({"tokens": ["x"], "advantages": [0.0], "outcome": outcome})).text


@pytest.mark.parametrize("sample", [{}, {"tokens": []}, {"tokens": ["x", "y"], "advantages": [None]}])
def test_what_is_missing_is_no_error(sample: dict) -> None:
    assert "<article" in heatmap_html(sample)


def test_a_very_long_completion_is_cut_and_says_so(parse: Parse) -> None:
    page = parse(heatmap_html({"tokens": ["x"] * 2500, "advantages": [1.0] * 2500}))
    assert len(page.tokens()) == 2000
    assert "500 more tokens" in page.text


def read_tip(token: dict[str, str | None]) -> list[list[str]]:
    """The rows of a token's read-out below its first line."""
    return [re.split(r" {2,}", line) for line in (token["data-tip"] or "").splitlines()[1:]]
