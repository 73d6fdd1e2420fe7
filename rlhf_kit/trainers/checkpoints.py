"""Which checkpoints of a stage are whole."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

STATE_FILE = "trainer_state.json"


def newest_checkpoints(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint in `folder`, and those after it, which a kill or a full disk has cut short."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    broken = []
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if is_whole(path):
            return path, broken
        broken.append(path)
    return None, broken


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is there to its end; the trainer's state is written last.

    Files tell themselves how long they should be, so nothing but their ends is read.
    """
    if not (checkpoint / STATE_FILE).is_file():
        return False
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    states = [checkpoint / f"rng_state_{rank}.pth" for rank in range(ranks)] if ranks > 1 else []
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    return all(path.is_file() for path in states) and all(map(_is_whole_file, files))


def _is_whole_file(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return _is_whole_safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin"):  # torch's archives, whose index is at the end
        return zipfile.is_zipfile(path)
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return False
    return True


def _is_whole_safetensors(path: Path) -> bool:
    """The header, behind its length in 8 bytes, says where the last tensor ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return False
        (length,) = struct.unpack("<Q", start)
        if 8 + length > size:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0) == size
