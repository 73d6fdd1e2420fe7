"""A step's score is the sum of the rewards of its tokens, whatever stands around it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_kit.data.outcomes import encode_row
from rlhf_kit.errors import RunError
from rlhf_kit.evals.steps import Solution
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.loading import load_tokenizer
from rlhf_kit.models.tokenizers import word_level_tokenizer
from rlhf_kit.trainers.config import Reward
from rlhf_kit.trainers.reward import run_reward
from rlhf_kit.trainers.setup import StageRun
from rlhf_kit.trainers.step_detection import detect_first_errors, step_scores, without_evaluated_problems

SUMS = {"type": "running_sums", "size": 1}
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}think {% endif %}{{ m['content'] | trim }}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}{% endif %}"
)


def stage(path: str | Path = "x.json", separator: str = "\n", **fields: Any) -> Reward:
    settings = {"type": "reward", "model": {"path": "x"}, "data": SUMS}
    evaluation = {"path": str(path), "separator": separator}
    return Reward.model_validate({**settings, "step_evaluation": evaluation, **fields})


def byte_level(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, as GPT-2's, trained on `texts`: it merges separators and spaces into words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def positions(tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[..., torch.Tensor], list[list[str]]]:
    """A scorer that gives token t the reward 2**t, so that a sum tells which tokens it is of; and the tokens."""
    seen: list[list[str]] = []

    def token_rewards(rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        (row,) = rows
        seen.append([tokenizer.decode([token]) for token in row["completion_ids"]])
        return 2.0 ** torch.arange(len(row["completion_ids"]), dtype=torch.float32)[None]

    return token_rewards, seen


def tokens_of(score: float) -> list[int]:
    return [t for t in range(60) if int(score) >> t & 1]


@pytest.mark.parametrize("separator", ["\n", "\n\n", " ; "])
@pytest.mark.parametrize("last", ["It is!", "Café ☕ 42"])
def test_a_token_is_of_the_step_that_holds_its_last_character_and_the_end_token_of_none(separator, last) -> None:
    steps = ("First 12 + 30.", "So it is 42.", last)
    tokenizer = byte_level([separator.join(steps), "1 + 1"])
    rewards, seen = positions(tokenizer)
    (scores,) = step_scores(stage(separator=separator), rewards, tokenizer, [Solution("1 + 1", steps, -1)])
    lengths = [len((step + separator).encode()) for step in steps]
    pieces = [piece for step in steps for piece in (step, separator)][:-1]
    ids = tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    expected: list[list[int]] = [[], [], []]
    read = 0
    for position, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        read += len(token)  # one character a byte
        step = next(k for k in range(3) if read - 1 < sum(lengths[: k + 1]))
        expected[step].append(position)
    assert seen[0][-1] == "<eos>" and len(seen[0]) == len(ids) + 1
    assert [tokens_of(score) for score in scores] == expected
    assert any(len(token) > 1 for token in tokenizer.convert_ids_to_tokens(ids))


def test_steps_of_single_tokens_by_hand() -> None:
    tokenizer = word_level_tokenizer(["1", "2", "3", "+", "step", ";"])
    rewards, seen = positions(tokenizer)
    solutions = [Solution("1 + 1", ("step 1", "2 2 2", "3"), 1), Solution("1", ("1",), -1)]
    scores = step_scores(stage(separator=" ; "), rewards, tokenizer, solutions)
    assert seen[0] == ["step", "1", ";", "2", "2", "2", ";", "3", "<eos>"]
    assert scores == [[1 + 2 + 4, 8 + 16 + 32 + 64, 128], [1]]


def test_words_that_the_tokenizer_does_not_know_keep_their_place() -> None:
    tokenizer = word_level_tokenizer(["1", "2"])
    rewards, _ = positions(tokenizer)
    scores = step_scores(stage(), rewards, tokenizer, [Solution("1", ("unheard of", "2", "of"), -1)])
    assert scores == [[1 + 2, 4, 8]]


def test_what_the_chat_template_writes_around_an_answer_is_in_no_step() -> None:
    tokenizer = word_level_tokenizer(["1", "2", "3", "+", "think"])
    tokenizer.chat_template = CHAT
    rewards, seen = positions(tokenizer)
    given = stage(data={**SUMS, "chat": True})
    scores = step_scores(given, rewards, tokenizer, [Solution("1 + 1", (" 1 2", "3 3 "), -1)])
    assert seen[0] == ["think", "1", "2", "3", "3", "<eos>"]
    assert scores == [[2 + 4, 8 + 16]]


def test_a_template_that_rewrites_the_answer_is_an_error() -> None:
    tokenizer = word_level_tokenizer(["1", "2"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | replace('1', '2') }}{% endfor %}"
    rewards, _ = positions(tokenizer)
    with pytest.raises(ValueError, match="the chat template changes an answer"):
        step_scores(stage(data={**SUMS, "chat": True}), rewards, tokenizer, [Solution("2", ("1", "1"), -1)])


def test_the_prompt_is_that_of_the_training_data() -> None:
    tokenizer = word_level_tokenizer(["1", "=", "+", "Q"])
    prompts = []

    def token_rewards(rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        prompts.append(tokenizer.decode(rows[0]["prompt_ids"]))
        return torch.zeros(1, len(rows[0]["completion_ids"]))

    given = stage(data={**SUMS, "prompt_template": "Q {prompt} ="})
    step_scores(given, token_rewards, tokenizer, [Solution("1 + 1", ("1",), -1)])
    assert prompts == ["Q 1 + 1 ="]


# --- what is not learnt ---


def test_rows_of_problems_that_are_judged_are_not_learnt(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    judged = [{"problem": "1 + 1\nis", "steps": ["2"], "label": -1}, {"problem": "2", "steps": ["1"], "label": 0}]
    path.write_text(json.dumps(judged))
    text = Dataset.from_list([{"prompt": prompt, "n": n} for n, prompt in enumerate(["1 + 1  is", "1 + 2", "2", "3"])])
    assert without_evaluated_problems(stage(path), text)["n"][:] == [1, 3]
    chat = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in ("2", "1 + 1 is", "5")]
    kept = without_evaluated_problems(stage(path, data={**SUMS, "chat": True}), Dataset.from_list(chat))
    assert kept.to_list() == chat[2:]
    template = {**SUMS, "prompt_template": "Q: {prompt}"}
    asked = Dataset.from_list([{"prompt": "2"}, {"prompt": "Q: 2"}])
    assert without_evaluated_problems(stage(path, data=template), asked).to_list() == [{"prompt": "2"}]
    with pytest.raises(RunError, match=r"all 1 training rows are of problems that step_evaluation judges"):
        without_evaluated_problems(stage(path), Dataset.from_list([{"prompt": "2"}]))


# --- the whole evaluation ---


@pytest.fixture
def processbench(tmp_path: Path) -> Path:
    """20 solutions of 3 steps; every other one is wrong from its second step on, where it says 4."""
    rows = []
    for number in range(20):
        wrong = number % 2 == 1
        problem = " ".join(str(number // 4**k % 4) for k in range(3)) + " ="
        rows.append({"problem": problem, "steps": ["1 2", "4 4" if wrong else "1", "3"], "label": 1 if wrong else -1})
    path = tmp_path / "gsm8k.json"
    path.write_text(json.dumps(rows))
    return path


def test_the_report_finds_a_scorer_that_knows(processbench: Path, tmp_path: Path) -> None:
    tokenizer = word_level_tokenizer(["0", "1", "2", "3", "4", "="])
    four = tokenizer.convert_tokens_to_ids("4")

    def token_rewards(rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        return -(torch.tensor([rows[0]["completion_ids"]]) == four).float()

    report = detect_first_errors(stage(processbench), token_rewards, tokenizer, tmp_path)
    assert report["prm"]["f1"] == report["prm"]["step_auc"] == 1.0
    assert report["prm"]["result"] == {"error_accuracy": 1.0, "correct_accuracy": 1.0}
    assert report["prm"]["count"] == 10 and -2 < report["prm"]["threshold"] < 0
    assert set(report) == {"prm", "chance", "length", "position"}
    assert all(set(entry) == set(report["prm"]) for entry in report.values())
    assert report["chance"]["f1"] < 1.0
    json.dumps(report)
    lines = [json.loads(line) for line in (tmp_path / "step_scores.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert all(line["scores"] == ([0.0, -2.0, 0.0] if line["label"] == 1 else [0.0, 0.0, 0.0]) for line in lines)


@pytest.mark.parametrize("objective", ["ce", "dpo"])
def test_step_scores_of_a_stage_sum_to_the_log_ratio_of_the_steps(
    processbench: Path, tmp_path: Path, policy_path: str, objective: str
) -> None:
    row = {"prompt": "1 =", "completion": "1", "label": True, "chosen": "1", "rejected": "2"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "label": False}))
    args = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 3e-2, "gradient_checkpointing": False}
    given = Reward.model_validate(
        {
            "type": "reward",
            "model": {"path": policy_path},
            "objective": objective,
            "beta": 0.5,
            "data": {"type": "jsonl", "path": str(tmp_path / "rows.jsonl")},
            "step_evaluation": {"path": str(processbench), "separator": "\n"},
            "trainer": {"args": args},
        }
    )
    results = run_reward(given, StageRun(tmp_path / "run"))
    assert results["step_detection"]["prm"]["count"] == 10
    json.dumps(results)
    lines = [json.loads(line) for line in (tmp_path / "run" / "step_scores.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(Pretrained(path=policy_path))
    log_probs = []
    for path in (str(tmp_path / "run" / "model"), policy_path):
        model = AutoModelForCausalLM.from_pretrained(path)
        encoded = encode_row(tokenizer, lines[0]["problem"], "1 2\n4 4\n3" if lines[0]["label"] == 1 else "1 2\n1\n3")
        ids = torch.tensor([encoded["prompt_ids"] + encoded["completion_ids"]])
        with torch.no_grad():
            logits = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)
        start = len(encoded["prompt_ids"])
        log_probs.append([logits[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1] - 1)])  # less <eos>
    expected = [0.5 * (phi - ref) for phi, ref in zip(*log_probs, strict=True)]
    second = 4 if lines[0]["label"] == 1 else 3
    by_hand = [sum(expected[:2]), sum(expected[2:second]), sum(expected[second:])]
    assert max(map(abs, by_hand)) > 1e-3
    assert lines[0]["scores"] == pytest.approx(by_hand, abs=1e-5)
