"""One of two gloo processes of the DDP test: `python ddp_worker.py FOLDER RANK` leaves its gradients in FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from octvideo.octave import OctBatchNorm3d, OctConv3d


def network() -> nn.Sequential:
    """The same start in every process. The norm is frozen: its batch statistics would differ between the halves."""
    torch.manual_seed(5)
    net = nn.Sequential(
        OctConv3d(3, 8, 3, padding=1, alpha_out=0.5, pool=(2, 2, 2)),
        OctBatchNorm3d(8, alpha=0.5),
        OctConv3d(8, 8, 3, (1, 2, 2), 1, alpha_in=0.5, alpha_out=0.5, pool=(2, 2, 2)),
        OctConv3d(8, 4, 1, alpha_in=0.5, pool=(2, 2, 2)),
    ).double()
    for buffer in (net[1].running_mean, net[1].running_var):
        buffer.uniform_(0.5, 1.5)
    net[1].eval()
    return net


def batch() -> Tensor:
    return torch.randn(8, 3, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    net = DistributedDataParallel(network())
    net(batch().chunk(2)[rank]).square().mean().backward()
    gradients = {name: p.grad for name, p in net.module.named_parameters()}
    torch.save(gradients, folder / f"gradients{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
