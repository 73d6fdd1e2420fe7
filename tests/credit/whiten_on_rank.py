"""One process of `test_whitening_over_ranks`: `whiten_on_rank.py RANK WORLD_SIZE FOLDER`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rlhf_kit.credit import whiten

if __name__ == "__main__":
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    cases = torch.load(folder / f"in{rank}.pt")
    torch.save(
        [whiten(values, mask, shift, distributed=True) for values, mask, shift in cases],
        folder / f"out{rank}.pt",
    )
    dist.destroy_process_group()
