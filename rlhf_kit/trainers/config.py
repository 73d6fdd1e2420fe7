"""Configuration of the stages: what a recipe may say about `sft`, `reward` and `ppo`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf_kit.config import SEED_STRIDE, Config, Location
from rlhf_kit.data.config import DataConfig, Mixed, Parquet, PromptConfig
from rlhf_kit.evals.config import Evaluation, Probability, StepEvaluation, StepTruth
from rlhf_kit.evals.stage import Eval
from rlhf_kit.models.config import Lora, ModelConfig, Pretrained
from rlhf_kit.objectives import ObjectiveConfig
from rlhf_kit.pairs.config import Generation, Pairs
from rlhf_kit.pairs.selection import SelectConfig
from rlhf_kit.problems import Problem, did_you_mean, listed
from rlhf_kit.rewards import RewardConfig
from rlhf_kit.rewards.dpo_implicit import DpoImplicitConfig
from rlhf_kit.rewards.text import Segments


class TrainerArgs(Config):
    """`args` are TRL's and transformers' own argument names."""

    args: dict[str, Any] = Field(default_factory=dict)


class Sft(Config):
    """Supervised fine-tuning with TRL's SFTTrainer."""

    type: Literal["sft"]
    model: ModelConfig
    data: DataConfig
    eval_data: DataConfig | None = None
    evaluation: Evaluation | None = None
    trainer: TrainerArgs = TrainerArgs()


class Reward(Config):
    """Training of an implicit process reward model from outcome labels (arXiv 2412.01981).

    `ce` is binary cross-entropy with logits on `prompt, completion, label` rows; `dpo`, `nca` and `kto` are TRL's
    losses on its paired or unpaired rows.
    """

    type: Literal["reward"]
    model: ModelConfig
    reference: Pretrained | None = None
    objective: Literal["ce", "dpo", "nca", "kto"] = "ce"
    beta: PositiveFloat = 0.05
    offset: Literal["none", "running", "prompt"] = "none"
    data: DataConfig
    eval_data: DataConfig | None = None
    step_evaluation: StepEvaluation | None = None
    trainer: TrainerArgs = TrainerArgs()


class Segment(Config):
    """Training of a segment reward model from annotated texts (arXiv 2306.01693, section 3.2).

    Rows are `text, spans`, or `text, sentences` where each sentence has a label (`rlhf_kit.data.annotations`).

    A token classification head on any language model or encoder says at a segment's last token which of `labels` it
    has, or none; `by: token` labels each token of the model's own. `labels` are the spans' labels, each a class, or
    map a class to the labels that it stands for. A segment has a class whose spans cover more than `min_overlap` of its
    characters. `class_weights: balanced` weighs rare classes up. `prompt_template` is what the model reads before the
    text (without it, the text alone). With `layers` the body keeps that many, the first. With a LoRA adapter the head
    is trained whole.
    """

    type: Literal["segment"]
    model: Pretrained
    layers: PositiveInt | None = None
    labels: Annotated[tuple[str, ...] | dict[str, tuple[str, ...]], Field(min_length=1)]
    segments: Segments = Segments(by="token")
    min_overlap: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Literal["none", "balanced"] | dict[str, PositiveFloat] = "none"
    prompt_template: str | None = None
    data: DataConfig
    eval_data: DataConfig | None = None
    trainer: TrainerArgs = TrainerArgs()

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes beside none."""
        return tuple(self.labels)

    @property
    def marks(self) -> tuple[tuple[str, ...], ...]:
        """The spans' labels that stand for each class."""
        labels = self.labels
        return tuple(labels.values()) if isinstance(labels, dict) else tuple((label,) for label in labels)

    def unknown_labels(self, known: Collection[str]) -> Iterator[Problem]:
        """Labels that no span of the data has; `known` are those that they have."""
        for label in [label for labels in self.marks for label in labels if label not in known]:
            remedy = f"they have {listed(known) or 'none at all'}"
            close = did_you_mean(label, known)
            yield Problem("labels", "no span of data has this label", label, f"{close} ({remedy})" if close else remedy)


class HeldOutEvaluation(Evaluation):
    """Greedy accuracy on the prompts of `data`."""

    data: PromptConfig


class Preference(Config):
    """Offline preference optimisation by one of the objectives of `rlhf_kit.objectives`.

    `reference` is what log-probabilities are compared with where the objective does so: without it the model as it
    starts, which with a LoRA adapter is its base. Rows whose prompt and completion together have more than `max_length`
    tokens are left out and counted; nothing is cut off, unless TRL's own `trainer.args.max_length` says so. `eval_data`
    with `prompt, chosen, rejected` give the model's preference accuracy before and after training, whatever the
    objective learns from; the loss on them is measured with an `eval_strategy`, or where they are no pairs.
    `evaluation` measures the accuracy of greedy completions before and after.
    """

    type: Literal["preference"]
    model: Pretrained
    reference: Pretrained | None = None
    objective: ObjectiveConfig
    data: DataConfig
    eval_data: DataConfig | None = None
    evaluation: HeldOutEvaluation | None = None
    max_length: PositiveInt | None = None
    trainer: TrainerArgs = TrainerArgs()


