"""The ranks of a training of several processes, of which one writes a run."""

import os

import torch

_VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)


def own_rank() -> tuple[int, int] | None:
    """Return the rank of this process and the number of ranks; None when it is the only one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = [(torch.distributed.get_rank(), torch.distributed.get_world_size())]
    else:
        texts = [(os.environ.get(rank, ""), os.environ.get(size, "")) for rank, size in _VARIABLES]
        ranks = [(int(rank), int(size)) for rank, size in texts if rank.isdecimal() and size.isdecimal()]
    return next((pair for pair in ranks if pair[1] > 1), None)


def rank_advice(run: str) -> str:
    """Return what to do where every rank makes a checkpointer; nothing when this process is the only one."""
    rank = own_rank()
    if rank is None:
        return ""
    return (
        f"this process is rank {rank[0]} of {rank[1]}, and one rank writes a run: make the Checkpointer on rank 0 "
        f'only; the others load its checkpoints with pp.load("{run}@latest", root=..., into=model)'
    )
