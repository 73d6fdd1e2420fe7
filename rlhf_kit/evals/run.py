"""Running of an `eval` stage: its evaluations in order, each kept once it is done."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf_kit import __version__
from rlhf_kit.data.files import write_whole
from rlhf_kit.data.load import Sampler
from rlhf_kit.errors import RunError
from rlhf_kit.evals.audit import Audit, input_files
from rlhf_kit.evals.base import EvaluationConfig
from rlhf_kit.evals.context import EvalContext
from rlhf_kit.evals.fingerprint import config_fingerprint
from rlhf_kit.evals.policy import Progress
from rlhf_kit.evals.stage import Eval

EVALS_FOLDER = "evals"

logger = logging.getLogger(__name__)


def run_eval(
    stage: Eval,
    folder: Path,
    *,
    seed: int = 0,
    sampler: Sampler | None = None,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    progress: Progress = lambda what: lambda done, total: None,
) -> dict[str, Any]:
    """Every evaluation's figures, by name; each is written to `<folder>/evals/<name>.json` when it is done.

    An evaluation whose file has the fingerprint of everything that it reads is not repeated.

    Raises:
        RunError: an evaluation cannot be made; those before it are kept.
    """
    context = EvalContext(stage, folder, seed, sampler, functions, progress)
    figures: dict[str, Any] = {}
    for name, evaluation in stage.evals.items():
        key = fingerprint_of(stage, evaluation, seed)
        path = folder / EVALS_FOLDER / f"{name}.json"
        content = read_done(path, key)
        if content is None:
            try:
                result = evaluation.run(context)
            except ValueError as error:
                raise RunError(f"evals.{name}: {error}") from error
            content = {"name": name, "type": evaluation.type, "fingerprint": key, **result.to_json()}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(content, indent=1))
        figures[name] = content["figures"]
    _forget_others(folder / EVALS_FOLDER, stage)
    return {"evals": figures}


def fingerprint_of(stage: Eval, evaluation: EvaluationConfig, seed: int) -> str:
    """SHA-256 of what an evaluation depends on: its configuration, the model, the sources, their files, the seed."""
    sources = stage.rewards if evaluation.may_ask_sources else ()
    model = stage.model if evaluation.runs_model or sources else None
    others = list(input_files(evaluation)) if isinstance(evaluation, Audit) else []
    return config_fingerprint(evaluation, model, *sources, others=[*others, __version__], seed=seed)


def read_done(path: Path, key: str) -> dict[str, Any] | None:
    """The evaluation kept in a file, if it is whole and has this fingerprint."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        logger.warning("%s is damaged: the evaluation is repeated", path)
        return None
    return content if content.get("fingerprint") == key else None


def _forget_others(folder: Path, stage: Eval) -> None:
    """Evaluations that are no longer in the recipe are no longer in the report."""
    for path in folder.glob("*.json"):
        if path.stem not in stage.evals:
            path.unlink()
