"""What every builder is given by the machinery, and what it is not allowed to do, with a small builder of our own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

from rlhf_kit.errors import RunError
from rlhf_kit.pairs.builder import Builder, BuilderBase, Row
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.pairs.context import PairsContext
from rlhf_kit.pairs.files import read_rows
from rlhf_kit.pairs.rows import unpaired_rows
from rlhf_kit.pairs.stage import run_pairs

PROMPTS = {"type": "running_sums", "size": 7, "terms": 2, "modulus": 5}


class Shuffled(BuilderBase):
    """The right answer against itself shuffled; none where a shuffle changes nothing."""

    may_use: ClassVar = frozenset({"model"})

    type: Literal["shuffled"] = "shuffled"
    shift: int = 0
    written: tuple[str, ...] = ("paired",)

    def outputs(self, stage: Pairs) -> tuple[str, ...]:
        return self.written

    def build(self, context: PairsContext) -> Builder:
        return Shuffling(context)


class Shuffling(Builder):
    calls: ClassVar[list[list[int]]] = []

    def build_rows(self, prompts: Sequence[Row], first: int) -> list[Row]:
        self.calls.append([first, len(prompts)])
        rows = []
        for number, row in enumerate(prompts, first):
            words = row["completion"].split()
            wrong = random.sample(words, len(words))
            if wrong != words:
                shifted = number + self.context.stage.builder.shift  # type: ignore[attr-defined]
                pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " ".join(wrong)}
                rows.append({**pair, "prompt_index": shifted, "drawn": torch.rand(1).item()})
        return rows


def stage(**fields: Any) -> Pairs:
    """A stage with the builder; the recipe's union does not know it."""
    builder = Shuffled(**{name: fields.pop(name) for name in ("shift", "written") if name in fields})
    generation = {"prompts_at_once": fields.pop("prompts_at_once", 3)}
    return Pairs(type="pairs", data=PROMPTS, generation=generation, **fields).model_copy(  # type: ignore[arg-type]
        update={"builder": builder}
    )


@pytest.fixture(autouse=True)
def calls() -> list[list[int]]:
    Shuffling.calls.clear()
    return Shuffling.calls


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
class TestMachinery:
    def test_chunks_in_order_with_rows_for_some_prompts_and_lineage(self, calls, tmp_path: Path) -> None:
        results = run_pairs(stage(), tmp_path, seed=2, recipe="shuffles")
        assert calls == [[0, 3], [3, 3], [6, 1]]
        rows = read_rows(tmp_path / "paired.parquet")
        assert results == {"pairs": len(rows)} and 0 < len(rows) < 7
        assert [row["prompt_index"] for row in rows] == sorted({row["prompt_index"] for row in rows})
        assert {(row["recipe"], row["round"], row["seed"]) for row in rows} == {("shuffles", 1, 2)}
        assert all(sorted(row["chosen"].split()) == sorted(row["rejected"].split()) for row in rows)

    def test_a_chunk_that_is_kept_is_not_built_again_and_what_is_drawn_is_its_own(self, calls, tmp_path: Path) -> None:
        run_pairs(stage(), tmp_path / "whole")
        run_pairs(stage(), tmp_path / "part")
        for number in (0, 2):
            (tmp_path / "part" / "work" / f"chunk-{number:06d}.parquet").unlink()
        calls.clear()
        run_pairs(stage(), tmp_path / "part")
        assert calls == [[0, 3], [6, 1]]
        whole, part = ((tmp_path / name / "paired.parquet").read_bytes() for name in ("whole", "part"))
        assert whole == part
        drawn = [row["drawn"] for row in read_rows(tmp_path / "whole" / "paired.parquet")]
        assert len(set(drawn)) == len(drawn)

    def test_another_seed_and_another_round_draw_something_else(self, tmp_path: Path) -> None:
        settings = {"a": ({}, 0), "b": ({}, 1), "c": ({"round": 2}, 0)}
        drawn = []
        for name, (fields, seed) in settings.items():
            run_pairs(stage(**fields), tmp_path / name, seed=seed)
            drawn.append(tuple(row["drawn"] for row in read_rows(tmp_path / name / "paired.parquet")))
        assert len(set(drawn)) == 3

    def test_no_model_is_loaded_that_is_not_asked_for(self, tmp_path: Path) -> None:
        run_pairs(stage(model={"path": str(tmp_path / "nowhere")}), tmp_path / "run")

    def test_a_row_of_another_chunk_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match=r"chunk 0 has the prompts 0 to 2, and a row of builder shuffled has"):
            run_pairs(stage(shift=3), tmp_path)
        assert not list((tmp_path / "work").glob("*.parquet"))

    def test_files_that_were_not_announced_are_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match=r"announced \('unpaired',\) and wrote \('paired',\)"):
            run_pairs(stage(written=("unpaired",)), tmp_path)

    def test_a_chunk_that_is_broken_is_named(self, tmp_path: Path) -> None:
        run_pairs(stage(), tmp_path)
        (tmp_path / "work" / "chunk-000001.parquet").write_bytes(b"PAR1 half")
        with pytest.raises(RunError, match=r"chunk-000001.parquet cannot be read .*: remove it"):
            run_pairs(stage(), tmp_path)


def test_fields_that_a_builder_needs_or_never_uses_are_said() -> None:
    source = {"type": "verifier", "verifier": "exact"}
    found = [str(problem) for problem in stage(rewards=[source], length_debias="tokens").problems()]
    assert [text.split(":")[0] for text in found] == ["rewards", "length_debias"]
    assert "is never used by builder shuffled" in found[0]
    sampled = Pairs(type="pairs", data=PROMPTS)  # type: ignore[arg-type]
    assert [problem.path for problem in sampled.problems()] == ["model", "rewards", "select"]


def test_single_completions_once_each_and_none_that_was_both() -> None:
    def pair(prompt: int, chosen: str, rejected: str) -> Row:
        ids = {"chosen_ids": [ord(chosen)], "rejected_ids": [ord(rejected)]}
        texts = {"prompt": f"p{prompt}", "chosen": chosen, "rejected": rejected}
        scores = {"score_chosen": 2.0, "score_rejected": 1.0, "share_chosen.a": 0.5, "share_rejected.a": 0.25}
        return {**texts, "prompt_index": prompt, **ids, **scores}

    rows = unpaired_rows([pair(0, "a", "b"), pair(0, "b", "c"), pair(0, "a", "c"), pair(1, "b", "a")])
    assert [(row["prompt"], row["completion"], row["label"]) for row in rows] == [
        ("p0", "a", True),
        ("p0", "c", False),
        ("p1", "b", True),
        ("p1", "a", False),
    ]
    assert rows[1] == {
        **{"prompt": "p0", "completion": "c", "label": False, "completion_ids": [ord("c")]},
        **{"score": 1.0, "share.a": 0.25, "prompt_index": 0},
    }
