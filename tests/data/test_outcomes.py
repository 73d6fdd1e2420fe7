"""Outcome rows become the ids that generation would have seen and sampled."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from rlhf_kit.data.load import Origins
from rlhf_kit.data.outcomes import (
    RowEncoder,
    check_aligned,
    collate_outcomes,
    encode_outcomes,
    encode_row,
    render_row,
)
from rlhf_kit.errors import RunError
from rlhf_kit.models.generation import encode_prompts
from rlhf_kit.models.tokenizers import word_level_tokenizer
from rlhf_kit.objectives.cut import Cut
from rlhf_kit.trainers.offline import objective_rows, trl_rows, with_sampled_ids

# The usual form: a turn ends with an end token and a line break.
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
PROMPT = [{"role": "user", "content": "1 + 1"}]
ANSWER = [{"role": "assistant", "content": "2"}]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words of a small dialogue."""
    return word_level_tokenizer(["user", "assistant", "system", ":", "+", "1", "2", "="])


def words(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_text_is_encoded_in_two_parts_and_closed(tokenizer) -> None:
    row = encode_row(tokenizer, "1 + 1 =", "2")
    assert words(tokenizer, row["prompt_ids"]) == "1 + 1 ="
    assert words(tokenizer, row["completion_ids"]) == "2 <eos>"


def test_a_completion_that_is_closed_is_not_closed_twice(tokenizer) -> None:
    assert words(tokenizer, encode_row(tokenizer, "1 =", "1<eos>")["completion_ids"]) == "1 <eos>"


def test_an_unknown_word_or_nothing_at_all_is_no_end(tokenizer) -> None:
    assert words(tokenizer, encode_row(tokenizer, "1 =", "never")["completion_ids"]) == "<unk> <eos>"
    assert words(tokenizer, encode_row(tokenizer, "1 =", "")["completion_ids"]) == "<eos>"


@pytest.mark.parametrize("prompt", ["1 =", PROMPT])
def test_ids_that_spell_the_completion_stay_and_others_do_not(tokenizer, prompt) -> None:
    """A cut completion has no end, and an end does not show in the text; ids of another vocabulary say other words."""
    tokenizer.chat_template = CHAT
    completion = "1 2" if isinstance(prompt, str) else [{"role": "assistant", "content": "1 2"}]
    one, two, plus, end = tokenizer.convert_tokens_to_ids(["1", "2", "+", "<eos>"])
    own = encode_row(tokenizer, prompt, completion)["completion_ids"]
    assert own == [one, two, end]
    encoder = RowEncoder(tokenizer)
    for ids in ([one, two], [one, two, end], [one, end, two]):
        assert encoder(prompt, completion, ids)["completion_ids"] == ids
    assert (encoder.sampled, encoder.foreign) == (3, 0)
    for ids in ([one, plus], [one], [], [one, two, len(tokenizer)], [one, two, -1], [10**9]):
        assert encoder(prompt, completion, ids)["completion_ids"] == own
    assert encoder(prompt, completion)["completion_ids"] == own
    assert (encoder.sampled, encoder.foreign) == (9, 6)


def test_foreign_ids_are_counted_in_one_warning(tokenizer, caplog) -> None:
    rows = [{"prompt": "1", "completion": "2", "completion_ids": ids, "label": 1} for ids in ([0], None, [1], [0])]
    rows[2]["completion_ids"] = encode_row(tokenizer, "1", "2")["completion_ids"]
    assert len({tuple(row["completion_ids"]) for row in encode_outcomes(rows, tokenizer)}) == 1
    (record,) = caplog.records
    assert "2 of 3 completions" in record.message


def test_the_completion_does_not_merge_with_the_prompt() -> None:
    """A tokenizer that would read `1` and `2` as one word reads them as it would have sampled them."""
    tokenizer = word_level_tokenizer(["1", "2", "12"])
    row = encode_row(tokenizer, "1", "2")
    assert words(tokenizer, row["prompt_ids"]) == "1"
    assert words(tokenizer, row["completion_ids"]) == "2 <eos>"


@pytest.mark.parametrize("completion", ["2", ANSWER])
def test_a_conversation_is_rendered_and_ends_with_the_end_of_its_turn(tokenizer, completion) -> None:
    tokenizer.chat_template = CHAT
    row = encode_row(tokenizer, PROMPT, completion)
    assert words(tokenizer, row["prompt_ids"]) == "user : 1 + 1 <eos> assistant :"
    assert words(tokenizer, row["completion_ids"]) == "2 <eos>"
    assert render_row(tokenizer, PROMPT, completion)[1] == "2<eos>"  # without the line break


def test_a_turn_without_an_end_token_is_closed_by_the_end_of_sequence(tokenizer) -> None:
    tokenizer.chat_template = CHAT.replace("<eos>", "")
    assert words(tokenizer, encode_row(tokenizer, PROMPT, "2")["completion_ids"]) == "2 <eos>"


@pytest.mark.parametrize("prompt", ["1 + 1 =", PROMPT])
def test_the_prompt_is_what_generation_sees(tokenizer, prompt) -> None:
    tokenizer.chat_template = CHAT
    seen = encode_prompts(tokenizer, [prompt])["input_ids"][0].tolist()
    assert encode_row(tokenizer, prompt, "2")["prompt_ids"] == seen


def test_a_template_that_changes_the_prompt_is_an_error(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages | length }} " + CHAT
    with pytest.raises(ValueError, match=r"renders a prompt differently once an answer follows.*chat_template"):
        encode_row(tokenizer, PROMPT, "2")


