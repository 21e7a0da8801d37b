"""Run by torchrun: joint R1 with every process holding its share of the layers (see test_joint.py)."""

import sys
from pathlib import Path

import torch
from torch import distributed

from jqlib import train_r1_joint

folder = Path(sys.argv[1])
distributed.init_process_group("gloo")
rank, world = distributed.get_rank(), distributed.get_world_size()
acts = torch.load(folder / "acts.pt")
mine = dict(list(acts.items())[rank::world])
for steps in (3, None):
    R = train_r1_joint(mine, next(iter(mine.values())).shape[1], len(acts), max_steps=steps)
    torch.save(R, folder / f"{steps}-{rank}.pt")
distributed.destroy_process_group()
