"""The kit's PPO step against the GRPO step of TRL: same model, prompts, batch, lengths and seed, in one run.

The trainers take their steps in turn, so that whatever else the machine does hits all of them alike; ratios are
medians over rounds. Every completion has the same length. The arms:

- `trl grpo`: TRL's GRPOTrainer with an outcome reward.
- `group`: the kit with the same reward and the same advantages (target: at most 1.05x TRL's step).
- `prime`: the kit with an online implicit PRM besides, whose reference is the policy that sampled.

In every round the parts of a `prime` step are also run alone, on models of their own, as plain loops without a trainer
(target: the step within 10 % of their sum).

    python benchmarks/step_time.py                            # the quickstart's model and batch
    python benchmarks/step_time.py --model PATH [--lora]      # a model of one's own, e.g. SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from common import (
    OUTCOME,
    QUICKSTART_PROMPTS,
    Stopwatch,
    build_ours,
    build_trl,
    check_lengths,
    now,
    odd,
    parsed,
    parser,
    ppo_stage,
    print_table,
    report,
    save_scratch_policy,
    seconds,
    spread,
)
from torch import Tensor, nn
from transformers import GenerationConfig, Trainer, TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from rlhf_kit.data.load import load_data
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.models.scorer import rollout_outputs
from rlhf_kit.rewards.config import BuildContext
from rlhf_kit.rollout import Rollout
from rlhf_kit.trainers.config import Ppo
from rlhf_kit.trainers.ppo import PpoTrainer
from rlhf_kit.trainers.run_ppo import ppo_args
from rlhf_kit.trainers.setup import StageRun

PRM = {"type": "implicit_prm", "beta": 0.05, "online": {"learning_rate": 1e-6, "order": "before_scoring"}}
ARM_STAGES: dict[str, dict[str, Any]] = {
    "trl grpo": {},
    "group": {},
    "prime": {"rewards": (OUTCOME, PRM), "credit": {"estimator": "prime"}},
}
TARGETS = {"group": "<= 1.05", "prime": "about 1.9 on a CPU, <= 1.25 on a GPU"}
TIMED = ("generation", "scoring", "PRM update", "policy update")
# With the quickstart's batch a step takes a third of a second; with SmolLM2 on two cores, ten.
DEFAULTS = {
    "tiny": {"batch": 128, "length": 14, "generations": 4, "steps": 40, "warmup": 3},
    "path": {"batch": 8, "length": 24, "generations": 4, "steps": 5, "warmup": 1},
}

# --- trainers in turn ---


class Arm(TrainerCallback):
    """A trainer that trains in a thread of its own and waits after every step until it is its turn again."""

    def __init__(self, name: str, trainer: Trainer) -> None:
        self.name = name
        self.trainer = trainer
        self.watch = Stopwatch()
        self.rounds: list[dict[str, float]] = []
        self._turn = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._error: BaseException | None = None
        self._watch_parts()
        trainer.add_callback(self)
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def step(self) -> dict[str, float]:
        """One step of the trainer, from the end of the last to the end of this one; its seconds by part."""
        self.watch.take()
        start = now()
        self._hand_over()
        total = now() - start
        parts = {name: self.watch.seconds.get(name, 0.0) for name in TIMED}
        return {"step": total, **parts, "other": total - sum(parts.values())}

    def finish(self) -> None:
        """Let the trainer come to its end."""
        self._turn.release()
        self._thread.join()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand the machine over, also after the last step: what ends a training belongs to no step."""
        self._done.release()
        self._turn.acquire()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        self.watch.enter("policy update")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        self.watch.leave()

    def _watch_parts(self) -> None:
        trainer, watch = self.trainer, self.watch
        watch.wrap(trainer.model, "generate", "generation")
        watch.wrap(trainer, "compute_loss", "policy update")
        watch.wrap(trainer.accelerator, "backward", "policy update")
        watch.wrap(trainer.accelerator, "clip_grad_norm_", "policy update")
        if isinstance(trainer, PpoTrainer):
            watch.wrap(trainer, "assign_credit", "scoring")
            for update in trainer.scoring.online.values():
                watch.wrap(update, "step", "PRM update")

    def _train(self) -> None:
        self._turn.acquire()
        try:
            self.trainer.train()
        except BaseException as error:
            self._error = error
            self._done.release()

    def _hand_over(self) -> None:
        self._turn.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error


# --- the parts alone ---


