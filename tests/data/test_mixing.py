import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from rlhf_kit.data.config import DataConfig
from rlhf_kit.data.load import load_data, load_with_origins
from rlhf_kit.data.mixing import with_replay
from rlhf_kit.models.tokenizers import word_level_tokenizer
from rlhf_kit.trainers.offline import trl_rows


def pairs(prompts, **columns):
    return [{"prompt": f"p{number}", "chosen": "+", "rejected": "-", **columns} for number in prompts]


@given(st.integers(1, 40), st.integers(0, 60), st.floats(0.05, 0.9), st.integers(0, 5))
def test_the_share_is_met_while_there_are_rows_of_other_prompts(count, older, share, seed):
    new = pairs(range(count), score=1.0)
    replay = pairs(range(count + older), source="human")
    if older == 0:
        with pytest.raises(ValueError, match="also a new one"):
            with_replay(new, replay, share, seed)
        return
    mixture = with_replay(new, replay, share, seed)
    drawn = mixture[count:]
    assert mixture[:count] == pairs(range(count))  # with the columns that both have
    assert len(drawn) == min(round(count * share / (1 - share)), older)
    prompts = Counter(row["prompt"] for row in mixture)
    assert set(prompts.values()) == {1}
    assert mixture == with_replay(new, replay, share, seed)


def test_another_seed_draws_others():
    new, replay = pairs(range(20)), pairs(range(20, 80))
    assert with_replay(new, replay, 0.5, 1) != with_replay(new, replay, 0.5, 2)


def test_messages_are_told_apart_by_what_they_say():
    new = [{"prompt": say(("user", "a")), "chosen": say(("assistant", "b"))}]
    mixture = with_replay(new, [*new, {"prompt": say(("user", "c")), "chosen": say(("assistant", "d"))}], 0.5)
    assert [row["prompt"] for row in mixture] == [say(("user", "a")), say(("user", "c"))]


def say(*said):
    return [{"role": role, "content": content} for role, content in said]


ONE = say(("user", "Tea?"))
FORMS = [
    ONE,
    "Tea?",
    " Tea?\n",
    [{**ONE[0], "name": None}],
    [{**ONE[0], "content": [{"type": "text", "text": "Tea?"}]}],
    say(("system", "Be kind."), ("user", "Tea?")),
    say(("developer", "Be brief."), ("user", "Tea?")),
    "\n\nHuman: Tea?\n\nAssistant:",
]
OTHERS = [
    "Tea",
    say(("user", "Tea"), ("user", "?")),
    say(("assistant", "Tea?")),
    say(("system", "Tea?")),
    say(("user", "Tea?"), ("assistant", "No."), ("user", "Gin?")),
    "\n\nHuman: Tea?\n\nAssistant: No.\n\nHuman: Gin?\n\nAssistant:",
]


@pytest.mark.parametrize("new", FORMS)
@pytest.mark.parametrize("older", FORMS)
def test_a_prompt_in_another_form_is_the_same_prompt(new, older):
    with pytest.raises(ValueError, match="also a new one"):
        with_replay([{"prompt": new, "chosen": "+"}], [{"prompt": older, "chosen": "+"}], 0.5)


@pytest.mark.parametrize("new", FORMS)
@pytest.mark.parametrize("older", OTHERS)
def test_another_prompt_is_replayed(new, older):
    assert len(with_replay([{"prompt": new, "chosen": "+"}], [{"prompt": older, "chosen": "+"}], 0.5)) == 2


def test_where_only_the_system_speaks_its_words_are_the_prompt():
    tea, gin = say(("system", "Tea?")), say(("system", "Gin?"))
    assert len(with_replay([{"prompt": tea, "chosen": "+"}], [{"prompt": gin, "chosen": "+"}], 0.5)) == 2


@pytest.mark.parametrize("newer", [True, False])
def test_sampled_ids_are_kept_and_rows_without_are_null(newer):
    sampled, written = pairs([1], chosen_ids=[5], rejected_ids=[6, 7], completion_ids=[8]), pairs([2], chosen_ids=None)
    mixture = with_replay(*((sampled, written) if newer else (written, sampled)), 0.5)
    expected = {"p1": ([5], [6, 7]), "p2": (None, None)}
    assert [row["prompt"] for row in mixture] == (["p1", "p2"] if newer else ["p2", "p1"])
    for row in mixture:
        assert (row["chosen_ids"], row["rejected_ids"]) == expected[row["prompt"]]
        assert set(row) == {"prompt", "chosen", "rejected", "chosen_ids", "rejected_ids"}  # there is no completion


@pytest.mark.parametrize("together", ["mixed", "concatenated"])
def test_rows_without_ids_are_encoded_from_their_text(together, tmp_path):
    tokenizer = word_level_tokenizer(["a", "b", "+", "-"])
    new, old = tmp_path / "new.jsonl", tmp_path / "old.jsonl"
    new.write_text(
        json.dumps({"prompt": "a", "chosen": "+", "rejected": "-", "chosen_ids": tokenizer("+")["input_ids"]})
    )
    old.write_text(json.dumps({"prompt": "b", "chosen": "+", "rejected": "-"}))
    sets = [{"type": "jsonl", "path": str(path)} for path in (new, old)]
    parts = {"rows": sets[0], "replay": sets[1]} if together == "mixed" else {"sets": sets}
    data, origins = load_with_origins(TypeAdapter(DataConfig).validate_python({"type": together, **parts}))
    assert [row["chosen_ids"] is None for row in data] == [False, True]
    rows = trl_rows(data, tokenizer, origins).to_list()
    assert [tokenizer.convert_ids_to_tokens(row["chosen_ids"]) for row in rows] == [["+"], ["+", "<eos>"]]
    assert [tokenizer.convert_ids_to_tokens(row["rejected_ids"]) for row in rows] == [["-", "<eos>"]] * 2


def test_rows_that_share_no_columns_cannot_be_mixed():
    with pytest.raises(ValueError, match="the rows have prompt, chosen, those to replay prompt, completion"):
        with_replay([{"prompt": "a", "chosen": "b"}], [{"prompt": "a", "completion": "b"}], 0.5)


def test_mixed_data_are_read_from_two_places(tmp_path):
    new, old = tmp_path / "new.jsonl", tmp_path / "old.jsonl"
    new.write_text("\n".join(map(json.dumps, pairs(range(4)))))
    old.write_text("\n".join(map(json.dumps, pairs(range(2, 30)))))
    config = {
        "type": "mixed",
        "rows": {"type": "jsonl", "path": str(new)},
        "replay": {"type": "jsonl", "path": str(old), "limit": 20},
        "share": 0.6,
    }
    data = load_data(TypeAdapter(DataConfig).validate_python(config))
    assert data.column_names == ["prompt", "chosen", "rejected"]
    assert data["prompt"][:4] == ["p0", "p1", "p2", "p3"]
    assert len(data) == 10
    assert set(data["prompt"][4:]) <= {f"p{number}" for number in range(4, 22)}
