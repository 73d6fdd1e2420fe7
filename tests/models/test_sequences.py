"""What offline objectives see of a completion, against full logits taken row by row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from rlhf_kit.data.outcomes import collate_outcomes
from rlhf_kit.models.scorer import add_log_prob_head
from rlhf_kit.models.sequences import (
    Sequences,
    chosen_tokens,
    contrast_tokens,
    distributions,
    joined,
    kl_from,
    token_log_probs,
)

ROWS = [([4, 5, 9], [6, 7, 2]), ([8], [5, 2]), ([4, 4], [2])]


def padded(rows: list[tuple[list[int], list[int]]]) -> Sequences:
    ids = [{"prompt_ids": prompt, "completion_ids": completion} for prompt, completion in rows]
    return Sequences(**collate_outcomes(ids, 0))


@pytest.fixture
def sequences() -> Sequences:
    return padded(ROWS)


def row_by_row(model: PreTrainedModel) -> list[torch.Tensor]:
    """`log p(. | id_<t)` (L - 1, V) of each row, without padding."""
    with torch.no_grad():
        inputs = [torch.tensor([prompt + completion]) for prompt, completion in ROWS]
        return [model(input_ids=ids).logits[0, :-1].float().log_softmax(-1) for ids in inputs]


def test_collation_pads_prompts_left_and_completions_right(sequences: Sequences) -> None:
    assert sequences.prompt_ids.tolist() == [[4, 5, 9], [0, 0, 8], [0, 4, 4]]
    assert sequences.completion_ids.tolist() == [[6, 7, 2], [5, 2, 0], [2, 0, 0]]
    assert sequences.mask.int().tolist() == [[1] * 6, [0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]]


def test_joining_pads_to_one_width_and_changes_nothing_else(sequences: Sequences) -> None:
    small = padded([([8], [5, 2])])
    both = joined([small, sequences], 0)
    assert both.prompt_ids.shape == both.completion_ids.shape == (4, 3)
    for parts, alone in ((0, small), (slice(1, None), sequences)):
        assert torch.equal(both.ids[parts][both.mask[parts]], alone.ids[alone.mask])


@pytest.mark.parametrize("with_prompt", [False, True])
def test_log_probs_are_those_of_the_full_logits(
    make_model: Callable[..., PreTrainedModel], sequences: Sequences, with_prompt: bool
) -> None:
    model = make_model()
    expected = row_by_row(model)
    add_log_prob_head(model)
    found = token_log_probs(model, sequences, with_prompt)
    for row, (prompt, completion) in enumerate(ROWS):
        ids = prompt + completion
        taken = expected[row].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        if not with_prompt:
            taken[: len(prompt) - 1] = 0
        kept = found[row][sequences.mask[row]]
        assert kept[0] == 0  # nothing stands before the first token
        torch.testing.assert_close(kept[1:], taken, rtol=1e-5, atol=1e-5)
    assert (found[~sequences.mask] == 0).all()


def test_distributions_give_tokens_and_divergence(
    make_model: Callable[..., PreTrainedModel], sequences: Sequences
) -> None:
    model, other = make_model(0), make_model(1)
    here, there = row_by_row(model), row_by_row(other)
    log_p, reference = distributions(model, sequences), distributions(other, sequences)
    tokens = chosen_tokens(log_p, sequences)
    kl = kl_from(reference, log_p, sequences.completion_mask)
    for row, (prompt, completion) in enumerate(ROWS):
        part = slice(len(prompt) - 1, None)
        taken = here[row][part].gather(1, torch.tensor(completion)[:, None]).squeeze(1)
        torch.testing.assert_close(tokens[row][: len(completion)], taken, rtol=1e-5, atol=1e-5)
        p = there[row][part].exp()
        expected = (p * (there[row][part] - here[row][part])).sum(1)
        torch.testing.assert_close(kl[row][: len(completion)], expected, rtol=1e-4, atol=1e-5)
    assert (tokens[~sequences.completion_mask] == 0).all() and (kl[~sequences.completion_mask] == 0).all()


def test_contrasts_are_drawn_from_the_likeliest_others_by_their_probability(sequences: Sequences) -> None:
    likeliest = torch.tensor([0.05, 0.1, 0.3, 0.0, 0.2, 0.05, 0.1, 0.15, 0.05])
    log_p = likeliest.log().expand(3, 3, 9)
    one = Sequences(
        *(part[:1] for part in (sequences.prompt_ids, sequences.prompt_mask)),
        *[torch.tensor([[2, 4, 2]]), torch.tensor([[True, True, False]])],
    )
    torch.manual_seed(0)
    draws = torch.cat([contrast_tokens(log_p[:1], one, 2) for _ in range(4000)])
    assert (draws[:, 2] == 0).all()  # padding
    for place, choices in ((0, (0.2, 0.15)), (1, (0.3, 0.15))):  # the two likeliest without the token itself
        values = draws[:, place].exp()
        shares = [((values - choice).abs() < 1e-6).float().mean().item() for choice in choices]
        assert sum(shares) == pytest.approx(1)
        assert shares[0] == pytest.approx(choices[0] / sum(choices), abs=0.03)
