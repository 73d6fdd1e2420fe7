"""Running of a `bootstrap`: each round's steps, recorded with the fingerprint of what they were made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from accelerate.utils import gather_object
from torch import nn

from rlhf_kit.config import Config
from rlhf_kit.data.files import put_aside, write_whole
from rlhf_kit.data.load import load_data
from rlhf_kit.data.verifiers import verify
from rlhf_kit.evals.accuracy import refuse_unjudgeable
from rlhf_kit.evals.fingerprint import config_fingerprint
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.generation import generate_ids
from rlhf_kit.models.loading import load_copy, load_tokenizer, save_whole
from rlhf_kit.processes import of_main, processes
from rlhf_kit.runs.folder import RESULT_FILE, recorded
from rlhf_kit.trainers.config import START, Bootstrap, HeldOutEvaluation, Stop
from rlhf_kit.trainers.setup import StageRun

STEP_FILE = "step.json"

Results = dict[str, Any]
RunStep = Callable[[Any, Path, str], Results]


def run_bootstrap(stage: Bootstrap, run: StageRun, run_step: RunStep) -> Results:
    """Run every step that is not done, write `model/`, and return what each round measured.

    `run_step(stage, folder, name)` runs an ordinary stage in a folder.
    """
    folder = run.folder
    rounds: list[Results] = []
    copied = _copied_start(stage, run)
    start = _evaluated(stage, 0, run)
    minutes = copied.get("minutes", 0.0) + start.pop("minutes", 0.0)
    for number in range(1, stage.rounds + 1):
        pairs, training = stage.pairs_of(number, folder), stage.preference_of(number, folder, run.seed)
        sampled = _step(pairs, folder / f"round-{number}" / "pairs", run, run_step)
        trained = _step(training, folder / f"round-{number}" / "preference", run, run_step)
        measured = _evaluated(stage, number, run)
        minutes += sampled["minutes"] + trained["minutes"] + measured.pop("minutes", 0.0)
        rounds.append({"round": number, **_facts(sampled, trained), **measured})
        if stage.stop is not None and should_stop(_accuracies(start, rounds), stage.stop):
            break
    accuracies = _accuracies(start, rounds)
    kept = len(rounds) if stage.keep == "last" else max(range(len(accuracies)), key=lambda place: accuracies[place])
    if processes().is_main_process:
        _copy(stage.model_of(kept, folder), folder / "model")
    processes().wait_for_everyone()
    results: Results = {"updates": sum(row["updates"] for row in rounds), "kept_round": kept, "rounds": rounds}
    if stage.evaluation is not None:
        results |= {"eval_accuracy_start": accuracies[0], "eval_accuracy": accuracies[kept]}
    return {**results, "minutes": round(minutes, 2)}


def should_stop(accuracies: list[float], stop: Stop) -> bool:
    """Whether none of the last `patience` accuracies is above the best before them by more than `min_delta`."""
    if len(accuracies) <= stop.patience:
        return False
    before, last = accuracies[: -stop.patience], accuracies[-stop.patience :]
    return max(last) <= max(before) + stop.min_delta


def _accuracies(start: Results, rounds: list[Results]) -> list[float]:
    return [measured.get("eval_accuracy", 0.0) for measured in (start, *rounds)]


def _facts(sampled: Results, trained: Results) -> Results:
    """What is shown of a round."""
    of_pairs = ("pairs", "margin", "length", "length_chosen", "length_rejected", "alpha", "score", "truncated")
    return {"updates": trained["updates"], **{name: sampled.get(name) for name in of_pairs}}


def _step(stage: Config, folder: Path, run: StageRun, run_step: RunStep) -> Results:
    """A step's results: as they were recorded where nothing that it is made from has changed."""
    if _begin(stage, folder, run.seed):
        return json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    return run_step(stage, folder, f"{run.folder.name} {folder.parent.name} {folder.name}")


def _begin(stage: Config, folder: Path, seed: int) -> bool:
    """Whether a step is done; what was made from something else is put aside. The same on every process."""
    done = False
    if processes().is_main_process:
        key = config_fingerprint(stage, seed=seed)
        record = folder / STEP_FILE
        if folder.exists() and (not record.is_file() or json.loads(record.read_text())["fingerprint"] != key):
            put_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not record.is_file():
            content = {"fingerprint": key, "settings": stage.model_dump(mode="json"), "seed": seed}
            write_whole(record, json.dumps(content, indent=1))
        done = (folder / RESULT_FILE).is_file()
    return of_main(done)


class _Start(Config):
    """What a copy of the first model depends on."""

    model: Pretrained


def _copied_start(stage: Bootstrap, run: StageRun) -> Results:
    """A copy of the first model, where a reward's path could not say which it is."""
    if not stage.copies_start:
        return {}
    main = processes().is_main_process

    def copy() -> Results:
        if main:
            save_whole(stage.model, run.folder / START)
        return {}

    folder = (run.folder / START).parent
    return _step(_Start(model=stage.model), folder, run, lambda config, where, name: recorded(where, main, copy))


# --- evaluation ---


def _evaluated(stage: Bootstrap, number: int, run: StageRun) -> Results:
    """Greedy accuracy, and length in tokens, of the model after a round."""
    if stage.evaluation is None:
        return {}
    step = _Measurement(model=stage.model_of(number, run.folder), evaluation=stage.evaluation)
    folder = run.folder / f"round-{number}" / "evaluation"
    main = processes().is_main_process
    return _step(step, folder, run, lambda config, where, name: recorded(where, main, lambda: _measure(config, run)))


class _Measurement(Config):
    """What a measurement depends on."""

    model: Pretrained
    evaluation: HeldOutEvaluation


def _measure(step: _Measurement, run: StageRun) -> Results:
    """Every process takes its share of the prompts.

    Raises:
        ValueError: the verifier cannot judge a row.
    """
    state, settings = processes(), step.evaluation
    rows = load_data(settings.data).to_list()
    refuse_unjudgeable(rows, settings)
    own = rows[state.process_index :: state.num_processes]
    model = cast(Any, load_copy(step.model)).to(state.device)
    tokenizer = load_tokenizer(step.model)
    ids = generate_ids(
        cast(nn.Module, model),
        tokenizer,
        [row["prompt"] for row in own],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        synced_gpus=False,
        on_batch=run.on_batch("evaluation"),
    )
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    scored = [(verify(settings.verifier, text, row), len(i)) for text, row, i in zip(texts, own, ids, strict=True)]
    scores, lengths = zip(*cast(list[Any], gather_object(scored)), strict=True)
    return {"eval_accuracy": fmean(scores), "eval_length": fmean(lengths)}


def _copy(model: Pretrained, target: Path) -> None:
    """The kept model in a folder that later stages need no more of than its path; the one before until it is whole."""
    source = Path(model.path)
    partial, former = (target.with_name(f"{target.name}.{name}") for name in ("partial", "former"))
    for left in (partial, former):
        shutil.rmtree(left, ignore_errors=True)
    if source.is_dir() and model.gguf_file is None:
        shutil.copytree(source, partial)
        if model.tokenizer is not None or model.chat_template is not None:
            load_tokenizer(model).save_pretrained(partial)
    else:
        save_whole(model, partial)
    if target.exists():
        target.rename(former)
    partial.rename(target)
    shutil.rmtree(former, ignore_errors=True)
