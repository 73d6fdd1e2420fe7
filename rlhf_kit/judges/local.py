"""A judge in this process: a model of its own, or the policy's weights."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeFloat, PositiveInt

from rlhf_kit.config import Config
from rlhf_kit.data.messages import dialogue_text
from rlhf_kit.judges.base import Answer, Judge, Question, cut_answer
from rlhf_kit.models.config import Pretrained
from rlhf_kit.problems import Problem
from rlhf_kit.rollout import Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_kit.models.in_process import InProcess, PolicyContext

logger = logging.getLogger(__name__)
SHOWN_ERRORS = 3


class InProcessConfig(Config):
    """Fields of judges in this process.

    `temperature` 0 takes the likeliest token each time. It is for what the judge writes; log-probabilities of choices
    are those of the model itself.
    """

    max_tokens: PositiveInt = 256
    temperature: NonNegativeFloat = 0.0
    batch_size: PositiveInt = 16

    def judge(self, model: InProcess) -> LocalJudge:
        """The judge that asks `model`."""
        return LocalJudge(model, self.max_tokens, self.temperature, self.batch_size)


class Local(InProcessConfig):
    """A model of its own, whole on every process."""

    type: Literal["local"]
    model: Pretrained

    def problems(self) -> Iterator[Problem]:
        """What cannot work."""
        if self.model.peft is not None:
            yield Problem("model.peft", "is for models that are trained", remedy="remove it")

    def files(self) -> Iterator[tuple[str, str, bool]]:
        """What it reads: the field, the file or model, and whether it is a model."""
        yield "model.path", self.model.path, True

    def build(self, context: PolicyContext) -> LocalJudge:
        """The judge; loads its model."""
        from rlhf_kit.models.in_process import own_model

        return self.judge(own_model(self.model, context.device))


class Policy(InProcessConfig):
    """The policy's own weights.

    With `frozen` they are its initial weights: with LoRA the base without its adapters, which takes no memory, else a
    copy. Otherwise they are the weights of the moment.
    """

    type: Literal["policy"]
    frozen: bool = True

    def problems(self) -> Iterator[Problem]:
        """Nothing that is known before the run."""
        return iter(())

    def files(self) -> Iterator[tuple[str, str, bool]]:
        """Nothing but the policy."""
        return iter(())

    def build(self, context: PolicyContext) -> LocalJudge:
        """The judge.

        Raises:
            ValueError: it is to ask the live policy, and ZeRO-3 divides that among the processes.
        """
        from rlhf_kit.models.in_process import policy_model

        return self.judge(policy_model(context, self.frozen))


class LocalJudge(Judge):
    """Asks a model in this process, in batches of prompts of similar length.

    A prompt that does not fit the model's positions is an error, and so are choices that begin with the same token:
    what is cut off could be the question. A question's `schema` is not used: the model writes what it writes. An answer
    that is not done within `max_tokens` is an error too (`cut_answer`).
    """

    def __init__(self, model: InProcess, max_tokens: int = 256, temperature: float = 0.0, batch_size: int = 16) -> None:
        self.model = model
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._batch_size = batch_size
        self._counts: Counter[str] = Counter()

    def ask(self, questions: Sequence[Question]) -> Callable[[], list[Answer]]:
        """All the work is done when the result is called."""
        questions = list(questions)
        return lambda: self._answers(questions)

    def metrics(self) -> dict[str, float]:
        """Questions, tokens read and written, and errors."""
        counts, self._counts = self._counts, Counter()
        return {name: float(counts[name]) for name in ("calls", "prompt_tokens", "completion_tokens", "errors")}

    def check_choices(self, choices: Sequence[str]) -> None:
        self.first_tokens(choices)

    def first_tokens(self, choices: Sequence[str]) -> list[list[int]]:
        """The tokens with which each choice may begin.

        Raises:
            ValueError: two choices may begin with the same token, or the tokenizer does not know one.
        """
        return first_tokens(self.model.tokenizer, choices)

    def _answers(self, questions: list[Question]) -> list[Answer]:
        prompts = [self._prompt(question.messages) for question in questions]
        answers: dict[int, Answer] = {}
        for place, question in enumerate(questions):
            error = self._error(question, prompts[place])
            if error is not None:
                answers[place] = Answer(error=error)
        open_places = [place for place in range(len(questions)) if place not in answers]
        chosen = [place for place in open_places if questions[place].choices]
        written = [place for place in open_places if not questions[place].choices]
        with self.model.ready() as model:
            for batch in self._batches(chosen, prompts):
                for place, row in zip(batch, next_log_probs(model, [prompts[p][1] for p in batch]), strict=True):
                    tokens = self.first_tokens(questions[place].choices)
                    answers[place] = Answer(log_probs=[row[ids].logsumexp(0).item() for ids in tokens])
            for batch in self._batches(written, prompts):
                answered = self._write(model, [prompts[place][0] for place in batch])
                for place, (text, ended) in zip(batch, answered, strict=True):
                    answers[place] = Answer(text=text) if ended else cut_answer(text, questions[place])
        errors = Counter(answer.error for answer in answers.values() if answer.error is not None)
        if errors:
            said = "; ".join(f"{count} times: {error}" for error, count in errors.most_common(SHOWN_ERRORS))
            logger.warning("judge: %d of %d questions failed: %s", errors.total(), len(questions), said)
        self._counts["calls"] += len(questions)
        self._counts["errors"] += errors.total()
        self._counts["prompt_tokens"] += sum(len(prompts[place][1]) for place in open_places)
        return [answers[place] for place in range(len(questions))]

    def _prompt(self, messages: Sequence[Message]) -> tuple[Text, list[int]]:
        """What the model reads: messages or, without a chat template, text; and its tokens."""
        from rlhf_kit.models.in_process import literal_messages

        tokenizer: Any = self.model.tokenizer
        messages = literal_messages(tokenizer, messages)
        if tokenizer.chat_template is None:
            text = plain_prompt(messages)
            return text, list(tokenizer(text)["input_ids"])
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        return messages, list(encoded["input_ids"])

    def _error(self, question: Question, prompt: tuple[Text, list[int]]) -> str | None:
        """Why a question cannot be asked."""
        room = self.model.positions
        needed = len(prompt[1]) + (0 if question.choices else self._max_tokens)
        if room is not None and needed > room:
            return (
                f"a prompt of {len(prompt[1])} tokens, with its answer {needed}, does not fit the {room} positions of "
                "the judge's model: shorten the prompts or the completions, or take a judge that reads more"
            )
        try:
            self.first_tokens(question.choices)
        except ValueError as error:
            return str(error)
        return None

    def _batches(self, places: list[int], prompts: list[tuple[Text, list[int]]]) -> Iterator[list[int]]:
        """Places in batches, longest prompts first."""
        ordered = sorted(places, key=lambda place: -len(prompts[place][1]))
        for start in range(0, len(ordered), self._batch_size):
            yield ordered[start : start + self._batch_size]

    def _write(self, model: PreTrainedModel, prompts: list[Text]) -> list[tuple[str, bool]]:
        """The text that answers each prompt, and whether the model ended it."""
        from rlhf_kit.models.generation import eos_token_ids, generate_ids

        tokenizer: Any = self.model.tokenizer
        ids = generate_ids(
            model,
            tokenizer,
            prompts,
            max_new_tokens=self._max_tokens,
            temperature=self._temperature or None,
            batch_size=self._batch_size,
            synced_gpus=False,
        )
        self._counts["completion_tokens"] += sum(map(len, ids))
        ends = set(eos_token_ids(model, tokenizer))
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [(text, bool(ends.intersection(row[-1:]))) for text, row in zip(texts, ids, strict=True)]


def plain_prompt(messages: Sequence[Message]) -> str:
    """Messages as text, for a model without a chat template: `Role: content` in paragraphs, and the answerer's turn."""
    return f"{dialogue_text(messages)}\n\nAssistant:"


