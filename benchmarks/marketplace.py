"""Satisfaction against true utility: immediate, partial and oracle feedback in the marketplace, by PPO or by DPO.

For each seed one consultant is trained with supervision by `recipes/rlhs/marketplace.yaml` (or `marketplace-dpo.yaml`),
and each mode of feedback trains it on: as a reward, or as the preference in pairs. Every consultant then says one
thing, sampled at temperature 1, to each of the held-out customers, whom no stage trains on; the rule-based customer
decides. Printed are, with 95 % intervals over customers (and, in the last rows, t-intervals over seeds): what the
customer feels when buying (`immediate`), when told what came of the purchase (`partial`), and the true utility, which
is what it feels when told everything; how many buy; and the share of claims that are false. `honest` repeats the data
sheet: what a consultant can do who knows no more.

    python benchmarks/marketplace.py OUT [--by ppo | dpo] [--seeds 0 1 2] [recipe overrides ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from rlhf_kit.data.customer import claims, experience
from rlhf_kit.data.load import load_data
from rlhf_kit.data.marketplace import market_of
from rlhf_kit.recipe import Recipe, load_recipe
from rlhf_kit.trainers.config import Ppo, Preference

RECIPES = Path(__file__).parent.parent / "recipes" / "rlhs"
FILES = {"ppo": "marketplace.yaml", "dpo": "marketplace-dpo.yaml"}
STAGES = {"ppo": ("ppo",), "dpo": ("pairs", "dpo")}  # after the supervised one
MODE = {"ppo": "stages.ppo.rewards.0.mode", "dpo": "stages.pairs.builder.mode"}
MODES = ("none", "partial", "oracle")
MEASURES = ("immediate", "partial", "utility", "bought", "false claims")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--by", choices=tuple(FILES), default="ppo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    results: dict[str, list[dict[str, tuple[float, float]]]] = {}
    for seed in given.seeds:
        for arm, measured in run(given.out, given.by, seed, given.overrides):
            results.setdefault(arm, []).append(measured)
            print(f"seed {seed}  {arm:8s} " + "  ".join(_shown(name, *measured[name]) for name in MEASURES), flush=True)
    if len(given.seeds) > 1:
        for arm, by_seed in results.items():
            rows = {name: [measured[name][0] for measured in by_seed] for name in MEASURES}
            print(f"mean    {arm:8s} " + "  ".join(_shown(name, *_over_seeds(rows[name])) for name in MEASURES))
    (given.out / "results.json").write_text(json.dumps(results, indent=2))


def run(
    out: Path, by: str, seed: int, overrides: Sequence[str]
) -> Iterable[tuple[str, dict[str, tuple[float, float]]]]:
    """Trains what is not there yet, and measures each consultant."""
    from rlhf_kit.runs.pipeline import run_pipeline

    common, stages = [f"runs_dir={out}", f"seed={seed}"], STAGES[by]
    removed = [f"~stages.{stage}" for stage in stages]
    start = load_recipe(RECIPES / FILES[by], [*common, f"name=sft-{seed}", *removed, *_of(("sft",), overrides)])
    run_pipeline(start)
    model = start.stage_folder("sft") / "model"
    held_out: list[dict[str, Any]] = []
    for mode in MODES:
        arm = [f"name={mode}-{seed}", "~stages.sft", *(f"stages.{stage}.model.path={model}" for stage in stages)]
        arm += [f"{MODE[by]}={mode}", *_of(stages, overrides)]
        recipe = load_recipe(RECIPES / FILES[by], [*common, *arm])
        if not held_out:
            held_out = _held_out(recipe)
            yield "honest", measure(held_out, [row["honest"] for row in held_out])
            yield "start", measure(held_out, sampled(model, held_out, seed))
        run_pipeline(recipe)
        yield mode, measure(held_out, sampled(recipe.stage_folder(stages[-1]) / "model", held_out, seed))


def _held_out(recipe: Recipe) -> list[dict[str, Any]]:
    """The customers whom the last stage looks at."""
    (*_, stage) = recipe.stages.values()
    if isinstance(stage, Preference):
        assert stage.evaluation is not None
        data = stage.evaluation.data
    else:
        data = cast(Ppo, stage).eval_data
    assert data is not None
    return [dict(row) for row in load_data(data).to_list()]


def _of(stages: Sequence[str], overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if override.startswith(tuple(f"stages.{stage}." for stage in stages))]


def sampled(model: Path, rows: Sequence[dict[str, Any]], seed: int) -> list[str]:
    """One completion a prompt."""
    import torch

    from rlhf_kit.models.config import Pretrained
    from rlhf_kit.models.generation import generate
    from rlhf_kit.models.loading import load_model, load_tokenizer

    config = Pretrained(path=str(model))
    torch.manual_seed(1000 + seed)
    prompts = [row["prompt"] for row in rows]
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "batch_size": 256}
    return generate(load_model(config), load_tokenizer(config), prompts, **options)


def measure(rows: Sequence[dict[str, Any]], completions: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Mean and half of the 95 % interval of each measure."""
    values: dict[str, list[float]] = {name: [] for name in MEASURES}
    for row, text in zip(rows, completions, strict=True):
        market = market_of(row)
        assert market is not None
        seen = experience(market, text, "partial")
        values["immediate"].append(seen.immediate)
        values["partial"].append(seen.satisfaction)
        values["utility"].append(seen.utility)
        values["bought"].append(float(seen.decision is not None))
        said = claims(text, market).items()
        values["false claims"] += [float(c != market.has[market.options.index(option)]) for option, c in said]
    return {name: _interval(of) for name, of in values.items()}


def _interval(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values[0] if values else float("nan")), float("nan")
    return statistics.fmean(values), 1.96 * statistics.stdev(values) / len(values) ** 0.5


def _over_seeds(values: Sequence[float]) -> tuple[float, float]:
    t = T_95.get(len(values), 1.96)
    return statistics.fmean(values), t * statistics.stdev(values) / len(values) ** 0.5


def _shown(name: str, mean: float, half: float) -> str:
    return f"{name} {mean:+.3f} ± {half:.3f}"


if __name__ == "__main__":
    main()