def test_rows_keep_their_order_and_their_labels_as_numbers(tokenizer) -> None:
    rows = [{"prompt": "1 =", "completion": "1", "label": True}, {"prompt": "2 =", "completion": "1 1", "label": False}]
    encoded = encode_outcomes(rows, tokenizer)
    assert encoded["label"][:] == [1.0, 0.0]
    assert encoded["length"][:] == [4, 5]
    assert [words(tokenizer, ids) for ids in encoded["completion_ids"]] == ["1 <eos>", "1 1 <eos>"]


def test_a_batch_is_padded_on_the_outside() -> None:
    rows = [
        {"prompt_ids": [5], "completion_ids": [6, 7, 2], "label": 1.0, "offset": 0.5},
        {"prompt_ids": [5, 8, 9], "completion_ids": [0], "label": 0.0, "offset": -1.0},
    ]
    batch = collate_outcomes(rows, pad_token_id=0)
    assert batch["prompt_ids"].tolist() == [[0, 0, 5], [5, 8, 9]]
    assert batch["prompt_mask"].tolist() == [[False, False, True], [True, True, True]]
    assert batch["completion_ids"].tolist() == [[6, 7, 2], [0, 0, 0]]
    # A token that happens to be the padding's id counts all the same.
    assert batch["completion_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["label"].tolist() == [1.0, 0.0] and batch["offset"].tolist() == [0.5, -1.0]
    assert batch["label"].dtype == torch.float32 and batch["prompt_mask"].dtype == torch.bool


def test_a_batch_without_labels_has_none() -> None:
    batch = collate_outcomes([{"prompt_ids": [5], "completion_ids": []}], pad_token_id=0)
    assert set(batch) == {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"}
    assert batch["completion_ids"].shape == (1, 0) and batch["completion_ids"].dtype == torch.int64


def test_what_was_sampled_is_what_is_learnt_from(tokenizer) -> None:
    ids = tokenizer.convert_tokens_to_ids(["2", "2"])
    rows = [{"prompt": "1 =", "completion": "2 2", "completion_ids": ids, "label": True}]
    (row,) = encode_outcomes(rows, tokenizer)
    assert row["completion_ids"] == ids  # no end token: the completion was cut off
    assert row["length"] == len(row["prompt_ids"]) + 2


TOOLS = [{"type": "function", "function": {"name": "2"}}]
WITH_TOOLS = "{% if tools %}system : {{ tools[0].function.name }}<eos>\n{% endif %}" + CHAT


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_the_template_is_told_of_a_rows_tools(tokenizer, tools) -> None:
    tokenizer.chat_template = WITH_TOOLS
    row = encode_row(tokenizer, PROMPT, ANSWER, tools=tools)
    assert words(tokenizer, row["prompt_ids"]) == "system : 2 <eos> user : 1 + 1 <eos> assistant :"
    assert words(tokenizer, row["completion_ids"]) == "2 <eos>"
    labelled = {"prompt": PROMPT, "completion": ANSWER, "label": True}
    first, second = encode_outcomes([{**labelled, "tools": tools}, {**labelled, "tools": None}], tokenizer)
    assert first["prompt_ids"] == row["prompt_ids"]
    assert second["prompt_ids"] == encode_row(tokenizer, PROMPT, ANSWER)["prompt_ids"]


def test_tools_reach_every_form_of_rows(tokenizer) -> None:
    tokenizer.chat_template = WITH_TOOLS
    row = {"prompt": PROMPT, "chosen": ANSWER, "rejected": ANSWER, "tools": TOOLS, "score": 1}
    data = Dataset.from_list([row])
    data = data.select_columns(with_sampled_ids(("prompt", "chosen", "rejected"), data))
    expected = encode_row(tokenizer, PROMPT, ANSWER, tools=TOOLS)["prompt_ids"]
    assert trl_rows(data, tokenizer, Origins("rows", [0]))["prompt_ids"][:] == [expected]
    single = Dataset.from_list([{"prompt": PROMPT, "judged_prompt": PROMPT, "completion": ANSWER, "tools": TOOLS}])
    (encoded,) = objective_rows(single, Cut(type="cut"), tokenizer, Origins("rows", [0]))
    assert encoded["plain.prompt_ids"] == encoded["judged.prompt_ids"] == expected


@pytest.mark.parametrize("tools", [None, [], "[]", "null"])
def test_no_tools_are_not_spoken_of(tokenizer, tools) -> None:
    tokenizer.chat_template = WITH_TOOLS.replace("if tools", "if tools is not none")
    assert words(tokenizer, encode_row(tokenizer, PROMPT, ANSWER, tools=tools)["prompt_ids"]).startswith("user")


def test_a_completion_with_other_tokens_behind_another_prompt_is_refused() -> None:
    roles = {"plain": ("prompt", "completion"), "judged": ("judged_prompt", "completion"), "other": ("prompt", "gold")}
    encoded = {"plain.completion_ids": [4, 2], "judged.completion_ids": [4, 2], "other.completion_ids": [5]}
    check_aligned(encoded, roles)
    for ids in ([4, 3], [4, 2, 2]):
        with pytest.raises(
            ValueError, match=r"'completion' has other tokens behind 'judged_prompt' \(\d\) than behind"
        ):
            check_aligned({**encoded, "judged.completion_ids": ids}, roles)


def test_a_template_that_writes_the_answer_by_the_prompt_is_refused_with_the_row(tokenizer) -> None:
    """Behind a prompt that says 2, this template writes the answer twice."""
    answer = "{{ messages[-1]['content'] }}"
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }} :"
        f"{{% if not add_generation_prompt %}} {answer}{{% if '2' in messages[0]['content'] %}} {answer}{{% endif %}}"
        "<eos>{% endif %}"
    )
    rows = [
        {"prompt": PROMPT, "judged_prompt": [{"role": "user", "content": judged}], "completion": ANSWER}
        for judged in ("1", "1 + 2")
    ]
    with pytest.raises(RunError, match="rows, row 8: 'completion' has other tokens behind 'judged_prompt'"):
        objective_rows(Dataset.from_list(rows), Cut(type="cut"), tokenizer, Origins("rows", [3, 7]))
