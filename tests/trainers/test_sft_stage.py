"""The `sft` stage writes a model that loads anywhere, and continues from its last whole checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rlhf_kit.data.load import load_data
from rlhf_kit.data.tasks import running_sums_vocabulary
from rlhf_kit.data.verifiers import verify
from rlhf_kit.errors import RunError
from rlhf_kit.models.generation import generate
from rlhf_kit.trainers.config import Sft
from rlhf_kit.trainers.setup import StageRun, build_args
from rlhf_kit.trainers.sft import run_sft

DATA = {"type": "running_sums", "size": 30, "terms": 2, "modulus": 5}
SCRATCH = {
    "type": "scratch",
    "vocabulary": running_sums_vocabulary(5),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def stage(args: dict[str, Any] | None = None, **fields: Any) -> Sft:
    given = {"per_device_train_batch_size": 4, "max_steps": 5, "learning_rate": 1e-2, "logging_steps": 1}
    trainer = {"args": {**given, "gradient_checkpointing": False, **(args or {})}}
    return Sft.model_validate({"type": "sft", "model": SCRATCH, "data": DATA, "trainer": trainer, **fields})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Logs(TrainerCallback):
    """Keeps what is logged, and may raise in place of a kill."""

    def __init__(self, die_at: int | None = None) -> None:
        self.entries: list[dict[str, float]] = []
        self.die_at = die_at

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entries.append({"step": state.global_step, **logs})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.die_at:
            raise KeyboardInterrupt


def test_the_model_loads_anywhere_and_generates(tmp_path: Path) -> None:
    logs = Logs()
    results = run_sft(stage(), StageRun(tmp_path, callbacks=[logs]))
    assert results == {"updates": 5}
    losses = [entry["loss"] for entry in logs.entries if "loss" in entry]
    assert len(losses) == 5 and losses[-1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompts = [row["prompt"] for row in load_data(stage().data)]
    assert len(generate(model, tokenizer, prompts[:3], max_new_tokens=3)) == 3
    assert model.config.hidden_size == 16 and tokenizer.eos_token == "<eos>"


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_sft(stage({"max_steps": 1}), StageRun(tmp_path / name, seed=seed))
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_the_loss_is_on_completions_alone(policy_path: str, tmp_path: Path) -> None:
    """The first loss is the mean negative log-likelihood of completion tokens, the end token included."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in [("1 2 =", "3"), ("0 =", "1 2")]))
    logs = Logs()
    args = {"per_device_train_batch_size": 2, "max_steps": 1}
    given = stage(args, model={"path": policy_path}, data={"type": "jsonl", "path": str(path)})
    run_sft(given, StageRun(tmp_path / "run", callbacks=[logs]))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy_path), AutoTokenizer.from_pretrained(policy_path)
    log_probs = []
    for prompt, completion in (("1 2 =", "3 <eos>"), ("0 =", "1 2 <eos>")):
        start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {completion}", return_tensors="pt")
        with torch.no_grad():
            logits = torch.log_softmax(model(input_ids=ids["input_ids"]).logits[0], dim=-1)
        log_probs += [logits[t - 1, ids["input_ids"][0, t]].item() for t in range(start, ids["input_ids"].shape[1])]
    assert len(log_probs) == 5
    assert logs.entries[0]["loss"] == pytest.approx(-sum(log_probs) / 5, abs=1e-3)


