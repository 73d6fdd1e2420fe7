"""A completion ends with the token that completes a stop string: that is an end, and nothing behind it is an action."""

from __future__ import annotations

import pytest
import torch

from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.models.stopping import ends_with_stop_string, generate_until
from rlhf_kit.models.tokenizers import word_level_tokenizer
from rlhf_kit.trainers.run_ppo import ppo_args
from rlhf_kit.trainers.setup import StageRun

LENGTH = 8
LORA = {"type": "lora", "r": 2}


@pytest.fixture
def padded_with_its_end_token(policy_path, tmp_path) -> str:
    """Folder of the policy with one token for padding and ends, as many models have."""
    folder = tmp_path / "padded"
    tokenizer = load_tokenizer(Pretrained(path=policy_path))
    tokenizer.pad_token = tokenizer.eos_token
    load_model(Pretrained(path=policy_path)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rollout_of(build, stop_strings, model=None):
    """A trainer after a rollout whose cut-off rows are masked, its rows, and the texts that the reward saw."""
    seen = []

    def count(completions, **_):
        seen.append(list(completions))
        return [float(len(text)) for text in completions]

    trainer = build(
        functions={"count": count},
        rewards=[{"type": "function", "function": "count"}],
        credit={"estimator": "reinforce"},
        truncation={"policy": "mask"},
        stop_strings=stop_strings,
        model=model,
        args={"max_steps": 1, "max_completion_length": LENGTH, "per_device_train_batch_size": 32},
    )
    trainer.train()
    ((rows,), (texts,)) = trainer.samples, seen
    return trainer, rows, texts


def assert_ends(trainer, rows, texts, stop_strings):
    """Each row ended at its first stop string or end token, or at the length limit; only the last are masked."""
    (batch,) = trainer.batches
    tokenizer, kinds = trainer.processing_class, []
    ids_of_rows = zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    for (ids, mask), row, text, tool_mask in zip(ids_of_rows, rows, texts, batch["tool_mask"], strict=True):
        tokens = tokenizer.convert_ids_to_tokens(ids[mask])
        assert len(row["tokens"]) == len(tokens)
        assert text == row["completion"] == " ".join(token for token in tokens if not token.startswith("<"))
        # The definition: read token by token until a stop string is there.
        end = next(
            (n for n in range(1, len(tokens) + 1) if any(stop in " ".join(tokens[:n]) for stop in stop_strings)), None
        )
        if end is not None:
            assert len(tokens) == end and text.endswith(tuple(stop_strings))
            kinds.append("stopped")
        elif tokens[-1] == "<eos>":
            assert "<eos>" not in tokens[:-1]
            kinds.append("ended")
        else:
            assert len(tokens) == LENGTH
            kinds.append("cut off")
        live = mask & (kinds[-1] != "cut off")
        assert torch.equal(mask & tool_mask.bool(), live)
    assert set(kinds) == {"stopped", "ended", "cut off"}, "the rollout shows not all cases"
    lengths = {len(row["tokens"]) for row, kind in zip(rows, kinds, strict=True) if kind == "stopped"}
    assert len(lengths) > 1
    return kinds


@pytest.mark.parametrize("peft", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("stop_strings", [["2"], ["1 1", "0 2", "3 4"], ["2", "4 1"]], ids=" | ".join)
def test_a_row_ends_at_its_first_stop_string_and_is_not_cut_off(stop_strings, peft, build) -> None:
    assert_ends(*rollout_of(build, stop_strings, {"peft": peft}), stop_strings)


def test_padding_behind_a_stop_string_is_no_end_token(build, padded_with_its_end_token) -> None:
    trainer, rows, texts = rollout_of(build, ["2"], {"path": padded_with_its_end_token})
    assert trainer.processing_class.pad_token == "<eos>"
    kinds = assert_ends(trainer, rows, texts, ["2"])
    for row, kind in zip(rows, kinds, strict=True):
        assert (row["tokens"][-1] == "<eos>") == (kind == "ended")


def test_the_log_counts_only_rows_at_the_length_limit_as_clipped(build, logged) -> None:
    trainer, rows, texts = rollout_of(build, ["2"])
    kinds = assert_ends(trainer, rows, texts, ["2"])
    lengths = [len(row["tokens"]) for row, kind in zip(rows, kinds, strict=True) if kind != "cut off"]
    (entry,) = logged(trainer)
    assert entry["completions/clipped_ratio"] == pytest.approx(kinds.count("cut off") / len(kinds))
    assert entry["completions/mean_terminated_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert entry["completions/min_terminated_length"] == min(lengths)
    assert entry["completions/max_terminated_length"] == max(lengths)


def test_a_stop_string_in_the_prompt_ends_nothing(build) -> None:
    _, rows, _ = rollout_of(build, ["= 0 0", "=", "1 3"])
    assert all("=" in row["prompt"] for row in rows)
    assert max(len(row["tokens"]) for row in rows) == LENGTH


# -- parts -------------------------------------------------------------------------------------------------------------

WORDS = ["1", "10", "2", "21", "3"]


@pytest.mark.parametrize(
    ("text", "stop_strings", "expected"),
    [
        ("2 1", ["1"], True),
        ("2 10", ["1"], True),  # the token is longer than the stop string
        ("2 10", ["2 1"], True),  # several tokens, and more of the last behind them
        ("2 10", ["0"], True),
        ("2 10", ["3", "2 10"], True),
        ("1 2", ["1"], False),  # completed earlier
        ("2 3", ["1"], False),
        ("21 3", ["2 1"], False),
        ("", ["1"], False),
        ("1", [], False),
    ],
)
def test_the_last_token_completes_a_stop_string(text, stop_strings, expected) -> None:
    tokenizer = word_level_tokenizer(WORDS)
    assert ends_with_stop_string(tokenizer, tokenizer(text)["input_ids"], stop_strings) is expected


def test_a_long_completion_is_read_from_its_end() -> None:
    tokenizer = word_level_tokenizer(WORDS)
    ids = tokenizer("3 " * 500 + "2 10")["input_ids"]
    assert ends_with_stop_string(tokenizer, ids, ["3 3 3 2 1"])
    assert not ends_with_stop_string(tokenizer, ids[:-1], ["3 3 3 2 1"])


def test_generation_stops_where_a_token_is_longer_than_the_stop_string() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Scratch.model_validate({"type": "scratch", "vocabulary": WORDS, **sizes})
    model, tokenizer = load_model(config).eval(), load_tokenizer(config)
    inputs = tokenizer(["1 2 3"] * 64, return_tensors="pt")
    fields = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    output = generate_until(
        model.generate, tokenizer, ["1"], **fields, max_new_tokens=6, do_sample=True, pad_token_id=0, eos_token_id=2
    )
    ends = set()
    for ids in output[:, 3:].tolist():
        words = tokenizer.convert_ids_to_tokens(ids)
        first = next((n for n, word in enumerate(words) if "1" in word), None)
        if first is not None and "<eos>" not in words[:first]:
            ends.add(words[first])
            assert set(words[first + 1 :]) <= {"<pad>"}
    assert ends == {"1", "10", "21"}


def test_vllm_is_told_by_its_own_name_for_them(stage, tmp_path) -> None:
    given = stage(stop_strings=["2", "4 1"], args={"use_vllm": True, "generation_kwargs": {"seed": 3}})
    assert ppo_args(given, StageRun(tmp_path)).generation_kwargs == {"stop": ["2", "4 1"], "seed": 3}
