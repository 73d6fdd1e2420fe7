"""The scorer gives log-probabilities of the sampled tokens, exactly equal for equal models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_kit.models.scorer import Scorer, add_log_prob_head, rollout_outputs, token_outputs
from rlhf_kit.rollout import Rollout


def by_definition(model: torch.nn.Module, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """`log_softmax(logits / temperature)` of each row alone, without padding, at the sampled tokens."""
    expected = torch.zeros(rollout.completion_ids.shape)
    for row in range(len(rollout)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        completion = rollout.completion_ids[row][rollout.completion_mask[row]]
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0].float()
        log_probs = torch.log_softmax(logits / temperature, dim=-1)[len(prompt) - 1 : -1]
        expected[row, : len(completion)] = log_probs.gather(1, completion[:, None]).squeeze(1)
    return expected


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_full_logits(make_model, rollout, temperature) -> None:
    model = make_model()
    add_log_prob_head(model, temperature)
    with torch.no_grad():
        (log_probs,) = rollout_outputs(model, rollout)
    torch.testing.assert_close(log_probs, by_definition(model, rollout, temperature), atol=1e-5, rtol=1e-5)
    assert (log_probs[~rollout.completion_mask] == 0).all()


def test_log_probs_in_bfloat16_are_close(make_model, rollout) -> None:
    model = make_model(dtype=torch.bfloat16)
    add_log_prob_head(model)
    with torch.no_grad():
        (log_probs,) = rollout_outputs(model, rollout)
        expected = by_definition(make_model(), rollout)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected, atol=0.15, rtol=0.05)


def test_gradients_are_those_of_the_full_logits(make_model, rollout) -> None:
    model, plain = make_model(), make_model()
    add_log_prob_head(model)
    rollout_outputs(model, rollout)[0].sum().backward()
    by_definition(plain, rollout).sum().backward()
    gradients = [parameter.grad for parameter in plain.parameters()]
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-3)


def test_no_tensor_of_all_logits_is_made(make_model) -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                self.size = max(self.size, output.numel())
            return output

    vocabulary = tuple(f"w{number}" for number in range(60_000))
    model = make_model(vocabulary=vocabulary)
    add_log_prob_head(model)
    ids, mask = torch.randint(4, 50_000, (8, 4)), torch.ones(8, 4, dtype=torch.bool)
    completion, completion_mask = torch.randint(4, 50_000, (8, 24)), torch.ones(8, 24, dtype=torch.bool)
    with torch.no_grad(), Largest() as largest:
        token_outputs(model, ids, mask, completion, completion_mask, micro_batch_size=8)
    assert largest.size < 8 * 24 * 60_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_give_equal_bits(make_model, rollout, dtype) -> None:
    first, second = make_model(dtype=dtype), make_model(dtype=dtype)
    for model in (first, second):
        add_log_prob_head(model)
    log_probs = Scorer(first, [])(rollout)  # one with gradients and one without
    with torch.no_grad():
        assert torch.equal(log_probs, Scorer(second, [])(rollout))


def test_rows_are_scored_in_micro_batches_of_the_rollout(make_model, rollout) -> None:
    model, sizes = make_model(), []
    add_log_prob_head(model)
    model.model.register_forward_hook(lambda _m, _a, output: sizes.append(len(output.last_hidden_state)))
    with torch.no_grad():
        (in_two,) = rollout_outputs(model, rollout)
        (in_one,) = rollout_outputs(model, replace(rollout, micro_batch_size=3))
    assert sizes == [2, 1, 3]
    torch.testing.assert_close(in_two, in_one, atol=1e-5, rtol=1e-5)


def test_a_scorer_is_active_only_while_it_scores(make_model, rollout) -> None:
    from contextlib import contextmanager

    events = []

    @contextmanager
    def activate():
        events.append("on")
        yield
        events.append("off")

    model = make_model()
    add_log_prob_head(model)
    model.model.register_forward_hook(lambda *_: events.append("forward"))
    parameters = list(model.lm_head.parameters())
    scorer = Scorer(model, parameters, activate)
    scorer(rollout)
    scorer.outputs(
        rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, rollout.completion_mask, micro_batch_size=3
    )
    assert events == ["on", "forward", "forward", "off", "on", "forward", "off"]
    assert [id(p) for p in scorer.parameters()] == [id(p) for p in parameters]