class Parts:
    """The parts of a `prime` step as plain loops, on a policy and a PRM of their own."""

    def __init__(self, stage: Ppo, folder: Path) -> None:
        self.args: Any = ppo_args(stage, StageRun(folder))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy: Any = load_model(stage.model)
        # TRL's head as its trainer adds it: the entropy is part of what a policy update computes.
        base = self.policy.get_base_model() if stage.model.peft is not None else self.policy
        add_fused_lm_head(base, outputs=("log_probs", "entropy"))
        self.policy.to(self.device)
        self.policy_parameters = [p for p in self.policy.parameters() if p.requires_grad]
        context = BuildContext(self.policy, stage.model, 1.0, self.device)
        self.prm: Any = stage.rewards[-1].build(context)
        self.prm_parameters = self.prm.trainable_parameters()
        for parameter in self.prm_parameters:
            parameter.requires_grad_(True)
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(self.args)
        self.policy_optimizer = optimizer(self.policy_parameters, **options)
        self.prm_optimizer = torch.optim.AdamW(self.prm_parameters, lr=1e-6, weight_decay=0.0)
        self._prepare(stage)

    def _prepare(self, stage: Ppo) -> None:
        """Prompts of the data and random completions, of the size of a rollout."""
        tokenizer: Any = load_tokenizer(stage.model)
        batch, group = self.args.per_device_train_batch_size, self.args.num_generations
        prompts = list(load_data(stage.data)["prompt"])[: batch // group]
        encoded = tokenizer([p for p in prompts for _ in range(group)], return_tensors="pt", padding=True)
        length = self.args.max_completion_length
        self.prompt_ids = encoded["input_ids"].to(self.device)
        self.prompt_mask = encoded["attention_mask"].to(self.device)
        completion_ids = torch.randint(4, len(tokenizer), (batch, length), device=self.device)
        mask = torch.ones_like(completion_ids, dtype=torch.bool)
        self.rollout = Rollout(
            prompts=[""] * batch,
            completions=[""] * batch,
            prompt_ids=self.prompt_ids,
            prompt_mask=self.prompt_mask.bool(),
            completion_ids=completion_ids,
            completion_mask=mask,
            action_mask=mask,
            logprobs={"behaviour": torch.zeros_like(mask, dtype=torch.float32)},
            group_size=group,
            micro_batch_size=batch,
        )
        self.outcomes = torch.tensor(odd(completion_ids.tolist()), device=self.device)
        self.generation = GenerationConfig(
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=True,
            temperature=self.args.temperature,
            top_k=self.args.top_k,
            top_p=self.args.top_p,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            disable_compile=True,
        )

    def run(self) -> dict[str, float]:
        """Seconds of each part, alone."""
        parts: dict[str, Callable[[], object]] = {
            "generation": self.generate,
            "behaviour forward": self.score_by_policy,
            "PRM forward and backward": self.learn_prm,
            "PRM scoring forward": self.score_by_prm,
            "policy update": self.update_policy,
        }
        return {name: seconds(part) for name, part in parts.items()}

    @torch.no_grad()
    def generate(self) -> None:
        """Sample the completions."""
        with self._autocast():
            self.policy.generate(
                input_ids=self.prompt_ids, attention_mask=self.prompt_mask, generation_config=self.generation
            )

    @torch.no_grad()
    def score_by_policy(self) -> None:
        """The log-probabilities that the PRM is compared with."""
        with self._autocast():
            rollout_outputs(self.policy, self.rollout)

    @torch.no_grad()
    def score_by_prm(self) -> None:
        """The token rewards, after the PRM has learnt."""
        with self._autocast():
            self.prm.score(self.rollout)

    def learn_prm(self) -> None:
        """Forward, backward and optimiser step of the PRM."""
        with self._autocast():
            loss = self.prm.loss(self.rollout, self.outcomes).mean()
        self._apply(loss, self.prm_parameters, self.prm_optimizer, 10.0)

    def update_policy(self) -> None:
        """Forward, backward and optimiser step of the policy."""
        with self._autocast():
            (log_probs,) = rollout_outputs(self.policy, self.rollout)
        loss = -((log_probs - log_probs.detach()).exp() * (self.outcomes - 0.5)[:, None]).mean()
        self._apply(loss, self.policy_parameters, self.policy_optimizer, self.args.max_grad_norm)

    @staticmethod
    def _apply(
        loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bool(self.args.bf16))


# --- the benchmark ---


def stages(options: argparse.Namespace, policy: str | Path) -> dict[str, Ppo]:
    """The stage of each arm; they differ in rewards and credit alone."""
    args = {
        "per_device_train_batch_size": options.batch,
        "num_generations": options.generations,
        "max_completion_length": options.length,
        "max_steps": options.warmup + options.steps,
    }
    return {
        name: ppo_stage(policy, QUICKSTART_PROMPTS, args, lora=options.lora, **fields)
        for name, fields in ARM_STAGES.items()
    }


def measure(options: argparse.Namespace, policy: str | Path, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Seconds by part of every round after the warm-up, for each arm and for the `parts` alone."""
    by_arm = stages(options, policy)
    parts = Parts(by_arm["prime"], folder / "parts")  # first: new arguments reset what accelerate shares
    arms = []
    for name, stage in by_arm.items():
        build = build_trl if name == "trl grpo" else build_ours
        arms.append(Arm(name, build(stage, folder / name)))
    rounds: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms} | {"parts": []}
    for number in range(options.warmup + options.steps):
        order = arms[number % len(arms) :] + arms[: number % len(arms)]  # no arm always follows the same one
        for arm in order:
            rounds[arm.name].append(arm.step())
        rounds["parts"].append(parts.run())
        if number == 0:
            print("first round done", flush=True)
    for arm in arms:
        arm.finish()
        check_lengths(arm.trainer, options.length)
    return {name: measured[options.warmup :] for name, measured in rounds.items()}


def show_arms(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Print and return the steps of the arms, and their ratios to TRL's in the same round."""
    rows, summary = [], {}
    for name in ARM_STAGES:
        steps = spread([entry["step"] for entry in rounds[name]])
        pairs = zip(rounds[name], rounds["trl grpo"], strict=True)
        ratio = spread([mine["step"] / other["step"] for mine, other in pairs])
        parts = {part: statistics.median(entry[part] for entry in rounds[name]) for part in (*TIMED, "other")}
        if name == "trl grpo":  # the reward function is a matter of microseconds, and there is no PRM
            parts |= {"scoring": 0.0, "PRM update": 0.0}
        summary[name] = {"step": steps, "ratio": ratio, "parts": parts}
        range_of = f"{steps['median']:.3g} ({steps['min']:.3g} to {steps['max']:.3g})"
        row = {"arm": name, "step (range)": range_of, "x TRL": ratio["median"], "target": TARGETS.get(name, "")}
        rows.append({**row, **parts})
    print_table("Step, in seconds (medians)", rows)
    return summary


def show_parts(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Print and return the parts alone, their sum, and how the `prime` step compares with it."""
    medians = {name: statistics.median(entry[name] for entry in rounds["parts"]) for name in rounds["parts"][0]}
    total = [sum(entry.values()) for entry in rounds["parts"]]
    # As the target was written: the PRM's forward once. It scores only after it has learnt, which is one more.
    named = [sum(entry.values()) - entry["PRM scoring forward"] for entry in rounds["parts"]]
    steps = [entry["step"] for entry in rounds["prime"]]
    ratios = {
        "all parts": statistics.median(s / t for s, t in zip(steps, total, strict=True)),
        "without the PRM's scoring forward": statistics.median(s / t for s, t in zip(steps, named, strict=True)),
    }
    parts = [{**medians, "sum": statistics.median(total)}]
    print_table("The parts of a `prime` step alone, in seconds (medians)", parts)
    rows = [{"`prime` step over the sum of": name, "ratio": r, "target": "<= 1.10"} for name, r in ratios.items()]
    print_table("The step against its parts", rows)
    return {"parts": medians, "sum": statistics.median(total), "step over sum": ratios}


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__)
    options.add_argument("--model", default="tiny", help="'tiny' (the quickstart's, from scratch) or a path")
    options.add_argument("--lora", action="store_true", help="train LoRA adapters on the model at a path")
    sizes = {
        "batch": "completions of a step",
        "length": "tokens of every completion",
        "generations": "completions per prompt",
        "steps": "rounds that are measured",
        "warmup": "rounds before them",
    }
    return parsed(options, sizes, DEFAULTS, arguments)


def main() -> None:
    """Measure, print, write."""
    options = options_of()
    with tempfile.TemporaryDirectory() as temporary, report(options) as results:
        folder = Path(temporary)
        policy = save_scratch_policy(folder / "policy") if options.model == "tiny" else options.model
        results["rounds"] = measure(options, policy, folder)
        results["arms"] = show_arms(results["rounds"])
        results["prime"] = show_parts(results["rounds"])


if __name__ == "__main__":
    main()
