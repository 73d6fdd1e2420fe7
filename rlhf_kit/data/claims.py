"""What a completion claims of a marketplace's options, read by closed lists of words.

To take a denial for a claim would invert the customer; what is not understood only leaves the base rate. So a sentence
counts if every word of it is known, and what it says of a feature stands right before it: "has", "does not have", "no",
"lacks", "may have". With another word between them, or one that is on no list, the sentence claims nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rlhf_kit.data.marketplace import NO, UNKNOWN, YES, Market, marketplace_vocabulary

# What a text is made of when it is read, beside words: <ac> for options A and C, <> for "A or C", and these.
REQUIREMENT, OTHER, NONE_OF = "{", "}", "~"

_VOCABULARY = frozenset(marketplace_vocabulary())
_SENTENCE = re.compile(r"(.+?)([.;!?]+(?=\s|$)|\n|$)", re.DOTALL)
_CLUTTER = re.compile(r"[*_`<>{}~]+|^[ \t]*(?:[-•#]+|\d+[.)])(?=\s)", re.MULTILINE)
_LIST = r"[A-E](?:(?:\s*,\s*(?:(?:and|or|nor)\s+)?|\s+(?:and|or|nor)\s+|\s*[&/]\s*)(?:(?i:options?)\s+)?[A-E]\b){0,4}"
_DENIED = r"(?P<denied>(?<!\w)(?i:neither|none)\s+(?:(?i:of)\s+(?:(?i:the)\s+)?)?)?"
_NAMED = re.compile(rf"{_DENIED}(?<![\w-])(?i:options?)\s+(?P<names>{_LIST})(?![\w'-])")
_SAID = (
    "yes|no|unknown|has|have|hasn't|haven't|lacks?|does|doesn't|do|don't|may|might|could|can|cannot|can't|never|comes?|is"
    "|are|includes?|offers?|features?|provides?|both|all|also|really"
)
_BARE = re.compile(rf"{_DENIED}(?<![\w'-])(?P<names>{_LIST})(?![\w'-])(?=\s*[:=(–—]|\s+-\s|\s+(?i:{_SAID})\b)")
_NUMBER = r"(?: (?:two|three|four|five))?"
_ALL = re.compile(rf"\b(?:all(?: of)?(?: the| these)?{_NUMBER} options|(?:each|every) option)\b")
_NOT_ANY = re.compile(rf"\b(?:none of (?:the|these){_NUMBER} options|no options?)\b")
_TOKEN = re.compile(r"<[a-e]*>|\w+(?:['/]\w+)*|\$\d+(?:\.\d+)?|\S")
# What is written in several words, or in several ways; in lower case.
_REWRITTEN = tuple(
    (re.compile(rf"\b(?:{pattern})\b"), new)
    for pattern, new in (
        ("can't|cannot|can not", "never"),
        ("(do|does|has|have|is|are)n'?t", r"\1 not"),
        ("not (?:sure|known|clear|certain|stated|specified|listed)", "unknown"),
        ("no (?:idea|information)", "unknown"),
        ("may or may not|might or might not", "may"),
        ("i'd|i would", "i"),
        ("you'd|you would|you should", "you"),
        ("(?:this|that|the|such a) feature", "it"),
        ("(has|have)( not)? got", r"\1\2"),
        ("on the other hand|in contrast|in fact|as well", "also"),
    )
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DENIALS = _words("not no never lacks lack lacking missing without")
_DEGREES = _words(
    "good better best cheap cheaper cheapest expensive low lower lowest high higher highest need more most"
)
_DOUBTS = _words(
    "unknown unclear unsure uncertain n/a may might could can perhaps maybe possibly probably apparently supposedly "
    "reportedly likely unlikely seem seems appear appears know known say says said think thought believe believed "
    "doubt guess suppose supposed expected whether if information"
)
_VERBS = _words(
    "does do has have include includes offer offers feature features provide provides come comes equipped fitted"
)
_INFINITIVES = _words("have include offer feature provide come equipped fitted")  # of a denial that may stand far away
_ELLIPTIC = {True: _words("does do"), False: _words("does do has have")}  # "Option A does", "option B has not"
_UNHEARD = _words("a an the its any such your with also really actually currently even ever either too yet")
_OBJECTS = _words("it one that this them")
_JOINTS = _words(", and or but while whereas which that")
_CONTRASTS = _words("but while whereas")
_MARKS = _words(": - – — ( ) =")
# Beside them a verb still belongs to the options before them, which it does not behind "the customer".
_SUBJECTLESS = _words(
    "is are it they this these both all each certainly definitely clearly indeed however at for costs"
)
_HARMLESS = _words(
    "i you we me my us to be of in on by so as here there well hello hi sure only thus then therefore finally "
    "according data sheet recommend suggest choose take buy get go consider regarding about answer good better best "
    "great nice fine cheap cheaper cheapest expensive price choice pick cost low lower lowest high higher highest "
    "because makes making make more most very what need needs want many"
)
_RETRACTION = re.compile(
    r"\b(?:false|untrue|not (?:true|correct|right|so)|wrong|incorrect|a lie|lied|lying|joking|kidding)\b"
)


def claims(text: str, market: Market) -> dict[str, bool]:
    """What a completion claims of the requirement, by option; the last claim on an option counts.

    It reads answers ("B yes", "Option B: no", "Option B: a timer: yes") and sentences in which the options stand before
    their verb: "Options A and B have a timer", "Option C lacks it", "Option A has a lid but no timer", "Neither A nor B
    has one". What is in doubt ("unknown", "may have", "does not seem to have", "I think that") is not claimed, and
    takes back what was said before; a denial that names no option ("Actually no, it does not") takes back all of it.
    Questions, and sentences that are not understood, claim nothing: a language model as the judge reads those.
    """
    words = text.split()
    if words and _VOCABULARY.issuperset(words):
        return _claims_in_words(words, market)
    found: dict[str, bool] = {}
    topic = REQUIREMENT
    for words, end in _SENTENCE.findall(_marked(text, market)):
        if "?" in end:
            continue
        sentence = _rewritten(words)
        tokens = _TOKEN.findall(sentence)
        try:
            said = _Sentence(tokens, topic, ended=bool(end)).said
        except _NotUnderstood:
            said = _withdrawn(sentence, tokens, found)
        topic = next((token for token in reversed(tokens) if token in (REQUIREMENT, OTHER)), topic)
        for option, claimed in said.items():
            found.pop(option, None)
            if claimed is not None and option in market.options:
                found[option] = claimed
    return found


def _claims_in_words(words: Sequence[str], market: Market) -> dict[str, bool]:
    """The claims of a text in the style `words`: each answer is about the last option that has one right behind it."""
    found: dict[str, bool] = {}
    option = None
    for place, word in enumerate(words):
        following = words[place + 1 :]
        if word in "ABCDE" and following and following[0] in (YES, NO, UNKNOWN):
            option = word
        elif option in market.options and word in (YES, NO, UNKNOWN):
            stop = next((k for k, other in enumerate(following) if other in (YES, NO, UNKNOWN)), len(following))
            about = set(following[:stop]) & set(market.features)
            if about and market.requirement not in about:
                continue
            found.pop(option, None)
            if word != UNKNOWN:
                found[option] = word == YES
    return found


def _marked(text: str, market: Market) -> str:
    """The text in lower case, with marks for options and features."""

    def names(match: re.Match[str]) -> str:
        listed = match["names"]
        letters = "".join(re.findall(r"\b[A-E]\b", listed)).lower()
        if match["denied"]:
            return f" {NONE_OF} <{letters}> "
        return " <> " if re.search(r"\bn?or\b|/", listed) else f" <{letters}> "

    bare = {re.sub(r"^an? ", "", name.lower()): OTHER for name in market.features}
    bare[re.sub(r"^an? ", "", market.requirement.lower())] = REQUIREMENT
    known = "|".join(re.escape(name) for name in sorted(bare, key=len, reverse=True))
    text = _NAMED.sub(names, _CLUTTER.sub(" ", text.replace("’", "'")))
    text = re.sub(rf"(?<![\w-])(?:{known})(?![\w'-])", lambda match: f" {bare[match[0].lower()]} ", text, flags=re.I)
    text = _BARE.sub(names, text).lower()
    every = f"<{''.join(market.options).lower()}>"
    return _ALL.sub(f" {every} ", _NOT_ANY.sub(f" {NONE_OF} {every} ", text))


def _rewritten(sentence: str) -> str:
    sentence = " ".join(sentence.split())
    for pattern, new in _REWRITTEN:
        sentence = pattern.sub(new, sentence)
    return sentence


def _withdrawn(sentence: str, tokens: Sequence[str], found: Mapping[str, bool]) -> dict[str, None]:
    """The options of which a sentence that is not understood may deny or doubt what was claimed before it."""
    named = {name.upper() for token in tokens if token.startswith("<") for name in token[1:-1]}
    about_it = REQUIREMENT in tokens or OTHER not in tokens
    if not named:
        denials = zip(tokens, [*tokens[1:], ""], strict=True)
        denied = about_it and any(token in _DENIALS and following not in _DEGREES for token, following in denials)
        return dict.fromkeys(found if denied or _RETRACTION.search(sentence) else ())
    against = any(token in _DENIALS | _DOUBTS | {NONE_OF, "except"} for token in tokens)
    return dict.fromkeys(named if against and about_it else ())


class _NotUnderstood(Exception):
    """A sentence says something else than the grammar, or more."""


class _Sentence:
    """What one sentence says: options, then verbs and denials with what they are about.

    Attributes:
        said: by option, whether it is claimed to have the requirement; None: in doubt.
    """

    def __init__(self, tokens: Sequence[str], topic: str, ended: bool = True) -> None:
        """Read the sentence; `topic` is the feature that "it" means at its beginning.

        One that has not `ended`, by a full stop or a line, may have been cut off behind "Option A does".

        Raises:
            _NotUnderstood: it is not understood.
        """
        self.said: dict[str, bool | None] = {}
        self._topic = topic
        self._options = ""
        self._spoken = False  # there is a predicate behind the options
        self._none_of = self._none_follows = False
        self._all_doubted = False  # by a doubt that stands before the options
        self._joint = ""  # "and", "but" and the like, right before this word
        self._begin()
        for place, token in enumerate(tokens):
            self._read(token, tokens[place + 1] if place + 1 < len(tokens) else "")
        _understood(ended or not self._open or self._doubted)
        self._close("")

    def _begin(self, doubted: bool = False) -> None:
        """A predicate begins."""
        self._doubted = doubted or (self._all_doubted and bool(self._options))
        self._has: bool | None = None  # what is said of the objects to come
        self._open = False  # the verb, denial or doubt stands right before this word
        self._verb_alone = ""  # the verb that may go without its object, if any does
        self._objects = 0
        self._item = ""  # a feature whose answer is to come: "a timer: yes"
        self._own = True  # no other word could be the subject of a verb here

    def _read(self, token: str, following: str) -> None:
        last = following in _JOINTS | _MARKS | {""} or following.startswith("<")
        if token.startswith("<"):
            self._name(token[1:-1])
        elif token == NONE_OF:
            self._none_follows = True
        elif token in (REQUIREMENT, OTHER):
            self._object(token)
        elif token in _OBJECTS and self._open and not self._joint:
            self._object(self._topic)
        elif token in _JOINTS:
            _understood(self._joint in ("", ",") or token == ",")
            self._joint = self._joint if token == "," and self._joint else token
        elif token in _MARKS:
            self._joint = self._joint or ("," if self._objects else "")
        elif token in (YES, NO) and last:
            self._answer(token == YES, following)
        elif token in _DENIALS:
            self._deny(token)
        elif token in _VERBS:
            self._verb(token)
        elif token in _DOUBTS:
            self._doubt()
        elif token not in _UNHEARD:
            self._other(token)

    def _name(self, options: str) -> None:
        """Options, of which something will be said."""
        unsaid = bool(self._options) and not self._spoken
        denied = self._has is False and not self._objects
        into = (self._open or denied) and not self._joint and not self._doubted  # "does option B not have"
        _understood(options and not unsaid and not into and self._joint != "or")
        doubted = self._doubted and not self._joint
        self._close("")
        self._all_doubted &= self._joint not in _CONTRASTS
        self._options, self._joint, self._spoken = options, "", False
        self._none_of, self._none_follows = self._none_follows, False
        self._begin(doubted)

    def _close(self, joint: str) -> None:
        """The predicate ends: before a joint, before other options, or with the sentence."""
        _understood(not self._item)
        if self._doubted and self._open and self._topic == REQUIREMENT:
            self._record(None)
        elif self._open and not self._doubted:
            has = bool(self._has)
            _understood(self._verb_alone in _ELLIPTIC[has] and joint != ",")
            self._claim(self._topic, has)

    def _joined(self) -> None:
        """Begin another predicate of the same options, if a joint stands before it."""
        if not self._joint:
            return
        _understood(self._joint != "or" and not (self._none_of and self._spoken))
        self._close(self._joint)
        contrast = self._joint in _CONTRASTS
        self._all_doubted &= not contrast
        doubted, self._joint = self._doubted and not contrast, ""
        self._begin(doubted)

    def _verb(self, verb: str) -> None:
        denied = self._has is False and not self._objects
        _understood(not (self._joint and denied and verb in _INFINITIVES))  # "does not cost much and have"
        self._joined()
        _understood(self._options and self._own and not self._objects)
        self._spoken = True
        if self._doubted:
            return
        if self._has is False:
            _understood(self._open)  # "does not have"; but not "is not cheap has"
        self._verb_alone = "" if self._open else verb
        self._has = not self._none_of if self._has is None else self._has
        self._open = True

    def _deny(self, denial: str) -> None:
        _understood(not (self._joint and denial == "not" and self._has is False and self._objects))
        self._joined()
        _understood(self._options and self._own and not self._none_of and not self._objects)
        self._spoken = True
        if self._doubted:
            return
        _understood(self._has is not False and not self._item)
        self._verb_alone = self._verb_alone if denial == "not" else ""
        self._has, self._open = False, True

    def _doubt(self) -> None:
        self._joined()
        _understood(not self._item and not self._objects)
        if self._options:
            self._doubted = self._open = self._spoken = True
        else:
            self._all_doubted = True

    def _object(self, feature: str) -> None:
        """A feature, behind a verb or a denial, in a list, or before its own answer."""
        if self._doubted:
            self._joint, self._open = "", False
            self._objects += 1
            self._topic = feature
            if feature == REQUIREMENT:
                self._record(None)
            return
        if self._joint and self._objects and self._has is not None:
            contrast = self._joint == "but"
            _understood((contrast and not self._none_of) or self._joint in (("and", ",") if self._has else ("or",)))
            self._has, self._joint, self._open = self._has or contrast, "", True
        self._joined()
        if self._has is None:
            _understood(self._options and self._own and not self._item)
            self._item = feature
        else:
            _understood(self._open)
            self._claim(feature, self._has)

    def _answer(self, yes: bool, following: str) -> None:
        if not self._options:
            _understood(yes or following in (",", ":"))
            return
        if self._item:
            feature, self._item = self._item, ""
        else:
            self._joined()
            feature = self._topic
        _understood(not self._doubted and not self._none_of and not self._open and self._own)
        self._claim(feature, yes)

    def _other(self, word: str) -> None:
        """A word that says nothing of a feature, such as "cheap", which may be said between two that do."""
        price = word.startswith("$")
        _understood((price or word.isdigit() or word in _HARMLESS | _SUBJECTLESS) and not self._item)
        self._joined()
        self._own &= price or word in _SUBJECTLESS
        self._open, self._verb_alone = False, ""
        self._spoken = True

    def _claim(self, feature: str, has: bool) -> None:
        self._topic, self._spoken = feature, True
        self._open, self._verb_alone = False, ""
        self._objects += 1
        if feature == REQUIREMENT:
            self._record(has)

    def _record(self, claimed: bool | None) -> None:
        for option in self._options.upper():
            _understood(self.said.setdefault(option, claimed) == claimed)


def _understood(condition: object) -> None:
    if not condition:
        raise _NotUnderstood
