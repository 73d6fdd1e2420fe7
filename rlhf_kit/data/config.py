"""Configuration of data: prompts, completions, outcome labels and preferences."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlhf_kit.config import Config, Location

Share = Annotated[float, Field(ge=0, le=1)]


class DataBase(Config):
    """Fields of every data source.

    `columns` renames, new name first (`{prompt: question}`); one source may serve several names.
    `shuffle_seed` shuffles the rows, then `skip` leaves out the first, and `limit` keeps that many of the
    rest. Before that, `hash_range: [0, 0.8]` keeps the rows whose prompt's hash lies there, of dialogues the hash of
    what the user says first: two ranges that do not overlap have no prompt in common, whatever the order of the rows.
    `templates` add columns, each a text with other columns in it (`{judged_prompt: "{label} {prompt}"}`); of a
    conversation, the text of its last message. `prompt_template` wraps a text prompt (`"Q: {prompt}\\nA:"`); `chat`
    turns text prompts and completions into messages, with `system` as the first. All three treat `judged_prompt` and
    `corrupted_prompt` as they do `prompt`.

    Rows that have `chosen` and `rejected` and no prompt share one: what both begin with. Annotated texts have `text`
    and `spans`, a list of `{start, end, label}`; or `sentences`, a list of `{text, label}` in their order, with a label
    of null where there is nothing to mark. Of a row's `tools` (a list, or its JSON) the chat template is told where a
    stage learns from given completions; `ppo` has its tools from the stage. A null key of a message or a tool is none.
    """

    columns: dict[str, str] = Field(default_factory=dict)
    templates: dict[str, str] = Field(default_factory=dict)
    hash_range: tuple[Share, Share] | None = None
    prompt_template: str | None = None
    chat: bool = False
    system: str | None = None
    skip: NonNegativeInt = 0
    limit: PositiveInt | None = None
    shuffle_seed: int | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template {self.prompt_template!r} does not say where the {{prompt}} goes")
        if self.system is not None and not self.chat:
            raise ValueError("system is the first message of a conversation: it needs chat: true")
        if self.hash_range is not None and self.hash_range[0] >= self.hash_range[1]:
            raise ValueError(f"hash_range {list(self.hash_range)} is empty: write the smaller number first")
        return self

    @property
    def parts(self) -> dict[str, DataBase]:
        """The data sets that it is made from, by field."""
        return {name: value for name in type(self).model_fields if isinstance(value := getattr(self, name), DataBase)}


class Jsonl(DataBase):
    """A JSON-lines file (also `.json` with a list, also `.gz`)."""

    type: Literal["jsonl"]
    path: Location


class Parquet(DataBase):
    """A Parquet file."""

    type: Literal["parquet"]
    path: Location


class Hub(DataBase):
    """A data set by hub id; `data_dir` is a folder of its repository."""

    type: Literal["hub"]
    path: Location
    name: str | None = None
    data_dir: str | None = None
    split: str = "train"
    revision: str | None = None


class Gsm8kSolutions(DataBase):
    """GSM8K's `example_model_solutions.jsonl`: four model solutions a problem, with outcome labels.

    Rows become `prompt, completion, label`; with `paired`, `prompt, chosen, rejected` for every combination
    of a right and a wrong solution. `shuffle_seed`, `skip` and `limit` count problems, so that no problem
    lies on both sides of a split. `calculator_annotations` keeps the models' `<<16-3=13>>`.
    """

    type: Literal["gsm8k_solutions"]
    path: Location
    paired: bool = False
    calculator_annotations: bool = False


class ToxicSpans(DataBase):
    """The CSV of SemEval-2021 task 5: posts whose toxic characters people have marked.

    Rows become `prompt, text, spans`, with an empty prompt and the label `toxic`.
    """

    type: Literal["toxic_spans"]
    path: Location


class QaFeedback(DataBase):
    """Fine-Grained RLHF's `dev_feedback.json` (arXiv 2306.01693): answers whose errors people have marked.

    Rows become `prompt, text, spans`, one a question; information that an answer lacks is a span over all of it. With
    `paired`, `prompt, chosen, rejected` for each two predictions of which one was preferred. `passages` is how
    many sentences of what the answer should rest on stand before the question: those that share most words with it.
    `shuffle_seed`, `skip` and `limit` count questions, so that none lies on both sides of a split.
    """

    type: Literal["qa_feedback"]
    path: Location
    passages: NonNegativeInt = 0
    paired: bool = False


class RunningSums(DataBase):
    """Generated multi-step arithmetic: `terms` numbers from 1 to `largest` are added one by one modulo `modulus`.

    The completion writes the running value after each addition; the last is the answer. The running value is
    multiplied by `multiplier` first: 10, with `largest: 9`, makes it long division, digit by digit.
    """

    type: Literal["running_sums"]
    size: PositiveInt
    terms: PositiveInt = 16
    modulus: Annotated[int, Field(ge=2)] = 23
    largest: PositiveInt | None = None
    multiplier: PositiveInt = 1
    seed: int = 0


class ToolArithmetic(DataBase):
    """Generated conversations with a calculator: a chain of `terms` additions and subtractions, one a turn.

    The numbers are from 1 to `largest`, and no intermediate result is below 0 or above 99.
    """

    type: Literal["tool_arithmetic"]
    size: PositiveInt
    terms: PositiveInt = 2
    largest: Annotated[int, Field(ge=1, le=49)] = 20
    seed: int = 0


class Marketplace(DataBase):
    """Generated markets with a consultant, who alone knows which option has what the customer needs.

    See `rlhf_kit.data.marketplace`: options have a feature with probability `base_rate`, the consultant's data sheet
    knows so with probability `visible`, and the completions of supervised training say what it says with probability
    `honesty` a claim. `style: words` has a closed vocabulary, `prose` is English.
    """

    type: Literal["marketplace"]
    size: PositiveInt
    options: Annotated[int, Field(ge=2, le=5)] = 3
    features: Annotated[int, Field(ge=1, le=8)] = 3
    base_rate: Annotated[float, Field(ge=0, le=1)] = 0.3
    visible: Annotated[float, Field(ge=0, le=1)] = 0.8
    honesty: Annotated[float, Field(ge=0, le=1)] = 0.5
    style: Literal["words", "prose"] = "words"
    seed: int = 0


class ReasoningGym(DataBase):
    """A generated task of the `reasoning-gym` package.

    `params` are the task's own; a completion is `completion_template` with the answer in place of `{answer}`.
    """

    type: Literal["reasoning_gym"]
    task: str
    size: PositiveInt
    seed: int = 0
    params: dict[str, Any] = Field(default_factory=dict)
    completion_template: Annotated[str, Field(pattern=r"\{answer\}")] = "{answer}"


class Sampled(DataBase):
    """Completions that a model samples, labelled by their outcome: `prompt, completion, label` rows.

    The label is true where the verifier gives at least 0.5.
    """

    type: Literal["sampled"]
    model: Location
    prompts: PromptConfig
    verifier: Literal["exact", "math", "reasoning_gym"]
    num_generations: PositiveInt = 4
    max_new_tokens: PositiveInt = 256
    temperature: PositiveFloat = 1.0
    batch_size: PositiveInt = 128
    seed: int = 0


Edit = Literal["number", "entity", "word", "negate", "delete", "duplicate"]


class Perturbed(DataBase):
    """Hard negatives made by editing texts, with labels from the diff (TLDR, arXiv 2410.04734).

    Each of `texts` gives itself without a span (unless `originals: false`) and `per_text` edited versions, whose
    changed words are spans labelled by the kind of edit: another number, a name or a word from another row, a
    negation, a deleted or a repeated stretch. `column` of the rows is what is edited. Split by the
    `skip` and `limit` of `texts`: those of these rows could leave versions of one text on both sides.
    """

    type: Literal["perturbed"]
    texts: PromptConfig
    column: str = "completion"
    edits: Annotated[tuple[Edit, ...], Field(min_length=1)] = (
        *("number", "entity", "word"),
        *("negate", "delete", "duplicate"),
    )
    per_text: PositiveInt = 1
    originals: bool = True
    seed: int = 0


class Mixed(DataBase):
    """Experience replay (DICE, arXiv 2406.09760): `rows`, and of `replay` as many that they are `share` of the whole.

    Rows to replay whose prompt is among `rows` are left out, whether it is text or messages and whatever the system
    message. The mixture has the columns that both have, and the ids of sampled completions that either has: a row
    without ids is encoded from its text.
    """

    type: Literal["mixed"]
    rows: PromptConfig
    replay: PromptConfig
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    seed: int = 0


class CorruptedPrompts(DataBase):
    """`rows`, each with a `corrupted_prompt`: its prompt after one of the edits of `perturbed`.

    It is what I-ORPO (arXiv 2406.19371) learns from. A row whose prompt none of the edits can change is left out.
    """

    type: Literal["corrupted_prompts"]
    rows: PromptConfig
    edits: Annotated[tuple[Edit, ...], Field(min_length=1)] = ("number", "entity", "word", "negate")
    seed: int = 0


class Concatenated(DataBase):
    """The rows of several data sets under each other, with the columns that all of them have.

    Ids of sampled completions are kept if one has them: a row without ids is encoded from its text.
    """

    type: Literal["concatenated"]
    sets: Annotated[tuple[PromptConfig, ...], Field(min_length=2)]

    @property
    def parts(self) -> dict[str, DataBase]:
        return {f"sets.{number}": part for number, part in enumerate(self.sets)}


PromptConfig = Annotated[
    Jsonl
    | Parquet
    | Hub
    | Gsm8kSolutions
    | ToxicSpans
    | QaFeedback
    | RunningSums
    | ToolArithmetic
    | Marketplace
    | ReasoningGym,
    Field(discriminator="type"),
]
Sampled.model_rebuild()
Perturbed.model_rebuild()
Mixed.model_rebuild()
CorruptedPrompts.model_rebuild()
Concatenated.model_rebuild()
DataConfig = Annotated[
    Jsonl
    | Parquet
    | Hub
    | Gsm8kSolutions
    | ToxicSpans
    | QaFeedback
    | RunningSums
    | ToolArithmetic
    | Marketplace
    | ReasoningGym
    | Sampled
    | Perturbed
    | Mixed
    | CorruptedPrompts
    | Concatenated,
    Field(discriminator="type"),
]
