"""The scorer of the implicit PRM against the plain way: speed, peak memory, and how many forwards a rollout takes.

The plain way is what the formula says: the full logits, `log_softmax`, `gather`, one sequence at a time. The scorer
(`rlhf_kit.models.scorer`) runs a batch at a time and projects in tiles, so that no (B, T, V) tensor exists. The model
is a small Llama with random weights, whose time and memory are in its vocabulary. Speed is measured in one process, the
two ways in turn; every peak in a process of its own, from what is in use before the forward to the most in it.

    python benchmarks/scoring.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import (
    MIB,
    OUTCOME,
    QUICKSTART_PROMPTS,
    build_ours,
    fresh_process,
    memory_now,
    memory_peak,
    models_of,
    parser,
    ppo_stage,
    print_table,
    report,
    reset_peak,
    save_scratch_policy,
    seconds,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl.kernels import chunked_logprob
from trl.trainer import utils

from rlhf_kit.models.scorer import Scorer, add_log_prob_head
from rlhf_kit.rollout import Rollout

PROMPT = 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# --- the two ways ---


def small_llama(vocabulary: int, length: int) -> Any:
    """Two layers of width 64, with the scorer's head beside its own; input and output embedding are shared."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=PROMPT + length,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(DEVICE).eval()
    add_log_prob_head(model)
    return model


def random_rollout(vocabulary: int, batch: int, length: int) -> Rollout:
    """Random ids of one length, to be scored in one batch."""
    ids = torch.randint(vocabulary, (batch, PROMPT + length), device=DEVICE)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Rollout(
        prompts=[""] * batch,
        completions=[""] * batch,
        prompt_ids=ids[:, :PROMPT],
        prompt_mask=mask[:, :PROMPT],
        completion_ids=ids[:, PROMPT:],
        completion_mask=mask[:, PROMPT:],
        action_mask=mask[:, PROMPT:],
        micro_batch_size=batch,
    )


@torch.no_grad()
def by_scorer(model: Any, rollout: Rollout) -> Tensor:
    """The kit's scorer."""
    return Scorer(model, [])(rollout)


@torch.no_grad()
def plainly(model: Any, rollout: Rollout) -> Tensor:
    """Full logits, log_softmax, gather; one sequence at a time."""
    length = rollout.completion_ids.shape[1]
    rows = []
    for ids in torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1).split(1):
        log_probs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(dim=-1)
        rows.append(log_probs[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)[:, -length:])
    return torch.cat(rows)


WAYS = {"scorer": by_scorer, "plain": plainly}

# --- speed and memory ---


def peak(way: str, vocabulary: int, batch: int, length: int) -> int:
    """Bytes above what was in use before the forward; for a process of its own."""
    model = small_llama(vocabulary, length)
    WAYS[way](model, random_rollout(vocabulary, 1, 1))  # libraries allocate what they keep in the first call
    rollout = random_rollout(vocabulary, batch, length)
    before = memory_now()
    reset_peak()
    WAYS[way](model, rollout)
    return memory_peak() - before


