"""What every builder of pairs is: its configuration and its class. The package's docstring says what they must keep.

This module imports without torch, so that recipes are checked in a fraction of a second.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_kit.config import Config
from rlhf_kit.problems import Problem

if TYPE_CHECKING:
    from rlhf_kit.pairs.config import Pairs
    from rlhf_kit.pairs.context import PairsContext

PAIRED, UNPAIRED, SFT, COMPLETIONS = OUTPUTS = ("paired", "unpaired", "sft", "completions")

Row = dict[str, Any]


@dataclass(frozen=True)
class Built:
    """What a builder has chosen.

    Attributes:
        files: rows by output: `paired` (`prompt, chosen, rejected`), `unpaired` (`prompt, completion, label`), `sft`
            (`prompt, completion`), `completions` (all that were looked at).
        facts: numbers for the report.
    """

    files: Mapping[str, Sequence[Row]]
    facts: Mapping[str, Any] = field(default_factory=dict)


class BuilderBase(Config):
    """Fields of every builder.

    Attributes:
        needs: optional fields of the stage that must be given.
        may_use: those that may be given besides; any other is refused, since nothing would read it.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    may_use: ClassVar[frozenset[str]] = frozenset()

    type: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data that it cannot do without, beside `prompt`."""
        return ()

    def outputs(self, stage: Pairs) -> tuple[str, ...]:
        """What the stage will write, of `OUTPUTS`."""
        return (PAIRED,)

    def problems(self, stage: Pairs) -> Iterator[Problem]:
        """What cannot work, said before anything is loaded; paths start at the stage."""
        return iter(())

    def files(self) -> Iterator[tuple[str, str, bool]]:
        """What it reads: the field, the file or model (a folder or a hub id), and whether it is a model."""
        return iter(())

    def build(self, context: PairsContext) -> Builder:
        """The builder itself; torch and friends are imported here, and nothing is loaded yet."""
        raise NotImplementedError


class Builder(ABC):
    """Makes the rows of prompts, a chunk at a time."""

    def __init__(self, context: PairsContext) -> None:
        self.context = context

    @abstractmethod
    def build_rows(self, prompts: Sequence[Row], first: int) -> list[Row]:
        """The rows of some prompts, each with `prompt_index`; the first prompt has the number `first`."""

    def finish(self, rows: Sequence[Row]) -> Built:
        """What is written, given the rows of all prompts in order: here all of them, as pairs."""
        from rlhf_kit.pairs.rows import with_lineage

        return Built({PAIRED: with_lineage(rows, self.context.lineage)}, {"pairs": len(rows)})