def test_a_rows_tools_are_told_to_the_template_and_calls_have_no_arguments_of_others(
    policy_path: str, tmp_path: Path
) -> None:
    """A template that writes the number of tools, and each argument of a call: nothing is written of a null."""
    template = (
        "{% if tools %}{{ tools | length }} {% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}= {% endif %}{{ m.content or '' }} "
        "{% for c in m.tool_calls or [] %}{% for name in c.function.arguments %}{{ name }} {% endfor %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}= {% endif %}"
    )
    calls = [{"function": {"name": "f", "arguments": {name: 1}}} for name in "34"]
    tools = [[{"type": "function", "function": {"name": "f", "parameters": {}}}] * 2, None]
    rows = [
        {
            "prompt": [{"role": "user", "content": "0 1"}],
            "completion": [{"role": "assistant", "content": "", "tool_calls": [call]}],
            "tools": known,
        }
        for call, known in zip(calls, tools, strict=True)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    seen: list[list[int]] = []

    class Seen(TrainerCallback):
        def on_train_begin(self, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
            seen.extend(row["input_ids"] for row in train_dataloader.dataset)

    given = stage(
        {"max_steps": 1},
        model={"path": policy_path, "chat_template": template},
        data={"type": "jsonl", "path": str(path)},
    )
    run_sft(given, StageRun(tmp_path / "run", callbacks=[Seen()]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in seen]
    assert sorted(texts) == ["0 1 = 4", "2 0 1 = 3"]


def test_the_evaluated_accuracy_is_that_of_the_written_model(tmp_path: Path) -> None:
    eval_data = {**DATA, "seed": 3, "size": 20}
    evaluation = {"verifier": "exact", "max_new_tokens": 4, "batch_size": 7}
    logs, told = Logs(), []
    given = stage({"max_steps": 30}, eval_data=eval_data, evaluation=evaluation)
    results = run_sft(given, StageRun(tmp_path, callbacks=[logs], progress=lambda *work: told.append(work)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = load_data(given.eval_data).to_list()
    texts = generate(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=4)
    scores = [verify("exact", text, row) for text, row in zip(texts, rows, strict=True)]
    assert 0 < sum(scores) < len(scores)
    assert results["eval_accuracy"] == sum(scores) / len(scores)
    assert logs.entries[-1]["eval_accuracy"] == results["eval_accuracy"]
    assert told == [("evaluation", done, 20) for done in (0, 7, 14, 20)]


def test_rows_that_the_verifier_cannot_judge_are_an_error(tmp_path: Path) -> None:
    given = stage(
        {"max_steps": 1},
        eval_data={**DATA, "columns": {"solution": "answer"}},
        evaluation={"verifier": "exact"},
    )
    with pytest.raises(ValueError, match=r"'exact' cannot judge row 1 .*solution"):
        run_sft(given, StageRun(tmp_path))


def test_lora_writes_an_adapter_on_the_model_that_it_started_from(policy_path: str, tmp_path: Path) -> None:
    given = stage(model={"path": policy_path, "peft": {"type": "lora", "r": 2}})
    run_sft(given, StageRun(tmp_path))
    adapter = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == policy_path
    assert not (tmp_path / "model" / "model.safetensors").exists()
    from rlhf_kit.models.config import Pretrained
    from rlhf_kit.models.loading import load_model

    ids = torch.tensor([[4, 5, 9]])
    trained, base = load_model(Pretrained(path=str(tmp_path / "model"))), load_model(Pretrained(path=policy_path))
    assert (trained(input_ids=ids).logits - base(input_ids=ids).logits).abs().max() > 1e-4


def test_conversations_are_learnt_through_the_chat_template(policy_path: str, tmp_path: Path) -> None:
    """A template that adds nothing but the end token gives the losses of the same rows as text."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }} {% else %}"
        "{% generation %}{{ m['content'] }}<eos>{% endgeneration %}{% endif %}{% endfor %}"
    )
    losses = []
    for chat in (False, True):
        logs = Logs()
        given = stage(model={"path": policy_path, "chat_template": template}, data={**DATA, "chat": chat})
        run_sft(given, StageRun(tmp_path / str(chat), callbacks=[logs]))
        losses.append([entry["loss"] for entry in logs.entries if "loss" in entry])
    assert len(losses[0]) == 5 and losses[0] == losses[1]
    assert AutoTokenizer.from_pretrained(tmp_path / "True" / "model").chat_template == template


def test_data_without_completions_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1 =", "answer": "1"}\n')
    with pytest.raises(RunError, match=r"only the columns prompt, answer: .*completion: answer"):
        run_sft(stage(data={"type": "jsonl", "path": str(path)}), StageRun(tmp_path / "run"))


def test_an_argument_that_trl_refuses_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"trainer\.args: .*wavy"):
        run_sft(stage({"lr_scheduler_type": "wavy"}), StageRun(tmp_path))


# --- going on ---

SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "num_train_epochs": 1}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 updates; an epoch has 7.5, so its end lies between the last checkpoint (6) and the last step."""
    folder = tmp_path_factory.mktemp("whole")
    run_sft(stage(SAVING), StageRun(folder, seed=3))
    return folder


@pytest.mark.parametrize("die_at", [2, 4, 7])
def test_a_stage_that_was_stopped_goes_on_and_ends_bit_identical(
    uninterrupted: Path, tmp_path: Path, die_at: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_sft(stage(SAVING), StageRun(tmp_path, seed=3, callbacks=[Logs(die_at)]))
    logs = Logs()
    run_sft(stage(SAVING), StageRun(tmp_path, seed=3, callbacks=[logs]))
    steps = [entry["step"] for entry in logs.entries if "loss" in entry]
    assert steps == list(range(die_at // 3 * 3 + 1, 9))
    assert equal(weights(tmp_path), weights(uninterrupted))


def test_a_stage_that_was_stopped_behind_its_last_step_takes_no_more(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    logs = Logs()
    results = run_sft(stage(SAVING), StageRun(tmp_path / "run", seed=3, callbacks=[logs]))
    assert StageRun(tmp_path / "run").last_checkpoint().name == "checkpoint-8"
    assert results["updates"] == 8 and logs.entries == []
    assert equal(weights(tmp_path / "run"), weights(uninterrupted))


def test_the_last_whole_checkpoint_is_the_newest_with_a_readable_state(tmp_path: Path) -> None:
    run = StageRun(tmp_path)
    assert run.last_checkpoint() is None
    for number, state in ((2, "{}"), (10, "{}"), (11, '{"global_st'), (12, None)):
        (tmp_path / "checkpoints" / f"checkpoint-{number}").mkdir(parents=True)
        if state is not None:
            (tmp_path / "checkpoints" / f"checkpoint-{number}" / "trainer_state.json").write_text(state)
    assert run.last_checkpoint() == tmp_path / "checkpoints" / "checkpoint-10"


def test_arguments_of_the_recipe_go_before_the_kits_but_not_its_folder(tmp_path: Path) -> None:
    from trl.trainer.sft_config import SFTConfig

    run: Callable[..., SFTConfig] = lambda **given: build_args(  # noqa: E731
        SFTConfig, StageRun(tmp_path, seed=5), given, learning_rate=2e-3
    )
    args = run()
    assert (args.seed, args.report_to, args.learning_rate) == (5, [], 2e-3)
    assert args.output_dir == str(tmp_path / "checkpoints")
    args = run(seed=6, learning_rate=1e-4, output_dir="elsewhere", fp16=False, bf16=True)
    assert (args.seed, args.learning_rate, args.bf16) == (6, 1e-4, True)
    assert args.output_dir == str(tmp_path / "checkpoints")
