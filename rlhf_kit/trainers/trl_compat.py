"""TRL's GRPOTrainer with hooks. Only the modules `trl_*` touch TRL's and transformers' private names.

`CreditTrainer` is TRL's GRPOTrainer with four public hooks in place of its scalar rewards. TRL's loss takes
advantages of shape (B, T) from a subclass; everything else of GRPOTrainer (generation, vLLM, tools, the fused head,
PEFT, DeepSpeed) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from rlhf_kit.models.zero3 import whole
from rlhf_kit.rollout import Text
from rlhf_kit.trainers.checkpoints import disown
from rlhf_kit.trainers.export import without_kit_modules
from rlhf_kit.trainers.trl_vllm import leave_out_kit_modules

PROGRESS_FILE = "progress-{rank}.pt"
Batch = dict[str, Any]
Row = dict[str, Any]
Generated = tuple[Any, ...]


class ForwardRecorder:
    """Calls the model with more options than TRL knows of, and keeps the output that TRL throws away."""

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        self._model = model
        self._options = options
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self._model(*args, **kwargs, **self._options)
        return self.output


class EpochSampler(RepeatSampler):
    """TRL's sampler, whose order in an epoch can be found again without the epochs before."""

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of `epoch`: TRL draws one permutation after the other from one generator."""
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


class CreditTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages, extra losses and skipped updates are decided by a subclass.

    Hooks:
        assign_credit: token advantages of a generated batch.
        forward_options, auxiliary_loss: what else the policy's forward computes, and the loss on it.
        update_is_sound: whether the accumulated gradient may be applied.
    """

    # transformers declares these wider than GRPOTrainer keeps them.
    args: GRPOConfig
    model: Any
    model_wrapped: Any
    processing_class: Any
    train_dataset: Any
    num_generations: int

    def __init__(self, *args: Any, reward_names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, reward_funcs=cast(Any, [_placeholder(name) for name in reward_names]), **kwargs)
        self._texts: tuple[list[Text], list[Text]] = ([], [])
        self._prepared: Generated | None = None
        self._progress: dict[str, Any] | None = None
        self._dropping: list[Any] = []
        if self.use_vllm:
            leave_out_kit_modules(self.vllm_generation)

    # -- hooks ------------------------------------------------------------------------------------------------------

    def prepare_rows(self, rows: list[Row]) -> tuple[list[Row], Generated | None]:
        """The rows of the rollout, and their completions if they have been generated already."""
        return rows, None

    def ended_by_stop_string(self, ids: list[int]) -> bool:
        """Whether the last token of a completion completes a stop string."""
        return False

    def generate_rows(self, rows: list[Row]) -> Generated:
        """What TRL's generation gives for `rows`: a tuple of lists, each with one entry a row, or None."""
        return self._generate_and_log([row["prompt"] for row in rows])

    def assign_credit(self, batch: Batch, rows: list[Row], prompts: list[Text], completions: list[Text]) -> Batch:
        """`batch` with `advantages` of shape (B, T)."""
        raise NotImplementedError

    def forward_options(self) -> dict[str, Any]:
        """More keyword arguments of the policy's forward in the loss."""
        return {}

    def auxiliary_loss(self, output: Any, batch: Batch) -> Tensor | None:
        """A loss beside the policy's, from the forward's output."""
        return None

    def policy_loss_scale(self) -> float:
        """What the policy's loss is multiplied by (0 while only the critic learns)."""
        return 1.0

    def still_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that this update leaves as they are, weight decay included."""
        return ()

    def update_is_sound(self, loss: Tensor | None, grad_norm: float | None) -> bool:
        """Whether this loss may be differentiated, or this accumulated gradient applied; agreed by all ranks."""
        return True

    # -- generation and scoring -------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # Sources run later, on the padded batch and its log-probabilities; until then TRL sees zeros.
        self._texts = (prompts, completions)
        rewards = torch.zeros(len(prompts), len(self.reward_funcs), device=self.accelerator.device)
        return self.accelerator.gather(rewards)

    def _generate_and_score_completions(self, inputs: list[Row]) -> Batch:
        if self.model.training:
            inputs, self._prepared = self.prepare_rows(inputs)
        batch = super()._generate_and_score_completions(inputs)
        prompts, completions = self._texts
        return self.assign_credit(batch, inputs, prompts, completions)

    def _generate_single_turn(self, *args: Any, **kwargs: Any):
        completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        if not self.use_vllm:
            # A row that ended by a stop string has no end-of-sequence token, so TRL takes its padding for actions.
            pad = self.processing_class.pad_token_id
            completion_ids = [_unpadded(ids, pad, self.ended_by_stop_string) for ids in completion_ids]
        return completion_ids, logprobs

    def _generate(self, prompts: list[Text]):
        if self._prepared is not None:
            generated, self._prepared = self._prepared, None
            return generated
        return self._generate_and_log(prompts)

    def _generate_and_log(self, prompts: list[Text]) -> Generated:
        """TRL's generation, with rows that ended by a stop string among those that it logs as terminated."""
        generated = super()._generate(prompts)
        device = self.accelerator.device
        stopped = torch.tensor([self.ended_by_stop_string(ids) for ids in generated[1]], device=device)
        if not cast(Tensor, self.accelerator.gather(stopped)).any():
            return generated
        ends = {*self.eos_token_ids, self.processing_class.pad_token_id}  # as TRL counts
        ended = stopped | torch.tensor([not ends.isdisjoint(ids[-1:]) for ids in generated[1]], device=device)
        lengths = torch.tensor([float(len(ids)) for ids in generated[1]], device=device)
        ended = cast(Tensor, self.accelerator.gather(ended))
        lengths = cast(Tensor, self.accelerator.gather(lengths))[ended]
        self.replace_metric("completions/clipped_ratio", 1 - ended.float().mean().item())
        for name, value in (("mean", lengths.mean()), ("min", lengths.min()), ("max", lengths.max())):
            self.replace_metric(f"completions/{name}_terminated_length", value.item())
        return generated

    def eval_mode_generation(self) -> AbstractContextManager[Any]:
        """The policy, gathered and in evaluation mode, ready for `generate`."""
        return unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=self._checkpointing,
        )

    @property
    def _checkpointing(self) -> dict[str, Any] | None:
        return cast("dict[str, Any] | None", self.args.gradient_checkpointing_kwargs)

    def without_checkpointing(self) -> AbstractContextManager[Any]:
        """Gradient checkpointing off, for passes without gradients."""
        return disable_gradient_checkpointing(self.model, self._checkpointing)

    # -- loss and update --------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        recorder = ForwardRecorder(model, self.forward_options())
        loss = super()._compute_loss(recorder, inputs) * self.policy_loss_scale()
        extra = self.auxiliary_loss(recorder.output, inputs)
        if extra is not None:
            loss = loss + extra
        if not self.update_is_sound(loss, None):
            # The backward must still run on every rank, or the others wait for it for ever; its gradients are dropped.
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._dropping = [parameter.register_hook(torch.zeros_like) for parameter in trainable]
            loss = torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0) * 0.0
        return loss

    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        finally:
            for hook in self._dropping:
                hook.remove()
            self._dropping = []

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = norm.item() if isinstance(norm, Tensor) else norm
        for parameter in self.still_parameters():
            parameter.grad = None
        if not self.update_is_sound(None, value):
            # With no gradient the optimiser leaves weights, moments and weight decay alone.
            for parameter in model.parameters():
                parameter.grad = None
        return norm

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def kit_parameters(self) -> Iterable[nn.Parameter]:
        """What the kit adds to the policy and its engine does not keep."""
        return ()

    def save_kit_state(self, folder: Path) -> None:
        """Write what the kit adds to a checkpoint; called on the main process."""

    def load_kit_state(self, folder: Path) -> None:
        """Read back what `save_kit_state` wrote; called on every process."""

    def rank_state(self) -> dict[str, Any]:
        """What this process alone knows and a run that goes on needs."""
        return {}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Read back what `rank_state` gave."""

    def _save_checkpoint(self, model, trial):
        # Before the rest: the trainer's state is written last, and says that the checkpoint is whole.
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}" / "kit"
        folder.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            disown(folder.parent)
        with whole(self.kit_parameters()):
            if self.accelerator.is_main_process:
                self.save_kit_state(folder)
        self._save_progress(folder)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # every rank's files are there before the state says so

    def _save_progress(self, folder: Path) -> None:
        """Write what TRL and transformers forget: the rollout that is in use, and what has not been logged yet."""
        in_use = self._step % (cast(int, self.args.steps_per_generation) * self.num_iterations) != 0
        progress = {
            "micro_step": self._step,
            "rollout": self._buffered_inputs if in_use else None,
            "metrics": dict(self._metrics["train"]),
            "loss": self._tr_loss,
            "last_logged": self._globalstep_last_logged,
            "own": self.rank_state(),
        }
        torch.save(progress, folder / PROGRESS_FILE.format(rank=self.accelerator.process_index))

    def _restore_progress(self, progress: dict[str, Any]) -> None:
        self._step, self._buffered_inputs = progress["micro_step"], progress["rollout"]
        self._metrics["train"].update(progress["metrics"])
        self._tr_loss, self._globalstep_last_logged = progress["loss"], progress["last_logged"]

    def log_what_is_left(self) -> None:
        """Log what a stage that was stopped behind its last checkpoint would have logged at its end."""
        if self._progress is not None:
            self._restore_progress(self._progress)
            self._progress = None
            self.model.train()  # TRL logs what belongs to the model's mode
            self.log({"total_flos": self.state.total_flos})

    def _run_epoch(self, *args, epoch, **kwargs):
        self._sampler.set_epoch(epoch)
        if self._progress is not None:  # transformers has put its own state in order by now
            self._restore_progress(self._progress)
            self._progress = None
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _get_train_sampler(self, dataset=None):
        trl = cast(RepeatSampler, super()._get_train_sampler(dataset))
        self._sampler = EpochSampler(
            trl.data_source, trl.mini_repeat_count, trl.batch_size, trl.repeat_count, trl.shuffle, trl.seed
        )
        return self._sampler

    def _save(self, output_dir=None, state_dict=None):
        state = state_dict if state_dict is not None else dict(self.model.state_dict())
        super()._save(output_dir, state_dict=without_kit_modules(state))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_kit(resume_from_checkpoint)

    def _load_kit(self, checkpoint: str) -> None:
        folder = Path(checkpoint) / "kit"
        with whole(self.kit_parameters(), modify=True):
            self.load_kit_state(folder)
        file = folder / PROGRESS_FILE.format(rank=self.accelerator.process_index)
        progress = torch.load(file, map_location="cpu", weights_only=True)
        self.load_rank_state(progress["own"])
        self._progress = cast("dict[str, Any]", send_to_device(progress, self.accelerator.device))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:  # which reads its checkpoint in a way of its own
            self._load_kit(checkpoint)

    # -- log --------------------------------------------------------------------------------------------------------

    def log_metric(self, name: str, value: float, mode: str | None = None) -> None:
        """Add a value to the metric `name`; what is added until the next log is averaged."""
        self._metrics[mode or ("train" if self.model.training else "eval")][name].append(value)

    def replace_metric(self, name: str, value: float) -> None:
        """Put `value` in the place of what TRL has just logged under its own name."""
        values = self._metrics["train" if self.model.training else "eval"][name]
        values[-1:] = [value]

    def replace_completion_log(self, rewards: dict[str, list[float]], advantages: list[float]) -> None:
        """Put the real rewards and advantages (of all ranks) in TRL's table of completions."""
        for name, values in rewards.items():
            log = self._logs["rewards"][name]
            for _ in range(min(len(values), len(log))):
                log.pop()
            log.extend(values)
        log = self._logs["advantages"]
        for _ in range(min(len(advantages), len(log))):
            log.pop()
        log.extend(advantages)

    def share_of_update(self, count: Tensor) -> Tensor:
        """From the tokens (or rows) of a rollout, over all ranks, to what a sum over a micro-batch is divided by.

        The gradients of an update, added over its micro-batches and averaged over ranks, are then those of the mean.
        It is TRL's own normaliser of `dapo`.
        """
        per_rank = count.clamp(min=1.0) / self.accelerator.num_processes
        return per_rank * self.current_gradient_accumulation_steps / self.args.steps_per_generation

    @property
    def micro_step(self) -> int:
        """Forward and backward passes so far."""
        return self._step

    @property
    def first_pass_over_rollout(self) -> bool:
        """True in the first of `num_iterations` passes over a rollout."""
        steps = cast(int, self.args.steps_per_generation)
        return self._step % (steps * self.num_iterations) < steps


def _placeholder(name: str) -> Callable[..., list[float]]:
    """A reward function of that name; TRL wants one per reward to name its metrics."""

    def reward(completions: list[Text], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    reward.__name__ = name
    return reward


def _unpadded(ids: list[int], pad: int, ended_by_stop_string: Callable[[list[int]], bool]) -> list[int]:
    """`ids` without padding behind a stop string; a single token of padding may be an end of sequence."""
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return ids[:end] if ended_by_stop_string(ids[:end]) else ids
