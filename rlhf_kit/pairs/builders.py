"""Builders of pairs, one file each: its configuration and its class.

To add one, write the file and name its configuration here.
"""

from __future__ import annotations

from rlhf_kit.pairs.sampled import Sampled

BuilderConfig = Sampled
