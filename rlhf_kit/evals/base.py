"""What every evaluation's configuration shares; to add one, write a file and name it in `rlhf_kit.evals.stage`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_kit.config import Config
from rlhf_kit.data.config import DataConfig, Sampled
from rlhf_kit.problems import Problem

if TYPE_CHECKING:
    from rlhf_kit.evals.context import EvalContext
    from rlhf_kit.evals.result import Result
    from rlhf_kit.evals.stage import Eval

Columns = Mapping[str, str]


class EvaluationConfig(Config):
    """Fields and questions of every evaluation."""

    type: str

    @property
    def asks_sources(self) -> bool:
        """Whether it needs the stage's `rewards`."""
        return False

    @property
    def may_ask_sources(self) -> bool:
        """Whether the stage's `rewards` score in it, if there are any."""
        return self.asks_sources

    @property
    def runs_model(self) -> bool:
        """Whether it needs the stage's model."""
        return self.asks_sources

    def data_sets(self) -> Iterator[tuple[str, DataConfig, Columns]]:
        """Every data set it reads: the field, its configuration, and who reads which column."""
        return iter(())

    def row_problem(self, field: str, row: Mapping[str, Any]) -> str | None:
        """What is wrong with a row, said before a model is loaded, beyond what `load_data` finds wrong itself."""
        return None

    def rows_problem(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """What is wrong with the rows of a data set together, said before a model is loaded."""
        return None

    def files(self) -> Iterator[tuple[str, str, bool]]:
        """Files and models beside those of its data: the field, the path or hub id, whether it is a model."""
        return iter(())

    def problems(self, stage: Eval) -> Iterator[Problem]:
        """What cannot work in this stage; paths start at the evaluation."""
        return iter(())

    def run(self, context: EvalContext) -> Result:
        """Evaluate; torch and friends are imported here."""
        raise NotImplementedError


def missing_text(row: Mapping[str, Any], *columns: str) -> str | None:
    """Which of the columns holds neither text nor messages."""
    for column in columns:
        value = row.get(column)
        if not isinstance(value, str) and not (isinstance(value, list) and value):
            return f"{column} is {value!r}, and must be text or messages"
    return None


def is_sampled(data: DataConfig) -> bool:
    """Whether a data set's completions and labels are made when it is read."""
    return isinstance(data, Sampled)