def times(vocabulary: int, batch: int, length: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, in turn, after one run in which their results are compared."""
    model, rollout = small_llama(vocabulary, length), random_rollout(vocabulary, batch, length)
    torch.testing.assert_close(by_scorer(model, rollout), plainly(model, rollout), rtol=1e-3, atol=1e-3)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name, way in WAYS.items():
            found[name].append(seconds(lambda way=way: way(model, rollout)))
    return found


def tile_size() -> tuple[int, int]:
    """Tokens and words of the largest block of logits that the scorer holds."""
    return chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE


def speed_and_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every vocabulary and batch."""
    rows = []
    for vocabulary in options.vocabularies:
        for batch in options.batches:
            measured = times(vocabulary, batch, options.length, options.repeats)
            pairs = zip(measured["plain"], measured["scorer"], strict=True)
            tokens = batch * options.length
            row: dict[str, Any] = {"vocabulary": vocabulary, "batch": batch}
            row |= {f"{name} tok/s": tokens / statistics.median(times) for name, times in measured.items()}
            row["faster"] = statistics.median(plain / scorer for plain, scorer in pairs)
            for name in WAYS:
                row[f"{name} peak MiB"] = _peak_mib(name, vocabulary, batch, options.length)
            positions = batch * (PROMPT + options.length - 1)
            height, width = tile_size()
            row["a tile MiB"] = min(positions, height) * min(vocabulary, width) * 4 / MIB
            row["all logits MiB"] = positions * vocabulary * 4 / MIB
            rows.append(row)
            print(f"vocabulary {vocabulary}, batch {batch}: done", flush=True)
    return rows


def _peak_mib(*case: Any) -> float:
    return fresh_process(peak, *case, preloaded=True) / MIB


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets beside what was reached."""
    large = max(row["batch"] for row in rows)
    at_large = [row for row in rows if row["batch"] == large]
    slowest = min(at_large, key=lambda row: row["faster"])
    reached = f"{slowest['faster']:.2f}x at worst (vocabulary {slowest['vocabulary']})"
    found = [{"target": f"at least 1.3x faster at batch {large}", "reached": reached}]
    # Below a tile's width the peak is that of few logits and of the layers; beyond it, more words may not take more.
    width = tile_size()[1]
    wide = [row for row in at_large if row["vocabulary"] >= width]
    if wide:
        peaks, tile = [row["scorer peak MiB"] for row in wide], wide[0]["a tile MiB"]
        over = f"over vocabularies of {width} and more at batch {large}"
        reached = f"{max(peaks) / tile:.1f} tiles of {tile:.0f} MiB at most, {over}"
        found.append({"target": "peak bounded by a tile", "reached": reached})
        reached = f"largest over smallest peak {max(peaks) / min(peaks):.2f}, {over}"
        found.append({"target": "peak not growing with V beyond a tile", "reached": reached})
    return found


# --- forwards ---


class Forwards:
    """Counts the forwards of models while a rollout is scored."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        self.counts = dict.fromkeys(models, 0)
        self._counting = False
        for name, model in models.items():
            model.register_forward_pre_hook(lambda *_, name=name: self._count(name))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count in here."""
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def _count(self, name: str) -> None:
        self.counts[name] += self._counting


ONLINE = {"online": {"learning_rate": 1e-6}}
SETTINGS: dict[str, dict[str, Any]] = {
    "outcome only": {},
    "PRM, reference: behaviour": {"prm": {"reference": "behaviour"}},
    "online PRM, reference: behaviour": {"prm": {"reference": "behaviour", **ONLINE}},
    "online PRM, reference: behaviour, critic": {
        "prm": {"reference": "behaviour", **ONLINE},
        "credit": {"estimator": "gae"},
    },
    "online PRM, reference: initial": {"prm": {"reference": "initial", **ONLINE}},
    "online PRM, reference: initial, KL penalty": {
        "prm": {"reference": "initial", **ONLINE},
        "credit": {"estimator": "rloo", "kl": {"coefficient": 0.01}},
    },
}


COLUMNS = {"policy": "policy", "PRM": "implicit_prm", "reference": "reference"}


def forwards(policy: Path, folder: Path, prm: dict[str, Any] | None = None, **fields: Any) -> dict[str, int]:
    """Forwards by model while one rollout of one micro-batch is scored."""
    rewards = (OUTCOME,) if prm is None else (OUTCOME, {"type": "implicit_prm", "beta": 0.05, **prm})
    args = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 4, "max_steps": 1}
    trainer = build_ours(ppo_stage(policy, QUICKSTART_PROMPTS, args, rewards, **fields), folder)
    counted = Forwards(models_of(trainer))
    assign = trainer.assign_credit

    def assign_counted(*arguments: Any) -> Any:
        with counted.counting():
            return assign(*arguments)

    vars(trainer)["assign_credit"] = assign_counted
    trainer.train()
    return counted.counts


def count_forwards() -> list[dict[str, Any]]:
    """One row for every setting."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        policy = save_scratch_policy(Path(temporary) / "policy")
        for number, (name, setting) in enumerate(SETTINGS.items()):
            counts = forwards(policy, Path(temporary) / str(number), **setting)
            columns = {name: counts.get(key, 0) for name, key in COLUMNS.items()}
            rows.append({"setting": name, **columns, "all": sum(columns.values())})
    return rows


def main() -> None:
    """Measure, print, write."""
    options = parser(__doc__)
    options.add_argument("--vocabularies", type=int, nargs="+", default=[1024, 32768, 131072, 262144])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    options.add_argument("--length", type=int, default=112, help="tokens of every completion")
    options.add_argument("--repeats", type=int, default=5, help="runs of each way whose median is taken")
    arguments = options.parse_args()
    with report(arguments) as results:
        results["forwards"] = count_forwards()
        print_table("Forwards of a rollout of one micro-batch, while it is scored", results["forwards"])
        print("An online PRM runs twice: it learns, then scores. `behaviour` needs the forward that a critic needs.")
        results["speed and memory"] = speed_and_memory(arguments)
        print_table("The scorer against the plain way", results["speed and memory"])
        results["targets"] = verdicts(results["speed and memory"])
        print_table("Targets", results["targets"])


if __name__ == "__main__":
    main()
