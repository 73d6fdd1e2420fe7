"""What a recipe may say and yet probably does not mean: doubts that do not stop a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from rlhf_kit.evals.stage import Eval
from rlhf_kit.models.config import Pretrained
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.config import SourceConfig
from rlhf_kit.rewards.implicit_prm import ImplicitPrmConfig, read_prm_record
from rlhf_kit.runs.config import Recipe
from rlhf_kit.trainers.config import Bootstrap, Credit, Ppo, Stage

SMALLEST_RATE_OF_NARROW_WEIGHTS = 1e-4
BITSANDBYTES_OPTIMIZERS = (
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)


def warnings(recipe: Recipe) -> list[Problem]:
    """What is allowed in the recipe and yet probably not meant."""
    found = []
    for name, stage in recipe.stages.items():
        problems = list(_argument_warnings(stage))
        if isinstance(stage, Ppo):
            problems += [*_credit_warnings(stage.credit), *_source_warnings(stage)]
        if isinstance(stage, Eval) and stage.model is not None:
            problems += _frozen_source_warnings(stage.rewards, stage.model)
        found += [problem.under("" if recipe.single else f"stages.{name}") for problem in problems]
    return found


def _credit_warnings(credit: Credit) -> Iterator[Problem]:
    kl, defaults = credit.kl, Credit(estimator=credit.estimator)
    if kl.coefficient and kl.where == "loss" and kl.estimator == "k1":
        remedy = "use k2 in the loss, or k1 in the reward"
        yield Problem("credit.kl.estimator", "k1 in the loss has a gradient of 0 in expectation", "k1", remedy)
    if kl.coefficient and kl.where == "reward" and kl.estimator != "k1":
        what = "in the reward it does not give the gradient of the reverse KL"
        yield Problem("credit.kl.estimator", what, kl.estimator, "use k1 in the reward")
    if credit.horizon != defaults.horizon and credit.estimator not in ("prime", "reinforce"):
        yield Problem("credit.horizon", "is used by prime and reinforce alone", credit.horizon, "remove it")
    if credit.gamma != defaults.gamma and credit.estimator not in ("gae", "reinforce"):
        yield Problem("credit.gamma", "is used by gae and reinforce alone", credit.gamma, "remove it")
    if credit.lam != defaults.lam and credit.estimator != "gae":
        yield Problem("credit.lam", "is used by gae alone", credit.lam, "remove it")
    if credit.step_pattern != defaults.step_pattern and credit.estimator != "min_form":
        yield Problem("credit.step_pattern", "is used by min_form alone", credit.step_pattern, "remove it")


def _source_warnings(stage: Ppo) -> Iterator[Problem]:
    for index, source in enumerate(stage.rewards):
        if isinstance(source, ImplicitPrmConfig):
            yield from (problem.under(f"rewards.{index}") for problem in _prm_warnings(source, stage.model))
            if stage.model.peft is not None and stage.model.peft.dropout > 0:
                what = "dropout makes the first rewards of an implicit PRM noise instead of 0"
                yield Problem("model.peft.dropout", what, stage.model.peft.dropout, "write 0")


def _frozen_source_warnings(rewards: Sequence[SourceConfig], model: Pretrained) -> Iterator[Problem]:
    """Doubts about sources that score and learn nothing: a PRM is judged by the beta that it was trained with."""
    for index, source in enumerate(rewards):
        if isinstance(source, ImplicitPrmConfig):
            yield from (problem.under(f"rewards.{index}") for problem in _prm_warnings(source, model))


def _prm_warnings(source: ImplicitPrmConfig, policy: Pretrained | Scratch) -> Iterator[Problem]:
    record = read_prm_record(source.path) if source.path else None
    if record is not None and record["beta"] != source.beta:
        what = f"is not the {record['beta']} that {source.path} was trained with"
        yield Problem("beta", what, source.beta, "its rewards are scaled by the ratio of the two")
    if source.path is None and not source.online:
        remedy = "set path to a trained PRM, or set online"
        yield Problem("", "a frozen copy of the policy says nothing about outcomes", remedy=remedy)
    narrow = policy.dtype in ("bfloat16", "float16") and policy.peft is None
    if source.online and narrow and source.online.learning_rate < SMALLEST_RATE_OF_NARROW_WEIGHTS:
        what = f"steps this small are lost in {policy.dtype} weights"
        remedy = "write model.dtype: float32 (and bf16: true for the arithmetic), or use LoRA"
        yield Problem("online.learning_rate", what, source.online.learning_rate, remedy)


def _argument_warnings(stage: Stage) -> Iterator[Problem]:
    if isinstance(stage, Eval | Pairs | Bootstrap):
        return
    args = stage.trainer.args
    trackers = args.get("report_to")
    for tracker in trackers if isinstance(trackers, list) else [trackers]:
        if tracker in ("wandb", "tensorboard", "trackio", "mlflow", "swanlab") and not find_spec(tracker):
            yield Problem("trainer.args.report_to", "is not installed here", tracker, f"pip install {tracker}")
    if args.get("use_vllm") and not find_spec("vllm"):
        yield Problem("trainer.args.use_vllm", "vLLM is not installed here", True, "pip install vllm")
    optimizer = args.get("optim")
    if optimizer in BITSANDBYTES_OPTIMIZERS and not find_spec("bitsandbytes"):
        what = "needs bitsandbytes, which is not installed here"
        yield Problem("trainer.args.optim", what, optimizer, "pip install bitsandbytes, or write adamw_torch")