def next_log_probs(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Any:
    """Log-probabilities (B, V) in float32 of the token that follows each prompt.

    Prompts are padded on the right, where padding changes nothing that a causal model computes before it, and only the
    positions where a prompt ends reach the vocabulary.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
    ends, place = (lengths - 1).unique(return_inverse=True)
    output = model(input_ids=ids, attention_mask=mask.long(), logits_to_keep=ends, use_cache=False)
    return output.logits[torch.arange(len(ids), device=model.device), place].float().log_softmax(dim=-1)


def surface_forms(choice: str) -> list[str]:
    """How an answer may be written: as it is, and a word of several letters in other cases; with a space before it.

    A single letter keeps its case: "a" would be an article more often than the answer A.
    """
    cases = [choice, choice.lower(), choice.capitalize(), choice.upper()] if len(choice) > 1 else [choice]
    return [space + word for word in dict.fromkeys(cases) for space in ("", " ")]


def first_tokens(tokenizer: PreTrainedTokenizerBase, choices: Sequence[str]) -> list[list[int]]:
    """For each choice the distinct tokens of its `surface_forms` that are one token; the first tokens if none is.

    The Y of a YES that is cut begins other words too, so it counts only where nothing better is there. Tokens of
    whitespace alone and unknown words are left out.

    Raises:
        ValueError: two choices may begin with the same token, or the tokenizer does not know one.
    """
    found: list[list[int]] = []
    for choice in choices:
        forms = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in surface_forms(choice.strip())]
        known = [ids for ids in forms if ids and ids[0] != tokenizer.unk_token_id and _is_text(tokenizer, ids[0])]
        if not known or not choice.strip():
            raise ValueError(f"the choice {choice!r} is no text that the judge's tokenizer knows: take another word")
        whole = {ids[0] for ids in known if len(ids) == 1}
        found.append(sorted(whole or {ids[0] for ids in known}))
    for (one, ones), (other, others) in combinations(zip(choices, found, strict=True), 2):
        shared = set(ones) & set(others)
        if shared:
            token = tokenizer.decode([min(shared)])
            raise ValueError(
                f"the choices {one!r} and {other!r} both begin with the token {token!r}, so that the first token of an "
                "answer does not tell them apart: take words that begin differently, such as the letters A, B, C"
            )
    return found


def _is_text(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return bool(str(tokenizer.decode([token])).strip())
