"""Data files: on this machine, or at an address."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from rlhf_kit.errors import RunError

SUPERSEDED = ".superseded-"  # in the name of a folder that is put aside, before its number
FINGERPRINTED = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.jinja")


def is_address(path: str) -> bool:
    """Whether `path` is to be fetched by HTTP."""
    return path.startswith(("https://", "http://"))


def local_file(path: str) -> Path:
    """The file at `path`; what an http(s) address holds is fetched once, into `$XDG_CACHE_HOME/rlhf_kit`.

    Raises:
        ValueError: there is no such file.
        RunError: the address cannot be read.
    """
    if not is_address(path):
        if not Path(path).is_file():
            raise ValueError(f"{path}: there is no such file")
        return Path(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_kit"
    kept = cache / hashlib.sha256(path.encode()).hexdigest()[:16] / Path(path.partition("?")[0]).name
    if not kept.is_file():
        from torch.hub import download_url_to_file  # here, since `check` must not wait for torch

        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            download_url_to_file(path, str(kept), progress=False)  # moves the whole file into place at the end
        except OSError as error:
            raise RunError(
                f"{path} cannot be read ({error}); where there is no network, fetch the file elsewhere and give its "
                "path instead"
            ) from error
    return kept


def fingerprint(path: Path) -> str | None:
    """SHA-256 of a file, or of a model's files in the order of their names; None for anything else."""
    files = [path] if path.is_file() else sorted(file for pattern in FINGERPRINTED for file in path.glob(pattern))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}" if files else None


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def put_aside(folder: Path) -> Path:
    """Rename what was made from something else to the first free `<name>.superseded-N`, and return that path."""
    taken = {path.name for path in folder.parent.iterdir()}
    number = next(n for n in range(1, len(taken) + 2) if f"{folder.name}{SUPERSEDED}{n}" not in taken)
    return folder.rename(folder.with_name(f"{folder.name}{SUPERSEDED}{number}"))
