"""What the tests of reports share: a parser that finds what a browser would find, and hostile text."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text of script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text += data

    def tokens(self) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if "data-tip" in attributes]


@pytest.fixture(scope="session")
def parse() -> type[Page]:
    """Parses a page."""
    return Page


@pytest.fixture
def hostile() -> str:
    """Text that tries to leave its place in a page."""
    return HOSTILE


@pytest.fixture
def hostile_sample() -> dict:
    """A sample made of hostile text."""
    return {
        "prompt": HOSTILE,
        "completion": HOSTILE,
        "tokens": [HOSTILE, '"><script>alert(3)</script>'],
        "advantages": [1.0, -1.0],
        "rewards": {HOSTILE: [1.0, 0.0]},
        "action_mask": [True, False],
        "outcome": 1.0,
    }
