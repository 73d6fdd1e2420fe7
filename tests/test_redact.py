"""Secrets are taken out of what is shown, and people out of what they wrote; ordinary settings and numbers stay."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlhf_kit.redact import EMAIL, PHONE, REDACTED, redact, redact_personal


@pytest.mark.parametrize(
    "text",
    [
        "hub_token: {}",
        "    api_key: '{}'",
        "train recipe.yaml trainer.args.hub_token={}",
        "HF_TOKEN={}",
        "WANDB_API_KEY={}",
        '{{"password": "{}"}}',
        "postgres://user:{}@host/db",
        "Authorization: Bearer {}",
        "Authorization: {}",
        '{{"headers": {{"authorization": "Basic {}"}}}}',
        "sent with bearer {}",
        "base_url: http://host/v1?api_key={}&x=1",
        "GET http://host/v1?x=1&key={}#top",
    ],
)
def test_a_named_secret_is_redacted(text: str) -> None:
    shown = redact(text.format("s3cretValue0123456789"))
    assert "s3cret" not in shown
    assert REDACTED in shown


@pytest.mark.parametrize("key", ["hf_" + "a1B2" * 8, "sk-proj-" + "a1B2" * 8, "ghp_" + "a1B2" * 9, "AKIA" + "ABCD" * 4])
def test_a_key_of_known_form_is_redacted_under_any_name(key: str) -> None:
    assert redact(f"note: see {key}, please") == f"note: see {REDACTED}, please"


@pytest.mark.parametrize(
    "text",
    [
        "pad_token: <|pad|>",
        "max_new_tokens: 256",
        "hub_token: null",
        "path: HuggingFaceTB/SmolLM2-135M-Instruct",
        "commit: 4be1c0d2a9f04be1c0d2a9f04be1c0d2a9f04be1",
        "push_to_hub: false",
        "eos_token_id: 2",
        "key: answer",
        "https://host/search?keyword=film&tokens=3",
    ],
)
def test_ordinary_settings_stay(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "content",
    [
        {"api_key": "tops3cret", "next": 1},
        {"command": "train a.yaml hub_token=tops3cret"},
        {"command": 'train --api_key="tops3cret, and more" b'},
        {"command": "train 'hub_token: tops3cret'"},
        {"secret": 5050, "note": "tops3cret is a word"},
        {"password": "two words of tops3cret", "credentials": {"user": "me"}, "hub_token": None},
    ],
)
@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_stays_json(content: dict, separators: tuple[str, str], indent: int | None) -> None:
    shown = redact(json.dumps(content, separators=separators, indent=indent))
    assert json.loads(shown).keys() == content.keys()
    assert REDACTED in shown
    assert "5050" not in shown
    assert "note" in content or "tops3cret" not in shown


def test_a_recipe_in_flow_style_keeps_its_other_settings() -> None:
    shown = redact("args: {hub_token: tops3cret, max_steps: 3}  # comment")
    assert shown == f"args: {{hub_token: {REDACTED}, max_steps: 3}}  # comment"


class TestPersonal:
    @pytest.mark.parametrize(
        "address",
        [
            "ann.b+news@mail.example.org",
            "ann_b-c@example.co.uk",
            "ann@exämple.de",
            "änne@example.de",
            '"ann b"@example.org',
            "ann@[192.168.0.1]",
            "mailto:ann@example.org",
            "ann@xn--exmple-cua.org",
            "ann＠example.org",
            "ann%40example.org",
            "ann&#64;example.org",
            "ann @ example.org",
            "ann (at) example.org",
            "ann [AT] example [dot] org",
            "ann{at}example{dot}org",
            "ann(at)example(dot)co(dot)uk",
            "ann at example dot org",
            "ann dot b at mail dot example dot org",
            "ann@example(dot)org",
        ],
    )
    def test_an_address_is_found_in_every_form(self, address: str) -> None:
        for before, after in (
            ("", ""),
            ("Write to ", "."),
            ("(", ")"),
            ("mail: ", ", or call"),
            ("<", ">"),
            ("x\n", "\n"),
        ):
            assert redact_personal(f"{before}{address}{after}") == f"{before}{EMAIL}{after}"

    @pytest.mark.parametrize(
        "number",
        [
            "+44 20 7946 0958",
            "+44 (0)20 7946 0958",
            "+44-20-7946-0958",
            "+1-202-555-0143",
            "+1 (202) 555-0143",
            "+4915123456789",
            "+33 1 23 45 67 89",
            "0049 30 1234567",
            "(202) 555-0143",
            "202-555-0143",
            "202.555.0143",
            "1-800-555-0199",
            "202-555-0143 ext. 12",
            "030 1234567",
            "0151 23456789",
            "(020) 7946 0958",
            "07700 900123",
            "06.12.34.56.78",
            "06.12.34.56.78",
            "0301234567",
            "07700900123",
            "0044 (0)20 7946 0958",
        ],
    )
    def test_a_phone_number_is_found_by_its_form(self, number: str) -> None:
        for before, after in (("", ""), ("It is ", "."), ("(", ")"), ("Tel:", ", mornings"), ("or ", " or not\n")):
            assert redact_personal(f"{before}{number}{after}") == f"{before}{PHONE}{after}"

    @pytest.mark.parametrize("number", ["555-1234", "202 555 0143", "01 23 45 67 89", "800 555 0143", "(55) 5123 4567"])
    @pytest.mark.parametrize(
        "before", ["Call ", "call me at ", "phone: ", "Tel. ", "my mobile is ", "WhatsApp number "]
    )
    def test_any_other_form_is_one_behind_a_word_that_says_so(self, before: str, number: str) -> None:
        assert redact_personal(f"{before}{number} today") == f"{before}{PHONE} today"
        assert redact_personal(f"There are {number} today") in (f"There are {number} today", f"There are {PHONE} today")

    @pytest.mark.parametrize(
        "before", ["Reach me on ", "My number is ", "my number's ", "contact number: ", "cellphone "]
    )
    def test_a_chinese_number_behind_words_that_say_so(self, before: str) -> None:
        assert redact_personal(f"{before}138 1234 5678, evenings") == f"{before}{PHONE}, evenings"

    @pytest.mark.parametrize("head", ["+1", "0049 ", "tel. ", "(030) "])
    def test_more_digits_than_a_number_has_are_passed_in_one_go(self, head: str) -> None:
        text = f"{head}{'12345678901234567' * 6000}"
        assert redact_personal(text) == text

    def test_a_number_in_one_piece_needs_more_than_the_word_call(self) -> None:
        assert redact_personal("call 5551234567, or phone number 5551234") == f"call {PHONE}, or phone number {PHONE}"
        assert redact_personal("call 5551234") == "call 5551234"

    @pytest.mark.parametrize(
        "key",
        [
            "AIza" + "a1B2c" * 7,
            "xoxb-" + "123456789012-abcdefghijkl",
            "glpat-" + "a1B2" * 5,
            "npm_" + "a1B2" * 9,
            "sk_live_" + "a1B2" * 6,
            "sk-ant-" + "a1B2" * 8,
            "ASIA" + "ABCD" * 4,
            "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeKKF2QT4",
            "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----",
            "-----BEGIN PRIVATE KEY-----\\nMIIE\\n-----END PRIVATE KEY-----",
        ],
    )
    def test_keys_of_known_forms(self, key: str) -> None:
        for redaction in (redact, redact_personal):
            assert redaction(f"use {key} for it") == f"use {REDACTED} for it"

    def test_a_key_that_is_cut_off_is_one_still(self) -> None:
        assert redact_personal("-----BEGIN EC PRIVATE KEY-----\nMIIE\nabc") == REDACTED

    def test_a_named_secret_is_one_in_quotes_or_with_a_digit(self) -> None:
        text = "password = 'hunter', api_key=abc123def, hub_token: tops3cret"
        assert redact_personal(text) == f"password = '{REDACTED}', api_key={REDACTED}, hub_token: {REDACTED}"
        plain = "def login(password: str, secret: bytes) -> None: ...  # The secret: always be kind"
        assert redact_personal(plain) == plain
        assert redact_personal("The secret: 3 eggs, or secret: 12.") == "The secret: 3 eggs, or secret: 12."
        assert redact_personal("password: 1234, secret: a1") == f"password: {REDACTED}, secret: {REDACTED}"

    @pytest.mark.parametrize(
        "text",
        [
            "A @ B.transpose() + x @ y.T",
            "10 items @ 3.50 each, 5 @ $3.00",
            "@ann wrote @app.route('/x') at site.org",
            "meet me at noon, available at example.com",
            "git clone git@github.com:org/repo.git",
            "user@localhost:~$ ls",
            "the dot product at x dot y",
            "ISBN 978-3-16-148410-0, 192.168.100.200, v1.22.333.4444",
            "from 10:00 to 22:30, 2023-05-02T10:00:00+02:00, in 1990-2000 and 1914/1918",
            "51.507400, -0.127800 and +151.207302",
            "2+1234567890 = 1234567892, 3-555-444",
            "call f(1234567), the phone costs 1 000 000, the text has 1234567 words, ring 911",
            "text 20230502 and fax 2023-05-02, call on 01.02.2023 10 people; call on 01 02 2023",
            "from +20 30 to +5 100 m",
            "https://example.org/202-555-0143?id=0301234567",
            "1 2 3 4 5 6 7 8 9, 100 200 300 400 500, 200 300 4000",
            "4be1c0d2a9f04be1c0d2a9f04be1c0d2a9f04be1 and 550e8400-e29b-41d4-a716-446655440000",
            "call me at 1990-2000, the phone is 1000000 won",
            "01 02 03 04 05, 06 12 34 56 78 90, digits 0123456789, ISBN 0306406152, ISBN-10: 0306406152",
            "id=0301234567, 0.0301234567, the time 06:12:34 of 06 12 1978",
        ],
    )
    def test_ordinary_text_stays(self, text: str) -> None:
        assert redact_personal(text) == text


WORDS = st.sampled_from(["there", "were", "about", "and", "of", "on", "costs", "since", "until", "a", "is", "page"])


@st.composite
def ordinary_numbers(draw: st.DrawFn) -> str:
    """A number, price, percentage, year, date or time, written in one of many ways."""
    number, cents = draw(st.integers(0, 10**12)), draw(st.integers(0, 99))
    day = draw(st.datetimes(datetime(1500, 1, 1), datetime(2099, 12, 31)))
    grouped = f"{number:,}"
    amount = draw(
        st.sampled_from(
            [f"{number}", grouped, grouped.replace(",", "."), grouped.replace(",", " "), f"{number}.{cents:02}"]
            + [f"{grouped}.{cents:02}", f"{grouped.replace(',', '.')},{cents:02}", f"-{number}", f"{number / 7:.6f}"]
        )
    )
    priced = draw(st.sampled_from(["{}", "${}", "€ {}", "{} €", "{}%", "£{}", "{}kg", "({})", "{} USD"])).format(amount)
    years = f"{day.year}{draw(st.sampled_from(['-', '–', '/', ' to ']))}{day.year + cents}"
    form = draw(
        st.sampled_from(
            ["%Y", "%Y-%m-%d", "%d/%m/%Y", "%m/%d/%y", "%d.%m.%Y", "%d-%m-%Y", "%B %d, %Y", "%d %B %Y", "%H:%M:%S"]
            + ["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%d.%m.%Y %H:%M", "%I:%M %p", "%Y%m%d", "%d %m %Y", "%Y/%m"]
        )
    )
    return draw(st.sampled_from([priced, priced, years, day.strftime(form)]))


@given(st.lists(st.tuples(st.lists(WORDS, max_size=4).map(" ".join), ordinary_numbers()), min_size=1, max_size=4))
@settings(max_examples=400)
def test_numbers_prices_years_and_dates_stay(pieces: list[tuple[str, str]]) -> None:
    text = ", ".join(" ".join(piece).strip() for piece in pieces) + "."
    assert redact_personal(text) == text


LABELS = st.text("abcdefghij", min_size=1, max_size=8)
AT = st.sampled_from(["@", " @ ", "＠", "(at)", " (at) ", "[at]", " [AT] ", "&#64;"])
DOT = st.sampled_from([".", "(dot)", " [dot] ", " dot "])


@given(
    local=st.lists(LABELS, min_size=1, max_size=3).map(".".join),
    domain=st.lists(LABELS.filter(lambda label: len(label) > 1), min_size=1, max_size=3),
    top=st.sampled_from(["com", "org", "de", "co", "io"]),
    at=AT,
    dot=DOT,
    around=st.sampled_from([("", ""), ("Write to: ", ", please."), ("(", ")"), ("\n", "\n"), ("> ", "!")]),
)
@settings(max_examples=200)
def test_addresses_in_odd_forms_are_found_and_the_rest_stays(
    local: str, domain: list[str], top: str, at: str, dot: str, around: tuple[str, str]
) -> None:
    address = local + at + dot.join([*domain, top])
    assert redact_personal(address.join(around)) == EMAIL.join(around)
    assert redact_personal(EMAIL.join(around)) == EMAIL.join(around)


@given(
    country=st.sampled_from(["+1", "+44", "+49", "+353", "+91"]),
    digits=st.text("123456789", min_size=8, max_size=11),
    cuts=st.tuples(st.integers(2, 4), st.integers(2, 4)),
    sign=st.sampled_from([" ", "-", ".", "/"]),
)
def test_international_numbers_are_found_however_they_are_cut(
    country: str, digits: str, cuts: tuple[int, int], sign: str
) -> None:
    first, second = cuts[0], sum(cuts)
    parts = [part for part in (digits[:first], digits[first:second], digits[second:]) if part]
    assume(any(len(part) != 3 for part in parts))  # which would be thousands
    number = sign.join([country, *parts])
    assert redact_personal(f"It is {number}, I think") == f"It is {PHONE}, I think"
