"""The `preference` stage: DPO, KTO and ORPO, and the offline objectives that TRL does not have."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer

from rlhf_kit.data.config import DataConfig, Sampled
from rlhf_kit.data.load import load_with_origins
from rlhf_kit.errors import RunError
from rlhf_kit.models.loading import load_tokenizer
from rlhf_kit.objectives.base import PAIRED
from rlhf_kit.objectives.trl import TrlObjective
from rlhf_kit.trainers.args import measures_loss
from rlhf_kit.trainers.config import Preference
from rlhf_kit.trainers.export import export_model, write_prm_record
from rlhf_kit.trainers.held_out import HeldOutPairs, HeldOutPrompts
from rlhf_kit.trainers.offline import (
    check_columns,
    objective_rows,
    offline_trainer,
    sampler_of,
    trl_rows,
    with_sampled_ids,
)
from rlhf_kit.trainers.setup import StageRun, train, without_printing
from rlhf_kit.trainers.trl_offline import longest


def run_preference(stage: Preference, run: StageRun) -> dict[str, Any]:
    """Train, write `model/`, and return the stage's results: with `eval_data`, what was measured on them.

    Raises:
        RunError: the data lack a column that the objective reads.
    """
    tokenizer = load_tokenizer(stage.model)
    rows = StageRows(stage, run, tokenizer)
    held_out = rows.pairs()
    evaluates = held_out is None or measures_loss(stage)  # pairs are judged all the same
    eval_data = stage.eval_data if evaluates else None
    trainer, reference = offline_trainer(stage, stage.objective, run, tokenizer, rows.encoded, eval_data)
    without_printing(trainer)
    pairs = HeldOutPairs(trainer, reference, tokenizer, held_out, stage.reference is None, run)
    prompts = HeldOutPrompts(trainer, tokenizer, stage.evaluation, run)
    started = {**pairs.start(), **prompts.start()}
    if started and run.last_checkpoint() is None:
        _log(trainer, {name.removesuffix("_start"): value for name, value in started.items()})
    train(trainer, run)
    if trainer.is_world_process_zero():  # before the model, for it is uploaded with it
        reference_model = stage.reference or stage.model
        write_prm_record(run.folder / "model", getattr(stage.objective, "beta", 1.0), reference_model.path)
    export_model(trainer, run.folder / "model")
    results: dict[str, Any] = {"updates": trainer.state.global_step, **rows.left_out}
    for name, count in getattr(trainer, "cut", {}).items():
        results[name] = results.get(name, 0) + count
    results |= started
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        results |= {name: value for name, value in metrics.items() if name.startswith(("eval_loss", "eval_rewards/"))}
    ended = {**pairs.end(), **prompts.end()}
    _log(trainer, ended)
    return {**results, **ended}


def _log(trainer: Trainer, results: dict[str, Any]) -> None:
    numbers = {name: value for name, value in results.items() if isinstance(value, float)}
    if numbers:
        trainer.log(numbers)


class StageRows:
    """A stage's rows as ids, less those that are longer than `max_length`."""

    def __init__(self, stage: Preference, run: StageRun, tokenizer: PreTrainedTokenizerBase) -> None:
        self._stage = stage
        self._run = run
        self._tokenizer = tokenizer
        self.left_out: dict[str, int] = {}

    def encoded(self, config: DataConfig) -> Dataset:
        """Rows in the objective's form."""
        objective = self._stage.objective
        data, origins = load_with_origins(config, sampler_of(self._run))
        check_columns(data, objective.columns_read, objective.type)
        if isinstance(objective, TrlObjective):
            kept = data.select_columns(with_sampled_ids(objective.columns_read, data))
            return self._short(trl_rows(kept, self._tokenizer, origins), config)
        return self._short(objective_rows(data, objective, self._tokenizer, origins), config)

    def pairs(self) -> Dataset | None:
        """Held-out pairs as `prompt_ids, chosen_ids, rejected_ids`; None where `eval_data` have none."""
        config = self._stage.eval_data
        if config is None or isinstance(config, Sampled):  # whose rows are single completions
            return None
        data, origins = load_with_origins(config, sampler_of(self._run))
        if not all(name in data.column_names for name in PAIRED):
            return None
        rows = data.select_columns(with_sampled_ids(PAIRED, data))
        return self._short(trl_rows(rows, self._tokenizer, origins), config)

    def _short(self, rows: Dataset, config: DataConfig) -> Dataset:
        limit = self._stage.max_length
        if limit is None:
            return rows
        kept = [place for place, row in enumerate(rows.to_list()) if longest(row) <= limit]
        name = "left_out" if config is self._stage.data else "eval_left_out"
        self.left_out[name] = len(rows) - len(kept)
        if not kept:
            raise RunError(f"max_length: all {len(rows)} rows of the data are longer than {limit} tokens: write more")
        return rows.select(kept)