class Kl(Config):
    """Penalty on the KL divergence from the reference policy (the policy's initial weights).

    With `target`, the coefficient adapts (Ziegler et al., arXiv 1909.08593, Eq. 4) towards that many nats per
    completion, over a horizon of `adaptation_horizon` completions.
    """

    coefficient: NonNegativeFloat = 0.0
    estimator: Literal["k1", "k2", "k3"] = "k1"
    where: Literal["reward", "loss"] = "reward"
    target: PositiveFloat | None = None
    adaptation_horizon: PositiveInt = 10_000


class Credit(Config):
    """From token rewards to advantages.

    `horizon` says whether a process reward is credited to every earlier token (`return_to_go`) or to its own token
    alone (`immediate`). `whiten` standardises advantages over the action tokens of all ranks. `scale: group`
    divides by the group's standard deviation (GRPO). Steps of `min_form` end where `step_pattern` matches; it takes the
    minimum over each process source (the KL penalty is one) apart, and adds what they give.

    A group in which a single completion could be judged has nothing to compare it with: it is left out, unless the
    estimator is `gae` or `reinforce`, without `scale: group`, to which it is a sample like any other.
    `credit/small_groups` is the share of the completions that are alone in their group, left out or not.
    """

    estimator: Literal["gae", "rloo", "group", "reinforce", "prime", "min_form"]
    gamma: Probability = 1.0
    lam: Probability = 0.95
    horizon: Literal["return_to_go", "immediate"] = "return_to_go"
    whiten: bool = True
    scale: Literal["none", "group", "batch"] = "none"
    step_pattern: str = r"\n"
    kl: Kl = Kl()

    @property
    def compares_completions(self) -> bool:
        """Whether an advantage depends on the other completions of the prompt."""
        return self.estimator in ("rloo", "group", "prime", "min_form")

    @property
    def needs_groups(self) -> bool:
        """Whether a completion without another of its prompt has no advantage."""
        return self.compares_completions or self.scale == "group"


class Critic(Config):
    """The value function of `gae`: a linear head on the policy's last hidden state, or a model of its own.

    For the first `warmup_steps` updates the policy stays still while the critic learns. Its loss, `coefficient` times a
    mean over the update's tokens, is the same whatever the `loss_type` of the policy.
    """

    type: Literal["head", "model"] = "head"
    path: Location | None = None
    learning_rate: PositiveFloat | None = None
    warmup_steps: NonNegativeInt = 0
    coefficient: NonNegativeFloat = 0.5
    clip: PositiveFloat | None = 0.2


class AccuracyBand(Config):
    """Keep the prompts whose group accuracy lies in [low, high] (PRIME, arXiv 2502.01456, section 3.2).

    `mask` takes the other rows out of every loss and statistic; `resample` draws new prompts in their place, at
    most `max_rounds` times, and masks what is still outside.
    """

    low: Probability = 0.2
    high: Probability = 0.8
    mode: Literal["mask", "resample"] = "mask"
    max_rounds: PositiveInt = 3


class Truncation(Config):
    """What a completion cut off at the length limit is worth.

    `terminal` treats it as ended; `bootstrap` continues the return with the critic's value; `mask` takes the row
    out of the losses; `penalty` adds `penalty` to its last action token.
    """

    policy: Literal["terminal", "bootstrap", "mask", "penalty"] = "terminal"
    penalty: float = -1.0


class Samples(Config):
    """How many completions of a rollout are kept, with per-token credit, for the report: every `every` steps."""

    every: PositiveInt = 10
    count: NonNegativeInt = 4


class Ppo(Config):
    """Proximal policy optimisation on TRL's GRPOTrainer with (B, T) advantages.

    The policy may call `tools` while it generates; what they answer is no action of its own and is never credited.
    """

    type: Literal["ppo"]
    model: ModelConfig
    data: DataConfig
    eval_data: DataConfig | None = None
    evaluation: Evaluation | None = None
    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    credit: Credit
    critic: Critic | None = None
    accuracy_band: AccuracyBand | None = None
    truncation: Truncation = Truncation()
    stop_strings: tuple[str, ...] = ()
    tools: tuple[Literal["calculator"], ...] = ()
    step_truth: StepTruth | None = None
    samples: Samples = Samples()
    ema_decay: Probability = 0.99
    max_skipped_steps: PositiveInt = 10
    trainer: TrainerArgs = TrainerArgs()


class RoundPairs(Config):
    """The `pairs` stage of each round of a bootstrap, less the model, which is the round's."""

    data: PromptConfig
    generation: Generation = Generation()
    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    length_debias: Literal["none", "tokens", "characters"] = "none"
    select: SelectConfig
    batch_size: PositiveInt = 16


class Replay(Config):
    """Older pairs that are `share` of what each round trains on (`mixed` data)."""

    data: PromptConfig
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5


