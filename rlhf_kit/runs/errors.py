"""The error of everything that reads or writes run folders."""

from __future__ import annotations

from rlhf_kit.errors import RunError

__all__ = ["RunError"]
