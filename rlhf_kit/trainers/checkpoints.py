"""Which checkpoints of a stage are whole."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

STATE_FILE = "trainer_state.json"
CONTENTS_FILE = "contents.json"


def newest_checkpoints(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint in `folder`, and those after it, which a kill or a full disk has cut short."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    broken = []
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if is_whole(path):
            return path, broken
        broken.append(path)
    return None, broken


def write_contents(checkpoint: Path) -> None:
    """List the files of a checkpoint that is written, with their sizes."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != CONTENTS_FILE]
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    (checkpoint / CONTENTS_FILE).write_text(json.dumps(sizes, indent=2), encoding="utf-8")


def disown(checkpoint: Path) -> None:
    """Let a checkpoint that is about to be written again not count as whole until it is."""
    for name in (CONTENTS_FILE, STATE_FILE):
        (checkpoint / name).unlink(missing_ok=True)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is there to its end; the trainer's state is written last, then the contents.

    Files tell themselves how long they should be, so nothing but their ends is read. Where the contents are missing, a
    kill fell between the two.
    """
    if not (checkpoint / STATE_FILE).is_file() or not _has_its_contents(checkpoint):
        return False
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    states = [checkpoint / f"rng_state_{rank}.pth" for rank in range(ranks)] if ranks > 1 else []
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    return all(path.is_file() for path in states) and all(map(_is_whole_file, files))


def _has_its_contents(checkpoint: Path) -> bool:
    contents = checkpoint / CONTENTS_FILE
    if not contents.is_file():
        return True
    try:
        sizes = json.loads(contents.read_bytes())
    except ValueError:
        return False
    files = {checkpoint / name: size for name, size in sizes.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in files.items())


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
