"""One rank of test_cuda.py: `python cuda_worker.py FOLDER RANK WORLD_SIZE BACKEND DEVICE` leaves its results in FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from octvideo.octave import synchronize_norms

from . import norms_worker


def main(folder: Path, rank: int, size: int, backend: str, device: str) -> None:
    """Train norms_worker's network with shared statistics on this rank's share of the clips."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / f'rendezvous_{backend}'}"
    dist.init_process_group(backend, rendezvous, rank=rank, world_size=size)
    net = norms_worker.network(torch.float64).to(device)
    synchronize_norms(net)
    share = slice(6 // size * rank, 6 // size * (rank + 1))
    clips, labels = norms_worker.clips(torch.float64)[share].to(device), (torch.arange(6) % 5)[share].to(device)
    losses = norms_worker.train(DistributedDataParallel(net), clips, labels)
    results = {"losses": losses, "state": {name: value.cpu() for name, value in net.state_dict().items()}}
    torch.save(results, folder / f"{backend}_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
