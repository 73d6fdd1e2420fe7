"""PPO on TRL's GRPOTrainer: token rewards of any sources, (B, T) advantages, a critic, an online PRM."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig

from rlhf_kit.config import SEED_STRIDE
from rlhf_kit.credit import AdaptiveKl, kl_penalty, last_action_index, masked_mean
from rlhf_kit.credit.spans import segment, step_ids
from rlhf_kit.data.messages import completion_text
from rlhf_kit.data.tools import TOOLS
from rlhf_kit.evals.accuracy import greedy_scores
from rlhf_kit.models.critic import add_critic, values_of_completion
from rlhf_kit.models.scorer import rollout_outputs
from rlhf_kit.models.stopping import ends_with_stop_string, generate_until
from rlhf_kit.rewards.config import BuildContext
from rlhf_kit.rollout import Rollout, Text
from rlhf_kit.trainers.assign import Episode, WeightedRewards, assign_credit
from rlhf_kit.trainers.config import Critic, Ppo
from rlhf_kit.trainers.diagnostics import RolloutLog
from rlhf_kit.trainers.losses import joint_prm_loss_of, kl_of, value_loss_of
from rlhf_kit.trainers.ppo_parts import (
    FollowPolicy,
    average_of,
    build_critic,
    critic_parameters,
    join_prm,
    reference_of,
    refuse_what_cannot_run,
    regroup,
)
from rlhf_kit.trainers.ppo_state import load_state, save_state
from rlhf_kit.trainers.resampling import Resampler
from rlhf_kit.trainers.rollouts import Ranks, build_rollout, decoded, masked_by, truncated_rows
from rlhf_kit.trainers.scoring import RowScores, Scores, Scoring
from rlhf_kit.trainers.trl_compat import Batch, CreditTrainer, Generated, Row
from rlhf_kit.trainers.update_guard import UpdateGuard


class PpoTrainer(CreditTrainer):
    """Trains a policy on the credit that the recipe's sources and estimator give to its tokens.

    Args:
        config: the `ppo` stage.
        model: the policy, with a LoRA adapter or whole.
        processing_class: its tokenizer.
        args: TRL's configuration; its `beta` is 0, for the KL belongs to `config.credit.kl`.
        train_dataset, eval_dataset: prompts with the columns that the sources need.
        functions: reward functions by name.
        log_samples: receives the samples of a rollout, for the report.
    """

    def __init__(
        self,
        config: Ppo,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase,
        args: GRPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        log_samples: Callable[[int, list[dict[str, Any]]], object] | None = None,
    ) -> None:
        self.config = config
        names = [source.source_name for source in config.rewards]
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=list(callbacks),
            reward_names=names,
            tools=[TOOLS[name] for name in config.tools] or None,
        )
        self.ranks = Ranks(self.accelerator)
        policy: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        context = BuildContext(
            self.model, config.model, self.temperature, self.accelerator.device, functions or {}, self.processing_class
        )
        sources = [source.build(context) for source in config.rewards]
        if config.stop_strings and not self.use_vllm:
            policy.generate = partial(generate_until, policy.generate, self.processing_class, config.stop_strings)
        self.scoring = Scoring(config.rewards, sources, config.accuracy_band, self.ranks)
        self.needs = frozenset().union(*(source.needs for source in sources))
        kl = config.credit.kl
        self.uses_kl = kl.coefficient > 0
        self.kl_coefficient = kl.coefficient
        self.reference = reference_of(self.model, context) if self.uses_kl or "reference" in self.needs else None
        self.average = average_of(self.model, context, config.ema_decay) if "ema" in self.needs else None
        if self.average is not None:
            self.add_callback(FollowPolicy(self.average))
        self.critic_config = (config.critic or Critic()) if config.credit.estimator == "gae" else None
        if self.critic_config is not None:
            add_critic(policy, build_critic(self.critic_config, policy, config.model))
        self.joint_prm = join_prm(policy, self.model, self.scoring.sources)
        self._joint_prm_learns = False
        refuse_what_cannot_run(self)
        self.rollout_log = RolloutLog(config, self.processing_class, self.ranks, log_samples)
        self.guard = UpdateGuard(config.max_skipped_steps, self.ranks)
        self.evaluations: list[tuple[int, float]] = []
        self._judged: list[RowScores] = []  # what is known of the next rollout's rows

    # -- rollout ----------------------------------------------------------------------------------------------------

    def prepare_rows(self, rows: list[Row]) -> tuple[list[Row], Generated | None]:
        """With `accuracy_band.mode: resample`, rows of prompts in the band and their completions."""
        band = self.config.accuracy_band
        if band is None or band.mode != "resample":
            return rows, None
        resample = Resampler(
            self.train_dataset, self.num_generations, band.max_rounds, self.generate_rows, self._in_band, self.ranks
        )
        seed = (self.args.seed * SEED_STRIDE + self.micro_step) * 1_009 + self.accelerator.process_index
        rows, generated, self._judged, rounds = resample(rows, seed)
        self.log_metric("credit/resample_rounds", float(rounds))
        return rows, generated

    def _in_band(self, rows: list[Row], generated: Generated) -> tuple[Tensor, list[RowScores]]:
        _, completion_ids, tool_masks, completions, *_ = generated
        mask = pad_sequence([torch.ones(len(ids), dtype=torch.bool) for ids in completion_ids], batch_first=True)
        ids = pad_sequence([torch.tensor(ids) for ids in completion_ids], batch_first=True)
        batch = {"completion_ids": ids, "completion_mask": mask, "prompt_ids": ids[:, :0], "prompt_mask": mask[:, :0]}
        if tool_masks is not None:
            own = [torch.tensor(row) for row in tool_masks]
            batch["tool_mask"] = pad_sequence(own, batch_first=True)
        rollout = self._rollout(batch, rows, [row["prompt"] for row in rows], completions)
        return self.scoring.local_band(decoded(self.processing_class, rollout))

    def ended_by_stop_string(self, ids: list[int]) -> bool:
        return ends_with_stop_string(self.processing_class, ids, self.config.stop_strings)

    # -- credit -----------------------------------------------------------------------------------------------------

    def assign_credit(self, batch: Batch, rows: list[Row], prompts: list[Text], completions: list[Text]) -> Batch:
        """Score the rollout by every source and put the advantages of its tokens into the batch."""
        rollout = self._rollout(batch, rows, prompts, completions)
        decode = partial(decoded, self.processing_class, rollout)
        rollout = self.ranks.agreed("decoding of the completions", decode)
        judged, self._judged = self._judged, []
        self.scoring.begin(rollout, judged)
        truncated = truncated_rows(rollout, self.eos_token_ids, self.ended_by_stop_string)
        with torch.no_grad(), self.without_checkpointing(), self.accelerator.autocast():
            rollout, state_values = self._add_log_probs(rollout, batch.get("old_per_token_logps"))
            scores = self.scoring.score_outcomes(rollout, judged)
        if self.config.truncation.policy == "mask":
            scores.valid &= ~truncated
        with self.accelerator.autocast():
            rollout = self.scoring.learn_and_score(rollout, scores)
        weighted = self.scoring.weighted(rollout, scores)
        weighted += self._kit_rewards(rollout, scores, truncated)
        episode = self._episode(rollout, scores, truncated, state_values)
        credited = assign_credit(self.config.credit, weighted, episode)
        advantages = self.ranks.own_rows(credited.advantages, rollout.action_mask)
        batch["advantages"] = advantages
        if state_values is not None and credited.returns is not None:
            batch["old_values"] = values_of_completion(state_values, rollout.action_mask.shape[1])
            batch["returns"] = self.ranks.own_rows(credited.returns, rollout.action_mask)
        if self.uses_kl and self.config.credit.kl.where == "loss":
            batch["reference_logprobs"] = rollout.logprobs["reference"]
        if self.joint_prm is not None and scores.outcomes is not None:
            batch["prm_reference"] = self.joint_prm.reference_log_probs(rollout)
            batch["prm_labels"] = scores.outcomes
            batch["prm_offsets"] = self.joint_prm.offsets(rollout, scores.outcomes)
        self._drop_rows(batch, rollout, self.ranks.own_rows(episode.valid, scores.valid))
        self.rollout_log.write(self, rollout, scores, weighted, episode, credited)
        return batch

    def _rollout(self, batch: Batch, rows: list[Row], prompts: list[Text], completions: list[Text]) -> Rollout:
        return build_rollout(
            batch,
            rows,
            prompts,
            completions,
            temperature=self.temperature,
            group_size=self.num_generations,
            micro_batch_size=self.args.per_device_train_batch_size,
            step=self.state.global_step,
        )

    @torch.no_grad()
    def _add_log_probs(self, rollout: Rollout, known: Tensor | None) -> tuple[Rollout, Tensor | None]:
        """Log-probabilities that a source or the KL asks for, and the critic's values, in one pass a model.

        Those of the policy are `known` where TRL needs them itself, by the same head in the same batches.
        """
        log_probs: dict[str, Tensor] = {}
        state_values = None
        if self.critic_config is not None:
            log_probs["behaviour"], state_values = rollout_outputs(
                self.model, rollout, ("log_probs", "state_values"), with_values=True
            )
        elif known is not None:
            log_probs["behaviour"] = masked_by(rollout.completion_mask, known.float())
        elif self.uses_kl or "behaviour" in self.needs:
            (log_probs["behaviour"],) = rollout_outputs(self.model, rollout)
        if self.reference is not None:
            log_probs["reference"] = self.reference(rollout)
        if self.average is not None:
            log_probs["ema"] = self.average(rollout)
        return replace(rollout, logprobs=log_probs), state_values

    def _kit_rewards(self, rollout: Rollout, scores: Scores, truncated: Tensor) -> list[WeightedRewards]:
        """The KL penalty and the penalty on cut-off completions, as sources of their own."""
        rewards = []
        if self.uses_kl:
            kl = self.config.credit.kl
            penalty = kl_penalty(rollout.logprobs["behaviour"], rollout.logprobs["reference"], kl.estimator)
            penalty = self.ranks.all_rows(masked_by(rollout.action_mask & scores.valid[:, None], penalty))
            live = self.ranks.all_rows(rollout.action_mask & scores.valid[:, None])
            scores.metrics["kl"] = masked_mean(penalty, live).item()
            scores.metrics["credit/kl_coefficient"] = self.kl_coefficient
            if kl.where == "reward":
                rewards.append(WeightedRewards("kl", "process", -self.kl_coefficient * penalty))
            per_completion = penalty.sum().item() / max(int(live.any(dim=1).sum()), 1)
            if kl.target is not None and math.isfinite(per_completion):
                control = AdaptiveKl(self.kl_coefficient, kl.target, kl.adaptation_horizon)
                self.kl_coefficient = control.update(per_completion, len(live))
        if self.config.truncation.policy == "penalty":
            last = last_action_index(rollout.action_mask)
            tokens = torch.zeros_like(rollout.action_mask, dtype=torch.float32)
            hit = truncated & rollout.action_mask.any(dim=1)
            tokens[hit, last[hit]] = self.config.truncation.penalty
            rewards.append(WeightedRewards("truncation", "outcome", self.ranks.all_rows(tokens)))
        return rewards

    def _episode(self, rollout: Rollout, scores: Scores, truncated: Tensor, state_values: Tensor | None) -> Episode:
        mask, valid = self.ranks.all_rows(rollout.action_mask), self.ranks.all_rows(scores.valid)
        if rollout.group_size > 1:
            crowd = valid.view(-1, rollout.group_size).sum(dim=1).repeat_interleave(rollout.group_size)
            scores.metrics["credit/small_groups"] = ((crowd == 1) & valid).float().mean().item()
            if self.config.credit.needs_groups:
                valid = valid & (crowd > 1)
        values = bootstrap = steps = None
        length = rollout.action_mask.shape[1]
        if state_values is not None:
            values = self.ranks.all_rows(values_of_completion(state_values, length))
            if self.config.truncation.policy == "bootstrap":
                last = last_action_index(rollout.action_mask).clamp(min=0)
                behind = state_values[:, -length:].gather(1, last[:, None]).squeeze(1)
                bootstrap = self.ranks.all_rows(torch.where(truncated, behind, 0.0))
        if self.config.credit.estimator == "min_form":
            texts = [completion_text(completion) for completion in rollout.completions]
            segments = [segment(text, self.config.credit.step_pattern) for text in texts]
            steps = self.ranks.all_rows(step_ids(rollout.offsets, segments, rollout.action_mask) + 1) - 1
        return Episode(mask, valid, rollout.group_size, values, bootstrap, steps)

    def _drop_rows(self, batch: Batch, rollout: Rollout, valid: Tensor) -> None:
        """Rows that do not count leave the policy, KL, entropy and value losses, and the token count of all."""
        live = rollout.action_mask & valid[:, None]
        if not bool(valid.all()):
            batch["tool_mask"] = live.to(batch["completion_mask"].dtype)
        batch["num_items_in_batch"] = self.ranks.sum(live.sum())
        if self.joint_prm is not None:
            batch["prm_rows"] = self.ranks.sum(live.any(dim=1).sum())

    # -- loss -------------------------------------------------------------------------------------------------------

    def forward_options(self) -> dict[str, Any]:
        options = {
            "with_values": self.critic_config is not None,
            "detach_hidden": self._critic_warms_up(),
            "with_prm": self.joint_prm is not None,
        }
        return {name: True for name, wanted in options.items() if wanted}

    def auxiliary_loss(self, output: Any, batch: Batch) -> Tensor | None:
        """Value loss, KL in the loss and a joint PRM's loss; those on tokens share the policy loss's token count."""
        mask = batch["completion_mask"].bool()
        if "tool_mask" in batch:
            mask = mask & batch["tool_mask"].bool()
        self.guard.add_live_tokens(mask)
        tokens = self.share_of_update(batch["num_items_in_batch"])
        losses = []
        if self.critic_config is not None:
            loss = value_loss_of(output, batch, mask, self.critic_config.clip) / tokens
            self._log_loss("value/loss", loss)
            losses.append(self.critic_config.coefficient * loss)
        if "reference_logprobs" in batch:
            penalty = kl_of(output, batch, mask, self.config.credit.kl.estimator) / tokens
            losses.append(self.kl_coefficient * self.policy_loss_scale() * penalty)
        if self.joint_prm is not None:
            rows = self.share_of_update(batch["prm_rows"])
            loss = joint_prm_loss_of(output, batch, mask, self.joint_prm.config.beta) / rows
            if self.first_pass_over_rollout:
                self._log_loss(f"prm/{self.joint_prm.name}/loss", loss)
            self._joint_prm_learns |= self.first_pass_over_rollout
            # In later passes the PRM's parameters stay in the graph: DDP waits for the gradient of each.
            losses.append(loss * float(self.first_pass_over_rollout))
        return torch.stack(losses).sum() if losses else None

    def _log_loss(self, name: str, loss: Tensor) -> None:
        """Log a micro-batch's share of an update's mean over all ranks."""
        self.log_metric(name, self.ranks.mean(loss.detach()).item() * self.current_gradient_accumulation_steps)

    def policy_loss_scale(self) -> float:
        return 0.0 if self._critic_warms_up() else 1.0

    def still_parameters(self) -> list[torch.nn.Parameter]:
        prm = self.joint_prm.trainable_parameters() if self.joint_prm else []
        still = [] if self._joint_prm_learns else prm  # else the optimiser's momentum would move it without a loss
        if self._critic_warms_up():
            learning = {id(parameter) for parameter in (*critic_parameters(self.model), *prm)}
            still = [*still, *(p for p in self.model.parameters() if id(p) not in learning)]
        return still

    def _critic_warms_up(self) -> bool:
        return self.critic_config is not None and self.state.global_step < self.critic_config.warmup_steps

    def update_is_sound(self, loss: Tensor | None, grad_norm: float | None) -> bool:
        if loss is not None:
            return self.guard.loss_is_finite(loss)
        self._joint_prm_learns = False
        verdict = self.guard.close_window(grad_norm, self.state.global_step)
        self.log_metric("skipped_steps", float(self.guard.skipped))
        self.log_metric("empty_steps", float(verdict == "empty"))
        return verdict == "sound"

    @property
    def last_evaluated(self) -> int | None:
        """The step of the last evaluation."""
        return self.evaluations[-1][0] if self.evaluations else None

    def kit_parameters(self) -> list[torch.nn.Parameter]:
        learnt = [parameter for source in self.scoring.sources for parameter in source.trainable_parameters()]
        return [*critic_parameters(self.model), *learnt, *(self.average.parameters() if self.average else ())]

    def save_kit_state(self, folder: Path) -> None:
        save_state(self, folder)

    def load_kit_state(self, folder: Path) -> None:
        load_state(self, folder)

    def rank_state(self) -> dict[str, Any]:
        return {"judges": self.scoring.used_by_judges()}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        self.scoring.resume_judges(state["judges"])

    # -- parts ------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """TRL's optimiser, with the critic and a joint PRM in groups of their own learning rates."""
        optimizer = super().create_optimizer(model)
        if self.critic_config is not None and self.critic_config.learning_rate is not None:
            regroup(optimizer, critic_parameters(self.model), self.critic_config.learning_rate)
        if self.joint_prm is not None and self.joint_prm.config.online is not None:
            regroup(optimizer, self.joint_prm.trainable_parameters(), self.joint_prm.config.online.learning_rate)
        return optimizer

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out accuracy by greedy decoding."""
        dataset: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        assert self.config.evaluation is not None
        training = self.model.training
        with self.eval_mode_generation() as model:
            scores = greedy_scores(
                model,
                self.processing_class,
                dataset,
                self.config.evaluation,
                self.accelerator.process_index,
                self.accelerator.num_processes,
                on_batch=lambda done, total: self.callback_handler.call_event(
                    "on_prediction_step", self.args, self.state, self.control, done=done, total=total
                ),
            )
        scores = self.ranks.all_objects(scores)
        self.model.eval()
        metrics = {f"{metric_key_prefix}_accuracy": sum(scores) / len(scores)}
        self.log(dict(metrics))
        self.model.train(training)
        self.evaluations.append((self.state.global_step, metrics[f"{metric_key_prefix}_accuracy"]))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
