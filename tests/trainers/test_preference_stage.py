"""The `preference` stage trains by every objective, on the model's own probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback

from rlhf_kit.data.load import load_data
from rlhf_kit.errors import RunError
from rlhf_kit.evals.accuracy import greedy_scores
from rlhf_kit.evals.steps import accuracy_interval
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.trainers.config import Preference
from rlhf_kit.trainers.offline import keep_adapter_dropout
from rlhf_kit.trainers.preference import run_preference
from rlhf_kit.trainers.setup import StageRun

ROWS = [
    {
        "prompt": f"{number} =",
        "corrupted_prompt": f"{(number + 1) % 4} =",
        "judged_prompt": f"4 {number} =",
        "chosen": f"{number} {number}",
        "rejected": "4 4",
        "completion": f"{number} {number}" if number % 2 else "4 4 4",
        "label": number % 2,
        "scope": number % 3,
    }
    for number in range(4)
]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": ["sigmoid"]},
    "dpo, two losses": {"type": "dpo", "loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.5, 1.0]},
    "kto": {},
    "orpo": {},
    "orpo with the prompt": {"type": "orpo", "nll": "prompt_and_completion"},
    "cringe": {"top_k": 3},
    "pairwise_cringe": {"top_k": 3},
    "pmpo": {},
    "cut": {},
    "i_orpo": {},
    "c3po": {},
    "nca": {},
    "ce": {},
}
LORA = {"type": "lora", "r": 4}
Make = Callable[..., Preference]


@pytest.fixture
def make(policy_path: str, tmp_path: Path) -> Make:
    """A stage on the tiny policy; `args` are those of its trainer."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))

    def stage(objective: str, args: dict[str, Any] | None = None, **fields: Any) -> Preference:
        given = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
        return Preference.model_validate(
            {
                "type": "preference",
                "objective": {"type": objective.split(",")[0].split(" ")[0], **OBJECTIVES[objective]},
                "data": {"type": "jsonl", "path": str(path)},
                "trainer": {"args": {**given, "gradient_checkpointing": False, **(args or {})}},
                **fields,
                "model": {"path": policy_path, **fields.get("model", {})},
            }
        )

    return stage


class Logs(TrainerCallback):
    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entries.append(dict(logs))


