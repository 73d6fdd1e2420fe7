"""Trains the stages of a plan in one or several processes, on recorded completions, and writes down what came out.

    python worker.py PLAN.json OUT

The plan names cases, each a `ppo` stage. The first run (without `replay`) samples and records completions; a run with
`replay` is given them again, so that runs of other worlds see the same rollouts.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from safetensors.torch import save_file
from transformers import PrinterCallback, set_seed

from rlhf_kit.data.load import load_data
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.models.zero3 import whole
from rlhf_kit.trainers.config import Ppo
from rlhf_kit.trainers.ppo import PpoTrainer
from rlhf_kit.trainers.ppo_parts import critic_parameters
from rlhf_kit.trainers.run_ppo import ppo_args
from rlhf_kit.trainers.setup import StageRun

torch.set_num_threads(1)

Recording = list[dict[str, list[list[int]]]]  # of each rollout: the completions of each prompt


class Recorded(PpoTrainer):
    """The trainer on recorded completions, or one that records them."""

    recording: Recording
    replays: bool
    seen: dict[str, torch.Tensor]
    widths: list[int]  # of this rank's rollouts, in tokens
    nan_at: int | None  # the micro-step in which the last rank's loss is not finite

    def auxiliary_loss(self, output: Any, batch: Any) -> torch.Tensor | None:
        loss = super().auxiliary_loss(output, batch)
        last = self.accelerator.process_index == self.accelerator.num_processes - 1
        if loss is not None and last and self.micro_step == self.nan_at:
            loss = loss * torch.nan
        return loss

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        keys = [" ".join(map(str, ids)) for ids in prompt_ids]
        if self.replays:
            waiting = {key: iter(ids) for key, ids in self.recording.pop(0).items()}
            return [list(next(waiting[key])) for key in keys], None
        completions, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        rollout = defaultdict(list)
        for key, ids in zip(keys, completions, strict=True):
            rollout[key].append(ids)
        self.recording.append(rollout)
        return completions, logprobs


def keep_what_is_assigned(trainer: Recorded) -> None:
    """Put the rewards, advantages and returns of all ranks into `trainer.seen`, rollout by rollout."""
    write, trainer.seen, trainer.widths = trainer.rollout_log.write, {}, []

    def keep(*args: Any) -> None:
        _, rollout, _, weighted, _, credited = args
        trainer.widths.append(rollout.action_mask.shape[1])
        number = sum(name.endswith(".advantages") for name in trainer.seen)
        kept = {source.name: source.tokens for source in weighted} | {"advantages": credited.advantages}
        kept |= {} if credited.returns is None else {"returns": credited.returns}
        trainer.seen |= {f"{number}.{name}": value.clone().contiguous() for name, value in kept.items()}
        write(*args)

    trainer.rollout_log.write = keep


def parts(trainer: Recorded) -> dict[str, list[torch.nn.Parameter]]:
    """What learns, apart: policy, critic and PRM."""
    prm = [parameter for source in trainer.scoring.sources for parameter in source.trainable_parameters()]
    critic = critic_parameters(trainer.model)
    apart = {id(parameter) for parameter in (*prm, *critic)}
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return {"policy": [p for p in trained if id(p) not in apart], "critic": critic, "prm": prm}


def snapshot(parameters: dict[str, list[torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    """Each part as one vector."""
    found = {}
    for name, part in parameters.items():
        with whole(part):
            if part:
                found[name] = torch.cat([parameter.detach().float().flatten() for parameter in part]).clone()
    return found


def run(case: dict[str, Any], out: Path) -> None:
    """Train one case and write `<out>/<name>.safetensors` and `.json`."""
    config = Ppo.model_validate(case["stage"])
    args = ppo_args(config, StageRun(out / case["name"]))
    set_seed(args.seed)
    trainer = Recorded(
        config=config,
        model=load_model(config.model),
        processing_class=load_tokenizer(config.model),
        args=args,
        train_dataset=load_data(config.data),
        functions={"odd": odd},
    )
    trainer.remove_callback(PrinterCallback)
    trainer.replays, trainer.nan_at = "replay" in case, case.get("nan_at")
    trainer.recording = json.loads(Path(case["replay"]).read_text()) if trainer.replays else []
    keep_what_is_assigned(trainer)
    for update in trainer.scoring.online.values():  # as the policy's: Adam makes noise of gradients that are almost 0
        update.optimizer = torch.optim.SGD(update.optimizer.param_groups[0]["params"], lr=args.learning_rate)
    learning = parts(trainer)
    before = snapshot(learning)
    trainer.train()
    after = snapshot(learning)
    widths = gather_object([trainer.widths])
    if trainer.accelerator.is_main_process:
        moved = {f"moved.{name}": after[name] - before[name] for name in after}
        save_file({**trainer.seen, **moved}, out / f"{case['name']}.safetensors")
        if not trainer.replays:
            (out / f"{case['name']}.rollouts.json").write_text(json.dumps(trainer.recording))
        facts = {
            "world_size": trainer.accelerator.num_processes,
            "distributed_type": trainer.accelerator.distributed_type.value,
            "zero_stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
            "steps": trainer.state.global_step,
            "widths": widths,
            "skipped": trainer.guard.skipped,
            "logs": [entry for entry in trainer.state.log_history if "reward" in entry],
            "checkpointing": trainer.args.gradient_checkpointing,
        }
        (out / f"{case['name']}.json").write_text(json.dumps(facts))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()


def odd(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """An outcome that both right and wrong completions of a small policy have."""
    return [float(sum(ids) % 2) for ids in completion_ids]


if __name__ == "__main__":
    plan, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for one in plan:
        run(one, folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
