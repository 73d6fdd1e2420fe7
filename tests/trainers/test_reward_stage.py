"""The `reward` stage trains a PRM on outcomes by every objective, and says what it is compared with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

from rlhf_kit.data.config import Sampled
from rlhf_kit.data.load import load_data
from rlhf_kit.data.outcomes import collate_outcomes, encode_row
from rlhf_kit.errors import RunError
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.generation import generate_ids
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.models.scorer import Scorer, add_log_prob_head, token_outputs
from rlhf_kit.trainers import sampling
from rlhf_kit.trainers.config import Reward
from rlhf_kit.trainers.reward import TrainedPrm, held_out, peer_rates, run_reward, token_rewards
from rlhf_kit.trainers.setup import StageRun

BETA = 0.5
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }} {% else %}"
    "{% generation %}{{ m['content'] }}<eos>{% endgeneration %}{% endif %}{% endfor %}"
)
LORA = {"type": "lora", "r": 4}


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A separable set: right completions repeat the prompt's number, wrong ones are always `4 4`."""

    def make(paired: bool = False, **fields: Any) -> dict[str, Any]:
        path = tmp_path / f"rows-{paired}.jsonl"
        content = []
        for number in range(4):
            prompt, right, wrong = f"{number} =", f"{number} {number}", "4 4"
            if paired:
                content.append({"prompt": prompt, "chosen": right, "rejected": wrong})
            else:
                content.append({"prompt": prompt, "completion": right, "label": True})
                content.append({"prompt": prompt, "completion": wrong, "label": False})
        path.write_text("\n".join(map(json.dumps, content)))
        return {"type": "jsonl", "path": str(path), **fields}

    return make