@pytest.mark.parametrize("peft", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_and_its_model_loads_anywhere(
    objective: str, peft: Any, make: Make, policy_path: str, tmp_path: Path
) -> None:
    logs = Logs()
    results = run_preference(make(objective, model={"peft": peft}), StageRun(tmp_path / "run", callbacks=[logs]))
    assert results["updates"] == 3
    losses = [entry["loss"] for entry in logs.entries if "loss" in entry]
    assert len(losses) == 3 and all(torch.tensor(losses).isfinite())
    start = AutoModelForCausalLM.from_pretrained(policy_path).state_dict()
    if peft is None:
        trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
        assert any(not torch.equal(trained[name], start[name]) for name in start)
    else:
        adapter = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == policy_path


@pytest.mark.parametrize("objective", ["orpo", "i_orpo", "nca", "pairwise_cringe", "dpo"])
def test_the_model_learns_to_prefer_what_was_chosen(objective: str, make: Make, tmp_path: Path) -> None:
    stage = make(objective, {"max_steps": 30, "learning_rate": 3e-2})
    stage = stage.model_copy(update={"eval_data": stage.data})
    args = {**stage.trainer.args, "eval_strategy": "steps", "eval_steps": 30}
    stage = Preference.model_validate({**stage.model_dump(), "trainer": {"args": args}})
    results = run_preference(stage, StageRun(tmp_path / "run"))
    assert results["eval_rewards/accuracies"] == 1.0
    if objective != "i_orpo":  # which prefers one prompt to another, not one completion
        assert results["eval_preference_accuracy"] == 1.0
    assert results["eval_rewards/margins"] > 0


def test_the_first_loss_of_ce_and_nca_is_that_of_equal_models(make: Make, tmp_path: Path) -> None:
    for objective, expected in (("ce", 1.0), ("nca", 2.0)):
        logs = Logs()
        run_preference(make(objective, {"max_steps": 1}), StageRun(tmp_path / objective, callbacks=[logs]))
        assert logs.entries[0]["loss"] == pytest.approx(expected * torch.tensor(2.0).log().item(), abs=1e-6)


def test_the_loss_of_orpo_is_the_formula_on_the_models_own_probabilities(
    make: Make, policy_path: str, tmp_path: Path
) -> None:
    logs, stage = Logs(), make("orpo", {"max_steps": 1, "per_device_train_batch_size": 4})
    model, tokenizer = load_model(stage.model), load_tokenizer(stage.model)

    def mean_log_prob(prompt: str, completion: str) -> torch.Tensor:
        before = tokenizer(prompt)["input_ids"]
        ids = torch.tensor(
            [[*before, *tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
        )
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        return log_p[len(before) - 1 :].mean()

    losses = []
    for row in load_data(stage.data).to_list():
        chosen, rejected = (mean_log_prob(row["prompt"], row[name]) for name in ("chosen", "rejected"))
        odds = [p - torch.log1p(-p.exp()) for p in (chosen, rejected)]
        losses.append(-chosen - 0.1 * torch.nn.functional.logsigmoid(odds[0] - odds[1]))
    run_preference(stage, StageRun(tmp_path / "run", callbacks=[logs]))
    assert logs.entries[0]["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


def test_a_stage_that_was_stopped_ends_with_the_same_weights(make: Make, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    stage = make("pairwise_cringe", {"max_steps": 4, "save_strategy": "steps", "save_steps": 2})
    run_preference(stage, StageRun(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run_preference(stage, StageRun(tmp_path / "stopped", callbacks=[Stop()]))
    run_preference(stage, StageRun(tmp_path / "stopped"))
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("whole", "stopped"))
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, after.state_dict()[name]), name


def log_probs(path: Path | str, policy: str, row: dict[str, Any], side: str) -> torch.Tensor:
    """Log-probabilities of a completion's tokens and its end, by a forward pass over it alone."""
    tokenizer, model = load_tokenizer(Pretrained(path=policy)), load_model(Pretrained(path=str(path)))
    before = tokenizer(row["prompt"])["input_ids"]
    ids = torch.tensor(
        [[*before, *tokenizer(row[side], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    )
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return log_p[len(before) - 1 :]


HELD_OUT = [
    {"prompt": "0 =", "chosen": "1 2", "rejected": "4 4"},
    {"prompt": "1 =", "chosen": "4 4", "rejected": "1 1"},  # against what is learnt
    {"prompt": "2 =", "chosen": "2 2 2", "rejected": "4"},
    {"prompt": "3 =", "chosen": "3", "rejected": "4 4"},
    {"prompt": "4 =", "chosen": "4 1 0", "rejected": "4 4"},
]


@pytest.mark.parametrize("peft", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("objective", ["dpo", "nca", "pmpo", "orpo", "kto", "cringe"])
def test_preference_accuracy_is_that_of_the_written_models_own_probabilities(
    objective: str, peft: Any, make: Make, policy_path: str, tmp_path: Path
) -> None:
    """With a reference by the log-ratio, without one by the mean; objectives that learn from single rows as well."""
    path = tmp_path / "held_out.jsonl"
    path.write_text("\n".join(map(json.dumps, HELD_OUT)))
    args = {"max_steps": 8, "per_device_eval_batch_size": 3}
    stage = make(objective, args, model={"peft": peft}, eval_data={"type": "jsonl", "path": str(path)})
    logs = Logs()
    results = run_preference(stage, StageRun(tmp_path / "run", callbacks=[logs]))
    compares = objective not in ("orpo", "cringe")

    def accuracy(model: Path | str) -> float:
        right = []
        for row in HELD_OUT:
            found = [log_probs(model, policy_path, row, side) for side in ("chosen", "rejected")]
            references = [log_probs(policy_path, policy_path, row, side) for side in ("chosen", "rejected")]
            rewards = [
                (own.sum() - reference.sum() if compares else own.mean()).item()
                for own, reference in zip(found, references, strict=True)
            ]
            right.append(0.5 if rewards[0] == rewards[1] else float(rewards[0] > rewards[1]))
        return sum(right) / len(right)

    ends = accuracy(tmp_path / "run" / "model")
    assert results["eval_preference_accuracy"] == pytest.approx(ends)
    assert results["eval_preference_accuracy_start"] == pytest.approx(accuracy(policy_path))
    assert results["eval_preference_accuracy_gain"] == pytest.approx(ends - accuracy(policy_path))
    judged = [1.0] * round(5 * ends) + [0.0] * (5 - round(5 * ends))
    assert results["eval_preference_accuracy_interval"] == pytest.approx(list(accuracy_interval(judged)))
    assert (results["eval_length_only_accuracy"], results["eval_length_only_prefers"]) == (0.6, "longer")
    logged = [entry["eval_preference_accuracy"] for entry in logs.entries if "eval_preference_accuracy" in entry]
    assert logged == [results["eval_preference_accuracy_start"], results["eval_preference_accuracy"]]
    assert "eval_loss" not in results


def test_greedy_accuracy_is_measured_before_and_after(make: Make, policy_path: str, tmp_path: Path) -> None:
    data = {"type": "running_sums", "size": 20, "terms": 2, "modulus": 5, "seed": 3}
    evaluation = {"data": data, "verifier": "exact", "max_new_tokens": 4, "batch_size": 8}
    stage = make("orpo", {"max_steps": 10}, evaluation=evaluation)
    results = run_preference(stage, StageRun(tmp_path / "run"))
    for name, path in (("eval_accuracy_start", policy_path), ("eval_accuracy", tmp_path / "run" / "model")):
        model, tokenizer = load_model(Pretrained(path=str(path))), load_tokenizer(Pretrained(path=policy_path))
        assert stage.evaluation is not None
        scores = greedy_scores(model, tokenizer, load_data(stage.evaluation.data), stage.evaluation)
        assert results[name] == sum(scores) / 20


@pytest.mark.parametrize(("objective", "longest"), [("dpo", 5), ("orpo", 5), ("kto", 6)])
def test_longer_rows_are_left_out_and_counted(objective: str, longest: int, make: Make, tmp_path: Path) -> None:
    long = {**ROWS[0], "chosen": "1 1 1 1 1 1", "completion": "1 1 1 1 1 1"}
    stage = make(objective, max_length=longest)  # two tokens, and two and an end, or three and an end
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*ROWS, long])))
    results = run_preference(stage, StageRun(tmp_path / "run"))
    run_preference(make(objective, data={**stage.data.model_dump(), "limit": 4}), StageRun(tmp_path / "short"))
    assert results["left_out"] == 1
    trained = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("run", "short")
    ]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    with pytest.raises(RunError, match="all 5 rows of the data are longer than 2 tokens"):
        run_preference(make(objective, max_length=2), StageRun(tmp_path / "none"))


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "nca"])
def test_the_dropout_of_an_adapter_is_that_of_the_recipe(objective: str, make: Make, tmp_path: Path) -> None:
    """It acts while the adapter learns, not at the start, where an adapter is nothing; TRL's own word goes first."""
    adapters, losses = [], []
    for number, (dropout, args) in enumerate([(0.0, {}), (0.5, {}), (0.5, {"disable_dropout": True})]):
        if args and objective not in ("dpo", "kto"):
            continue
        logs, folder = Logs(), tmp_path / str(number)
        stage = make(objective, {**args, "max_steps": 6}, model={"peft": {**LORA, "dropout": dropout}})
        run_preference(stage, StageRun(folder, callbacks=[logs]))
        losses.append([entry["loss"] for entry in logs.entries if "loss" in entry])
        adapters.append(load_file(folder / "model" / "adapter_model.safetensors"))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-6)  # nothing is there yet to be dropped
    assert losses[0][2:] != pytest.approx(losses[1][2:], abs=1e-5)
    assert any(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    if len(adapters) == 3:
        assert all(torch.equal(adapters[0][name], adapters[2][name]) for name in adapters[0])


def test_a_models_own_dropout_is_off(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8, resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3)
    lora = LoraConfig(r=2, lora_dropout=0.4, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(GPT2LMHeadModel(config), lora)
    keep_adapter_dropout(model)
    left = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert len(left) > 4
    assert {name: p for name, p in left.items() if p} == {
        "base_model.model.transformer.h.0.attn.c_attn.lora_dropout.default": 0.4
    }


@pytest.mark.parametrize("peft", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize(("objective", "nats"), [("dpo", 1.0), ("nca", 2.0)])
def test_a_model_with_dropout_starts_as_its_reference(
    objective: str, nats: float, peft: Any, make: Make, policy_path: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(Pretrained(path=policy_path))
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.5, embd_pdrop=0.5)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model = {"path": str(tmp_path / "gpt2"), "peft": peft and {**peft, "target_modules": ["c_attn"]}}
    logs = Logs()
    run_preference(make(objective, {"max_steps": 1}, model=model), StageRun(tmp_path / "run", callbacks=[logs]))
    assert logs.entries[0]["loss"] == pytest.approx(nats * torch.tensor(2.0).log().item(), abs=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_nothing_is_cut_off_unless_the_recipe_says_so(objective: str, make: Make, tmp_path: Path) -> None:
    """Also not at the 1,024 tokens that TRL's own trainers would read, with and without a larger `max_length`."""
    long = {**ROWS[0], "chosen": "1 " * 1200 + "1", "completion": "1 " * 1200 + "1"}
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, [long, ROWS[1]])))
    data = {"type": "jsonl", "path": str(tmp_path / "long.jsonl")}
    args = {"max_steps": 1, "per_device_train_batch_size": 2}
    for limit in (None, 2000):
        run, logs = tmp_path / f"run-{limit}", Logs()
        stage = make(objective, args, data=data, max_length=limit)
        results = run_preference(stage, StageRun(run, callbacks=[logs]))
        assert results.get("left_out", 0) == 0 and "cut_off" not in results
        tokens = [entry["num_tokens"] for entry in logs.entries if "num_tokens" in entry]
        # of prompts 2 each; completions with an end, rejected ones of 3, and for KTO those of the other row again
        assert tokens == {"dpo": [1204 + 5 + 5 + 5], "kto": [1204 + 5], "orpo": []}[objective]


def test_trls_own_max_length_cuts_off_and_says_so(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows of 3 tokens and more of completion behind prompts of 2 and, once, 5 tokens, of which nothing is left."""
    rows = [*ROWS[:2], {**ROWS[2], "chosen": "1", "rejected": "4"}, {**ROWS[3], "prompt": "1 1 1 1 ="}]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"type": "jsonl", "path": str(tmp_path / "some.jsonl")}
    args = {"max_steps": 1, "max_length": 4, "eval_strategy": "steps"}
    results = run_preference(make("dpo", args, data=data, eval_data=data), StageRun(tmp_path / "run"))
    assert (results["cut_off"], results["left_out"]) == (2, 1)  # "1" and an end behind a prompt of 2 are 4 tokens
    assert (results["eval_cut_off"], results["eval_left_out"]) == (2, 1)
    said = [record.message for record in caplog.records if "max_length" in record.message]
    assert len(said) == 2 and "max_length 4 cuts off 2 of 4 rows of data, and leaves out 1" in said[0]
    both = make("dpo", {**args, "eval_strategy": "no"}, data=data, max_length=5)  # the longest prompt's row is longer
    assert run_preference(both, StageRun(tmp_path / "both"))["left_out"] == 1
    with pytest.raises(RunError, match="max_length: the prompts of all 4 rows of data have 2 tokens or more"):
        run_preference(make("dpo", {**args, "max_length": 2}, data=data), StageRun(tmp_path / "none"))


CHAT = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %} {% else %}<eos>{% endif %}{% endfor %}"


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_same_pairs_in_trls_formats_give_the_same_model(
    objective: str, suffix: str, make: Make, tmp_path: Path
) -> None:
    """With a prompt and with the prompt inside; as text and as messages, of which the template makes that text."""

    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    text = [{"prompt": f"{i} =", "chosen": f"{i} {i}", "rejected": "4 4"} for i in range(4)]
    chat = [
        {
            "prompt": [said("user", row["prompt"])],
            **{side: [said("assistant", row[side])] for side in ("chosen", "rejected")},
        }
        for row in text
    ]
    formats = {
        "explicit": text,
        "implicit": [{side: f"{row['prompt']} {row[side]}" for side in ("chosen", "rejected")} for row in text],
        "chat": chat,
        "implicit chat": [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in chat],
    }
    trained = {}
    for name, rows in formats.items():
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        else:
            Dataset.from_list(rows).to_parquet(str(path))
        stage = make(objective, data={"type": suffix, "path": str(path)}, model={"chat_template": CHAT})
        run_preference(stage, StageRun(tmp_path / name))
        trained[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict()
    for name, weights in trained.items():
        assert all(torch.equal(weights[key], trained["explicit"][key]) for key in weights), name


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "cringe"])
def test_an_error_in_row_17_names_row_17(objective: str, make: Make, tmp_path: Path) -> None:
    """Also where rows before it are skipped: a template that renders this prompt otherwise once it is answered."""
    template = CHAT.replace("{{ m['content'] }}", "{{ m['content'] | replace('3', '' if loop.last else '3') }}", 1)
    stage = make(objective, model={"chat_template": template})
    rows = [{**ROWS[number % 3], "chosen": "1", "rejected": "2", "completion": "1"} for number in range(16)]
    odd = {**rows[0], "prompt": "3 ="}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, odd, *rows])))
    for skip in (0, 5):
        data = {**stage.data.model_dump(), "chat": True, "skip": skip}
        broken = Preference.model_validate({**stage.model_dump(), "data": data})
        with pytest.raises(RunError, match=r"rows.jsonl, row 17: the chat template renders a prompt differently"):
            run_preference(broken, StageRun(tmp_path / f"run-{skip}"))


def test_held_out_rows_of_no_use_are_refused(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "single.jsonl"
    path.write_text(json.dumps({"prompt": "1 =", "completion": "1"}))
    stage = make("kto", eval_data={"type": "jsonl", "path": str(path)})
    with pytest.raises(RunError, match=r"kto learns from .* no label"):
        run_preference(stage, StageRun(tmp_path / "run"))


@pytest.mark.parametrize("objective", ["orpo", "kto"])
def test_a_missing_column_is_named(objective: str, make: Make, tmp_path: Path) -> None:
    stage = make(objective)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1 =", "answer": "1"}))
    with pytest.raises(RunError, match=rf"objective {objective} learns from .* only prompt, answer"):
        run_preference(stage, StageRun(tmp_path / "run"))


def test_a_broken_row_is_named(make: Make, tmp_path: Path) -> None:
    stage = make("c3po")
    for scope, said in ((None, "is missing"), (7, "is 7, and neither 0")):
        rows = [{**ROWS[0]}, {**ROWS[1], "scope": scope}]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(RunError, match=f"row 2: 'scope' {said}"):
            run_preference(stage, StageRun(tmp_path / "run"))


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_ids_of_another_tokenizer_are_not_trained_on(objective: str, make: Make, tmp_path: Path) -> None:
    """Whether this vocabulary has them or not, the text is what is learnt."""
    stage = make(objective)
    run_preference(stage, StageRun(tmp_path / "text"))
    ids = ([0], [10**6], [1, 1], None)
    foreign = [{**row, "chosen_ids": own, "rejected_ids": own} for row, own in zip(ROWS, ids, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, foreign)))
    run_preference(stage, StageRun(tmp_path / "ids"))
    trained = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("text", "ids")]
    for name, weight in trained[0].state_dict().items():
        assert torch.equal(weight, trained[1].state_dict()[name]), name
