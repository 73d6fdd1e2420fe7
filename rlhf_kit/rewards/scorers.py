"""Models that score a rollout's tokens for a source: an adapter on the policy's base, or a model of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import disable_dropout_in_model

from rlhf_kit.models.adapters import OnBase, adapter_on, add_adapter_copy, load_second_adapter, on_base
from rlhf_kit.models.config import Pretrained, same_model
from rlhf_kit.models.loading import load_copy, load_tokenizer
from rlhf_kit.models.scorer import Scorer, adapter_scorer, add_log_prob_head, base_scorer
from rlhf_kit.models.tokenizers import first_difference
from rlhf_kit.models.zero3 import load_undivided
from rlhf_kit.rewards.config import BuildContext

SAME_TOKENIZER = "models are compared on the sampled tokens; name one with the policy's tokenizer"


def scorer_of(path: str | None, name: str, context: BuildContext, trainable: bool = False) -> Scorer:
    """The model in `path`, or the policy as it starts: as the adapter `name` on the policy's base where it is one."""
    if isinstance(context.policy, PeftModel):
        trained = None if path is None else adapter_on(context.policy, path)
        if trained is not None:
            load_second_adapter(context.policy, name, trained)
        elif path is None:
            add_adapter_copy(context.policy, name)
        if trained is not None or path is None:
            return adapter_scorer(context.policy, name)
    return whole_model(path, name, context, trainable)


def compared_scorers(path: str, reference: str, name: str, context: BuildContext) -> tuple[Scorer, Scorer]:
    """A frozen model and what it is compared with, on one base where both have it: the policy's, or one of their own.

    Raises:
        ValueError: see `whole_model`.
    """
    policy, of_reference = context.policy, f"reference of {name}"
    on_policy = isinstance(policy, PeftModel) and any(adapter_on(policy, one) for one in (path, reference))
    shared = None if on_policy else _on_one_base(path, reference)
    if shared is None:
        return scorer_of(path, name, context), scorer_of(reference, of_reference, context)
    for one in (path, reference):
        _check_vocabulary(one, name, context)
    base = _like_policy(shared[0].base, name, context, shared[0].revision)
    adapters = {
        at: one.adapter for at, one in zip((name, of_reference), shared, strict=True) if one.adapter is not None
    }
    model = load_undivided(lambda: _with_adapters(base, adapters))
    _ready(model, path, name, context)
    first, second = (adapter_scorer(model, at) if at in adapters else base_scorer(model) for at in (name, of_reference))
    return first, second


def _with_adapters(base: Pretrained, adapters: Mapping[str, str]) -> PeftModel:
    """A frozen base with the adapters in these folders, by name."""
    model: Any = load_copy(base)
    for name, folder in adapters.items():
        if isinstance(model, PeftModel):
            load_second_adapter(model, name, folder)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    return cast(PeftModel, model)


def _on_one_base(path: str, reference: str) -> tuple[OnBase, OnBase] | None:
    """Two models as adapters on one base, or as a base and an adapter on it; None where they are not."""
    for one in (on_base(path), OnBase(path)):
        for other in (on_base(reference), OnBase(reference)):
            adapted = one.adapter is not None or other.adapter is not None
            if adapted and same_model(one.base, other.base) and one.revision == other.revision:
                return one, other
    return None


def whole_model(path: str | None, name: str, context: BuildContext, trainable: bool = False) -> Scorer:
    """A model of its own for the source `name`, loaded as the policy was.

    Raises:
        ValueError: the policy is made from scratch, so that there is nothing to load, or the model has another
            vocabulary than the policy.
    """
    config = _like_policy(path, name, context)
    if path is not None:
        _check_vocabulary(path, name, context)
    module = cast(nn.Module, load_copy(config))
    _ready(module, config.path, name, context)
    return Scorer(module, list(module.parameters()) if trainable else [])


def _like_policy(path: str | None, name: str, context: BuildContext, revision: str | None = None) -> Pretrained:
    """Where a model is, to be loaded as the policy was; the policy itself without `path`."""
    policy = context.policy_config
    if not isinstance(policy, Pretrained):
        raise ValueError(f"'{name}' needs a policy with weights to start from; train it by an sft stage first")
    if path is None or same_model(path, policy.path):
        return policy
    return policy.model_copy(update={"path": path, "revision": revision, "gguf_file": None, "tokenizer": None})


def _ready(module: nn.Module, path: str, name: str, context: BuildContext) -> None:
    """Let a model score as the policy does.

    Raises:
        ValueError: it has no embeddings for some of the policy's tokens.
    """
    own, its = (cast(Any, of).get_input_embeddings().num_embeddings for of in (context.policy, module))
    needed = own if context.tokenizer is None else min(own, len(context.tokenizer))
    if its < needed:
        raise ValueError(f"'{name}': {path} knows {its} tokens, and the policy has {needed}: {SAME_TOKENIZER}")
    module.train()
    add_log_prob_head(cast(Any, module), context.temperature)
    disable_dropout_in_model(module)
    module.to(context.device)


def _check_vocabulary(path: str, name: str, context: BuildContext) -> None:
    """Say that a model reads other text in the policy's tokens than the policy does.

    Raises:
        ValueError: it does.
    """
    own, policy = context.tokenizer, _like_policy(None, name, context)
    other = None if own is None or same_model(path, policy.path) else _tokenizer_of(path, name, context)
    if own is None or other is None:
        return
    number = first_difference(own, other)
    if number is not None:
        mine, yours = (of.convert_ids_to_tokens(number) for of in (own, other))
        raise ValueError(
            f"'{name}': {path} has another vocabulary than the policy {policy.path}: token {number} is {yours!r} there "
            f"and {mine!r} here: {SAME_TOKENIZER}"
        )


def _tokenizer_of(path: str, name: str, context: BuildContext) -> PreTrainedTokenizerBase | None:
    """A model's tokenizer, of an adapter without one its base's; None where neither has one."""
    for place in dict.fromkeys((path, on_base(path).base)):
        try:
            return load_tokenizer(_like_policy(place, name, context))
        except (OSError, ValueError):
            continue
    return None
