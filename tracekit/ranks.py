"""Ranks: which of several processes this one is, as a launcher says in the environment.

    torchrun, accelerate launch    RANK           WORLD_SIZE      LOCAL_RANK
    srun                           SLURM_PROCID   SLURM_NTASKS    SLURM_LOCALID

Ranks share nothing but the folder: each begins with its share of the shards and goes on with what nobody holds, so that
any number of processes may finish what another number began. No rank waits for another.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

__all__ = ["Rank", "has_own_devices", "this_rank"]

ItemT = TypeVar("ItemT")

_LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
_SLURM_STEP = "SLURM_STEP_ID"
"""Set in what srun starts; the batch script itself has the other variables too, and is alone."""


class Rank(NamedTuple):
    """One process among several."""

    number: int
    """Counted from 0 over all machines."""
    world_size: int
    """How many there are."""
    local_number: int
    """Counted from 0 on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether it is the one that talks."""
        return self.number == 0

    def own_first(self, items: Sequence[ItemT]) -> list[ItemT]:
        """All items, this rank's share first, then the shares of the ranks after it."""
        shares = [list(items[start :: self.world_size]) for start in range(self.world_size)]
        return [item for share in (*shares[self.number :], *shares[: self.number]) for item in share]


def this_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """This process; rank 0 of 1 where no launcher started it."""
    for rank, world, local in _LAUNCHERS:
        if rank.startswith("SLURM") and _SLURM_STEP not in environment:
            continue
        values = [environment.get(name, "") for name in (rank, world, local)]
        if all(value.isdigit() for value in values[:2]) and int(values[0]) < int(values[1]):
            return Rank(int(values[0]), int(values[1]), int(values[2]) if values[2].isdigit() else 0)
    return Rank(0, 1, 0)


def has_own_devices(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether no other rank uses the devices that this process sees: it is alone, alone on its machine, or Slurm has
    bound to each task devices of its own. What else may be arranged cannot be seen from here, and does not count.
    """
    if this_rank(environment).world_size == 1 or environment.get("LOCAL_WORLD_SIZE") == "1":
        return True
    tasks, nodes = environment.get("SLURM_NTASKS"), environment.get("SLURM_STEP_NUM_NODES")
    is_bound = "SLURM_GPUS_PER_TASK" in environment or (tasks is not None and tasks == nodes)
    return _SLURM_STEP in environment and "LOCAL_WORLD_SIZE" not in environment and is_bound
