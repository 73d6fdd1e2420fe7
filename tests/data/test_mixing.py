import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from rlhf_kit.data.config import DataConfig
from rlhf_kit.data.load import load_data
from rlhf_kit.data.mixing import with_replay


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
    say = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    new = [{"prompt": say("a"), "chosen": say("b")}]
    mixture = with_replay(new, [*new, {"prompt": say("c"), "chosen": say("d")}], 0.5)
    assert [row["prompt"] for row in mixture] == [say("a"), say("c")]


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