class RoundTraining(Config):
    """The `preference` stage of each round, less the model and the data, which are the round's."""

    objective: ObjectiveConfig
    peft: Lora | None = None
    reference: Pretrained | None = None
    eval_data: DataConfig | None = None
    max_length: PositiveInt | None = None
    trainer: TrainerArgs = TrainerArgs()


class Stop(Config):
    """Ends a bootstrap when the accuracy has not risen by more than `min_delta` in `patience` rounds."""

    patience: PositiveInt = 1
    min_delta: NonNegativeFloat = 0.0


START = Path("round-0") / "start" / "model"  # of a bootstrap's folder


class Bootstrap(Config):
    """Rounds of pairs and preference optimisation, each from the model of the round before (DICE, arXiv 2406.09760).

    A round samples with its model, scores, selects, mixes with `replay` and trains. A `dpo_implicit` source without
    `path` scores by the log-ratio of the round's model and the model before it, in the first round `reference`. With
    `samples_from: reference` that earlier model samples, and the round's only ranks: among a model's own samples the
    log-ratio is large where ref is small, and rates highest what was overrated. `keep`
    is the model that later stages get. Every step has a folder of its own in `round-1/`, `round-2/`, ...; a step whose
    settings, files and models are those that it was done with is not repeated. Where `model` has a revision or a GGUF
    file, the rewards that compare with it read a copy, for they name models by path alone.
    """

    type: Literal["bootstrap"]
    model: Pretrained
    reference: Location | None = None
    rounds: PositiveInt = 2
    pairs: RoundPairs
    replay: Replay | None = None
    preference: RoundTraining
    evaluation: HeldOutEvaluation | None = None
    stop: Stop | None = None
    keep: Literal["last", "best"] = "last"
    samples_from: Literal["policy", "reference"] = "policy"

    def model_of(self, number: int, folder: Path) -> Pretrained:
        """The model after a round; of round 0 the one that it all begins with."""
        if number == 0:
            return self.model
        changes = {
            "path": str(folder / f"round-{number}" / "preference" / "model"),
            "revision": None,
            "gguf_file": None,
        }
        return self.model.model_copy(update=changes)

    def pairs_of(self, number: int, folder: Path) -> Pairs:
        """The `pairs` stage of a round, from 1."""
        lags = self.samples_from == "reference"
        model = self._before(number, folder) if lags else self.model_of(number - 1, folder)
        if lags:
            compared = {"path": self._path_of(number - 1, folder), "reference": model.path}
        else:
            compared = {"reference": self.reference if number == 1 else self._path_of(number - 2, folder)}
        rewards = tuple(
            source.model_copy(update=compared) if _of_round(source) else source for source in self.pairs.rewards
        )
        settings = self.pairs.model_dump(exclude={"rewards"})
        return Pairs.model_validate({**settings, "type": "pairs", "model": model, "round": number, "rewards": rewards})

    @property
    def copies_start(self) -> bool:
        """Whether a reward compares with the first model, and its path alone does not say which that is."""
        located = self.model.revision is None and self.model.gguf_file is None
        return not located and any(_of_round(source) for source in self.pairs.rewards)

    def _path_of(self, number: int, folder: Path) -> str:
        """A path that is enough to load the model after a round."""
        return str(folder / START) if number == 0 and self.copies_start else self.model_of(number, folder).path

    def _before(self, number: int, folder: Path) -> Pretrained:
        """The model before the round's; before the first one `reference`."""
        if number > 1:
            return self.model_of(number - 2, folder)
        assert self.reference is not None, "`check` refuses samples_from: reference without one"
        return self.model.model_copy(update={"path": self.reference, "revision": None, "gguf_file": None})

    def preference_of(self, number: int, folder: Path, seed: int = 0) -> Preference:
        """The `preference` stage of a round; every round of every `seed`, the recipe's, replays other rows."""
        paired = str(folder / f"round-{number}" / "pairs" / "paired.parquet")
        unpaired = paired.replace("paired.parquet", "unpaired.parquet")
        one_by_one = "label" in self.preference.objective.columns_read
        rows = Parquet(type="parquet", path=unpaired if one_by_one else paired)
        mixed = None
        if self.replay is not None:
            drawn = seed * SEED_STRIDE + number
            mixed = Mixed(type="mixed", rows=rows, replay=self.replay.data, share=self.replay.share, seed=drawn)
        model = self.model_of(number - 1, folder).model_copy(update={"peft": self.preference.peft})
        settings = self.preference.model_dump(exclude={"peft"})
        return Preference.model_validate({**settings, "type": "preference", "model": model, "data": mixed or rows})


def _of_round(source: RewardConfig) -> bool:
    """Whether a source compares the models of a bootstrap's rounds."""
    return isinstance(source, DpoImplicitConfig) and source.path is None and source.reference is None


TrainingStage = Sft | Reward | Segment | Preference | Ppo
Stage = TrainingStage | Eval | Pairs | Bootstrap
StageConfig = Annotated[Stage, Field(discriminator="type")]