@pytest.fixture
def stage(policy_path: str) -> Callable[..., Reward]:
    """A `reward` stage on the tiny policy; `args` are those of its trainer."""

    def make(data: dict[str, Any], args: dict[str, Any] | None = None, **fields: Any) -> Reward:
        model = {"path": policy_path, **fields.pop("model", {})}
        given = {"per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1}
        trainer = {"args": {**given, "gradient_checkpointing": False, **(args or {})}}
        settings = {"type": "reward", "model": model, "beta": BETA, "data": data, "trainer": trainer}
        return Reward.model_validate({**settings, **fields})

    return make


class Logs(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entries.append({"step": state.global_step, **logs})

    def named(self, name: str) -> list[float]:
        return [entry[name] for entry in self.entries if name in entry]


def summed_reward(path: Path | str, reference: str, row: dict[str, Any]) -> float:
    """`beta * log(phi(y) / ref(y))` of a row by two forward passes over it alone."""
    tokenizer = load_tokenizer(Pretrained(path=reference))
    prompt, completion = row["prompt"], row["completion"]
    encoded = encode_row(tokenizer, prompt, completion)
    ids = torch.tensor([encoded["prompt_ids"] + encoded["completion_ids"]])
    total = 0.0
    for source, sign in ((str(path), 1), (reference, -1)):
        with torch.no_grad():
            logits = load_model(Pretrained(path=source))(input_ids=ids).logits[0]
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        start = len(encoded["prompt_ids"])
        total += sign * sum(log_probs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
    return BETA * total


# --- cross-entropy ---


@pytest.mark.parametrize("peft", [None, LORA])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_loss_is_that_of_rewards_of_exactly_0(stage, rows, tmp_path, peft, bf16) -> None:
    logs = Logs()
    given = stage(rows(), {"max_steps": 1, "bf16": bf16, "learning_rate": 1e-9}, model={"peft": peft})
    run_reward(given, StageRun(tmp_path / "run", callbacks=[logs]))
    assert logs.named("loss") == [pytest.approx(math.log(2), abs=1e-6)]


@pytest.mark.parametrize("peft", [None, LORA])
def test_it_learns_a_separable_set_and_its_results_are_those_of_the_written_model(
    stage, rows, tmp_path, policy_path, peft
) -> None:
    logs = Logs()
    given = stage(rows(), {"max_steps": 20, "learning_rate": 2e-2}, model={"peft": peft}, eval_data=rows())
    results = run_reward(given, StageRun(tmp_path / "run", callbacks=[logs]))
    losses = logs.named("loss")
    assert len(losses) == 20 and losses[-1] < 0.5 * losses[0]
    data = [json.loads(line) for line in Path(given.data.path).read_text().splitlines()]
    scores = [summed_reward(tmp_path / "run" / "model", policy_path, row) for row in data]
    bce = [math.log1p(math.exp(-s if row["label"] else s)) for s, row in zip(scores, data, strict=True)]
    assert results["loss"] == pytest.approx(sum(bce) / len(bce), rel=1e-3)
    right = [s for s, row in zip(scores, data, strict=True) if row["label"]]
    wrong = [s for s, row in zip(scores, data, strict=True) if not row["label"]]
    assert results["outcome_auc"] == sum(r > w for r in right for w in wrong) / 16 == 1.0
    assert logs.entries[-1]["eval_outcome_auc"] == 1.0


def test_the_model_is_a_language_model_with_a_record_of_its_reference(stage, rows, tmp_path, policy_path) -> None:
    assert run_reward(stage(rows()), StageRun(tmp_path / "run")) == {"updates": 2}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.generate(torch.tensor([[4, 9]]), max_new_tokens=2).shape[1] >= 3
    record = json.loads((tmp_path / "run" / "model" / "prm.json").read_text())
    assert record == {"beta": BETA, "reference": policy_path}


def test_another_reference_is_compared_with_and_recorded(stage, rows, tmp_path, policy_path) -> None:
    reference = load_model(Pretrained(path=policy_path))
    with torch.no_grad():
        reference.lm_head.weight.mul_(3)
    reference.save_pretrained(tmp_path / "reference")
    load_tokenizer(Pretrained(path=policy_path)).save_pretrained(tmp_path / "reference")
    logs = Logs()
    given = stage(rows(), {"max_steps": 1, "learning_rate": 1e-9}, reference={"path": str(tmp_path / "reference")})
    run_reward(given, StageRun(tmp_path / "run", callbacks=[logs]))
    data = [json.loads(line) for line in Path(given.data.path).read_text().splitlines()]
    scores = [summed_reward(policy_path, str(tmp_path / "reference"), row) for row in data]
    assert max(map(abs, scores)) > 0.1
    bce = [math.log1p(math.exp(-s if row["label"] else s)) for s, row in zip(scores, data, strict=True)]
    assert logs.named("loss") == [pytest.approx(sum(bce) / len(bce), rel=1e-3)]
    record = json.loads((tmp_path / "run" / "model" / "prm.json").read_text())
    assert record["reference"] == str(tmp_path / "reference")


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ("none", [math.log(2)] * 4),
        ("running", [-math.log(0.75), -math.log(0.25), -math.log(0.75), -math.log(0.75)]),
        # peers: 1/2 of {wrong, right}, 1 of {right, right}, 1/2 of {right, wrong}; alone: 1/2
        ("prompt", [-math.log(0.5), -math.log(0.02), -math.log(0.5), -math.log(0.5)]),
    ],
)
def test_the_offset_is_in_the_loss(stage, tmp_path, offset, expected) -> None:
    content = [("1 =", True), ("1 =", False), ("1 =", True), ("2 =", True)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": "1", "label": label}) for p, label in content))
    logs = Logs()
    given = stage({"type": "jsonl", "path": str(path)}, {"max_steps": 1}, offset=offset)
    run_reward(given, StageRun(tmp_path / "run", callbacks=[logs]))
    assert logs.named("loss") == [pytest.approx(sum(expected) / 4, rel=1e-5)]


def test_peer_rates_leave_the_row_itself_out() -> None:
    prompts = [[1, 2], [3], [1, 2], [1, 2], [4], [3]]
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    assert peer_rates(prompts, labels).tolist() == [0.5, 1.0, 0.5, 1.0, 0.5, 0.0]


def sampled(model: str, **fields: Any) -> dict[str, Any]:
    prompts = {"type": "running_sums", "size": 6, "terms": 2, "modulus": 5}
    settings = {"type": "sampled", "model": model, "prompts": prompts, "verifier": "exact"}
    return {**settings, "num_generations": 2, "max_new_tokens": 3, **fields}


def test_sampled_data_are_labelled_by_their_outcome(stage, tmp_path, policy_path) -> None:
    told = []
    run = StageRun(tmp_path / "run", progress=lambda *work: told.append(work))
    given = stage(sampled(policy_path, batch_size=5), offset="prompt", eval_data=sampled(policy_path))
    assert run_reward(given, run)["updates"] == 2
    expected = {"sampling": (0, 5, 10, 12, 0, 12), "evaluation": (0, 8, 12)}
    assert told == [(what, done, 12) for what, counts in expected.items() for done in counts]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_processes_share_the_sampling_and_all_have_all_of_it(monkeypatch, policy_path, world) -> None:
    """Of 6 prompts, each in one block; what the first process samples is what it would sample of these alone."""
    config = Sampled.model_validate(sampled(policy_path))
    prompts = load_data(config.prompts)
    prompts = prompts.add_column("tools", [f"[{number}]" for number in range(6)])
    asked, tools, blocks, told = [], [], [], []

    def recorded(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> list[list[int]]:
        asked.append(prompts)
        tools.append(options["tools"])
        blocks.append(generate_ids(model, tokenizer, prompts, **options))
        return blocks[-1]

    monkeypatch.setattr(sampling, "generate_ids", recorded)
    for rank in range(world):
        state = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
        monkeypatch.setattr(sampling, "processes", lambda state=state: state)
        monkeypatch.setattr(sampling, "gather_object", lambda own: ([*chain(*blocks)] + [[0]] * 12)[:12])
        groups = sampling.sample_completions(config, prompts, lambda *counts: told.append(counts))
    assert [*chain(*asked)] == [prompt for prompt in prompts["prompt"] for _ in range(2)]
    assert [*chain(*tools)] == [f"[{number}]" for number in range(6) for _ in range(2)]
    assert max(map(len, asked)) - min(map(len, asked)) <= 2
    assert [completion.ids for completion in chain(*groups)] == [*chain(*blocks)]
    assert [len(group) for group in groups] == [2] * 6
    assert {total for _, total in told} == {12} and told[-1] == (12, 12)
    if world == 2:
        assert blocks[0] != blocks[1]
        set_seed(config.seed)
        model, tokenizer = load_model(Pretrained(path=policy_path)), load_tokenizer(Pretrained(path=policy_path))
        assert blocks[0] == generate_ids(model, tokenizer, asked[0], max_new_tokens=3, temperature=1.0)


def test_held_out_rows_are_evaluated_in_the_middle_of_training_too(stage, rows, tmp_path) -> None:
    logs = Logs()
    args = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-9, "per_device_eval_batch_size": 3}
    run_reward(stage(rows(), args, eval_data=rows()), StageRun(tmp_path / "run", callbacks=[logs]))
    assert logs.named("eval_loss") == [pytest.approx(math.log(2), abs=1e-5)] * 3


# --- TRL's objectives ---


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("peft", [None, LORA])
@pytest.mark.parametrize("objective", ["dpo", "nca", "kto"])
def test_trls_objectives_start_from_rewards_of_0_and_learn(stage, rows, tmp_path, objective, peft, chat) -> None:
    data = rows(paired=objective != "kto", chat=chat)
    logs = Logs()
    given = stage(
        data,
        {"max_steps": 6, "learning_rate": 2e-2, "per_device_train_batch_size": 4},
        objective=objective,
        model={"peft": peft, "chat_template": CHAT if chat else None},
        eval_data=data,
    )
    results = run_reward(given, StageRun(tmp_path / "run", callbacks=[logs]))
    start = {"dpo": math.log(2), "nca": 2 * math.log(2), "kto": 0.5}[objective]
    assert logs.named("loss")[0] == pytest.approx(start, abs=2e-3)
    assert logs.named("loss")[-1] < start
    assert results["updates"] == 6
    assert results["outcome_auc"] > 0.7 and results["loss"] < math.log(2)


def test_the_results_of_dpo_are_those_of_the_written_model(stage, rows, tmp_path, policy_path) -> None:
    data = rows(paired=True)
    given = stage(data, {"learning_rate": 2e-2}, objective="dpo", eval_data=data)
    results = run_reward(given, StageRun(tmp_path / "run"))
    losses = []
    for pair in map(json.loads, Path(given.data.path).read_text().splitlines()):
        for name, sign in (("chosen", -1), ("rejected", 1)):
            row = {"prompt": pair["prompt"], "completion": pair[name]}
            score = summed_reward(tmp_path / "run" / "model", policy_path, row)
            losses.append(math.log1p(math.exp(sign * score)))
    assert results["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)


@pytest.mark.parametrize("peft", [None, LORA])
def test_dpo_against_another_reference(stage, rows, tmp_path, policy_path, peft) -> None:
    reference = load_model(Pretrained(path=policy_path))
    with torch.no_grad():
        reference.lm_head.weight.mul_(3)
    reference.save_pretrained(tmp_path / "reference")
    logs = Logs()
    given = stage(
        rows(paired=True),
        {"max_steps": 1, "per_device_train_batch_size": 4},
        objective="dpo",
        model={"peft": peft},
        reference={"path": str(tmp_path / "reference")},
    )
    run_reward(given, StageRun(tmp_path / "run", callbacks=[logs]))
    assert abs(logs.named("loss")[0] - math.log(2)) > 1e-3


# --- what cannot be ---


@pytest.mark.parametrize(
    ("objective", "missing"), [("ce", "completion and no label"), ("kto", "completion"), ("dpo", "")]
)
def test_missing_columns_are_an_error(stage, rows, tmp_path, objective, missing) -> None:
    data = rows(paired=objective != "dpo")
    expected = missing or "chosen and no rejected"
    with pytest.raises(RunError, match=rf"objective {objective} learns from .* no {expected}.*columns"):
        run_reward(stage(data, objective=objective), StageRun(tmp_path / "run"))


def test_a_prm_from_scratch_has_nothing_to_be_compared_with(rows, tmp_path) -> None:
    given = Reward.model_validate({"type": "reward", "model": {"type": "scratch", "vocabulary": ["1"]}, "data": rows()})
    with pytest.raises(RunError, match=r"from scratch.*sft stage"):
        run_reward(given, StageRun(tmp_path / "run"))


# --- parts ---


def test_token_rewards_are_beta_times_the_log_ratio(policy_path, tmp_path) -> None:
    config = Pretrained(path=policy_path)
    model, reference, tokenizer = load_model(config), load_model(config), load_tokenizer(config)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
        model.lm_head.weight[4].mul_(4)
    for each in (model, reference):
        add_log_prob_head(each)
    rows = collate_outcomes([encode_row(tokenizer, "1 =", "0 2 3"), encode_row(tokenizer, "1 2 =", "0")], 0)
    ids = [rows[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
    rewards = token_rewards(model, Scorer(reference, []), rows, BETA)
    expected = BETA * (token_outputs(model, *ids, 2)[0] - token_outputs(reference, *ids, 2)[0])
    torch.testing.assert_close(rewards, expected.masked_fill(~rows["completion_mask"], 0.0))
    assert rewards[0].abs().min() > 0 and rewards[1].tolist()[2:] == [0.0, 0.0]
    rewards.sum().backward()
    assert model.lm_head.weight.grad is not None and reference.lm_head.weight.grad is None


def test_held_out_statistics_by_hand() -> None:
    class Fixed(TrainedPrm):
        """Gives each row the rewards that it names."""

        def __init__(self) -> None: ...

        def token_rewards(self, rows: Any) -> torch.Tensor:
            return torch.tensor([row["rewards"] for row in rows])

    data = Dataset.from_list(
        [
            {"rewards": [1.0, 1.0], "label": 1.0, "offset": 0.0},  # 2
            {"rewards": [-1.0, 0.5], "label": 1.0, "offset": 1.0},  # -0.5
            {"rewards": [0.0, 0.0], "label": 0.0, "offset": 0.0},  # 0
            {"rewards": [0.0, -0.5], "label": 0.0, "offset": -1.0},  # -0.5, a tie
        ]
    )
    expected = [math.log1p(math.exp(-2)), math.log1p(math.exp(-0.5)), math.log(2), math.log1p(math.exp(-1.5))]
    for batch_size in (1, 3, 4):
        found = held_out(Fixed(), data, batch_size)
        assert found == {"loss": pytest.approx(sum(expected) / 4), "outcome_auc": 2.5 / 4}
    assert "outcome_auc" not in held_out(Fixed(), data.select([0, 1]), 4)
