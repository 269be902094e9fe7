"""One of two gloo processes of test_norms.py: `python norms_worker.py FOLDER RANK` leaves what it computed in FOLDER."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from octvideo.engine.precise_bn import precise_statistics
from octvideo.models import NETWORKS, checkpoint_activations, create, with_nonlocal, with_octave
from octvideo.octave import Octave, OctBatchNorm2d, OctBatchNorm3d, synchronize_norms

DTYPES = {"float64": torch.float64, "float32": torch.float32}
# name: a norm of 8 channels, and the clips of 5 that rank 0 takes
NORMS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "vanilla": (lambda dtype: OctBatchNorm2d(8, dtype=dtype), 3),
    "vanilla 3d": (lambda dtype: OctBatchNorm3d(8, momentum=None, dtype=dtype), 1),
    "octave": (lambda dtype: OctBatchNorm3d(8, alpha=0.25, dtype=dtype), 2),
    "parts": (lambda dtype: OctBatchNorm2d(8, parts=((2, 1), (1, 1), (3, 0)), dtype=dtype), 3),
    "all low": (lambda dtype: OctBatchNorm2d(8, alpha=1.0, momentum=0.3, dtype=dtype), 4),
    "not affine": (lambda dtype: OctBatchNorm2d(8, affine=False, alpha=0.5, dtype=dtype), 3),
    "untracked": (lambda dtype: OctBatchNorm2d(8, track_running_stats=False, alpha=0.5, dtype=dtype), 3),
    "an empty rank": (lambda dtype: OctBatchNorm2d(8, alpha=0.25, dtype=dtype), 5),
    "high only": (lambda dtype: OctBatchNorm3d(8, alpha=0.25, dtype=dtype), 3),
}


def maps(norm: nn.Module, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Five clips' worth of what the norm reads, its means far from zero."""
    generator = torch.Generator().manual_seed(seed)
    size = (2, 4, 3) if isinstance(norm, OctBatchNorm3d) else (4, 3)
    shapes = [(norm.high, size)] + ([(norm.low, (*size[:-2], 2, 2))] if norm.low else [])
    return [(5 + 2 * torch.randn(5, c, *s, generator=generator, dtype=torch.float64)).to(dtype) for c, s in shapes]


def norm_results(name: str, dtype: torch.dtype, clips: slice) -> dict[str, Any]:
    """Two training steps of a norm on a share of the clips, then evaluation."""
    norm = NORMS[name][0](dtype).train()
    for number, parameter in enumerate(norm.parameters()):
        nn.init.uniform_(parameter, 0.5, 1.5, torch.Generator().manual_seed(number))
    synchronize_norms(norm)
    count = 1 if name == "high only" else 2
    results: dict[str, Any] = {"y": [], "dx": []}
    for step in (1, 2):
        x = [part[clips].clone().requires_grad_() for part in maps(norm, dtype, seed=step)[:count]]
        y = outputs(norm, x)
        torch.autograd.backward(y, [part[clips] - 5 for part in maps(norm, dtype, seed=10 + step)[:count]])
        results["y"] += [part.detach() for part in y]
        results["dx"] += [part.grad for part in x]
    results["dw"] = [p.grad for p in norm.parameters()]
    results["state"] = dict(norm.state_dict())
    if norm.track_running_stats:  # else, in evaluation too, by the batch at hand: each rank its own
        results["evaluated"] = [part.detach() for part in outputs(norm.eval(), x)]
    return results


def outputs(norm: nn.Module, x: list[Tensor]) -> list[Tensor]:
    if len(x) == 2:
        return list(norm(Octave(*x)))
    return [norm.normalize_high(x[0]) if norm.low else norm(x[0])]


def network(dtype: torch.dtype) -> nn.Module:
    """The norm behind attention starts at zero and would hide it."""
    spec = with_nonlocal(with_octave(NETWORKS["i3d_tiny"](5, dropout=0.0), 0.25), {"res3": (0,)})
    torch.manual_seed(0)
    net = create(spec).to(dtype)
    for module in net.modules():
        if isinstance(module, OctBatchNorm3d):
            nn.init.ones_(module.weight)
    return net


def clips(dtype: torch.dtype) -> Tensor:
    return torch.randn(6, 3, 4, 32, 32, generator=torch.Generator().manual_seed(3)).to(dtype)


def train(net: nn.Module, clips: Tensor, labels: Tensor, steps: int = 4) -> list[float]:
    """Losses of this process's clips."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net.train()(clips), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(dtype: torch.dtype, rank: int, checkpointed: bool) -> dict[str, Any]:
    net = network(dtype)
    synchronize_norms(net)
    if checkpointed:
        checkpoint_activations(net)
    half = slice(3 * rank, 3 * rank + 3)
    losses = train(DistributedDataParallel(net), clips(dtype)[half], (torch.arange(6) % 5)[half])
    return {"losses": losses, "state": net.state_dict(), "gradients": [p.grad for p in net.parameters()]}


def measured(batches: Iterable[Tensor], synchronized: bool) -> dict[str, Tensor]:
    net = network(torch.float64)
    if synchronized:
        synchronize_norms(net)
    precise_statistics(net, batches)
    return net.state_dict()


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for kind, dtype in DTYPES.items():
        for name, (_, first) in NORMS.items():
            results[f"{name} {kind}"] = norm_results(name, dtype, slice(0, first) if rank == 0 else slice(first, 5))
        for checkpointed in (False, True):
            results[f"network {kind} {checkpointed}"] = trained(dtype, rank, checkpointed)
    batches = clips(torch.float64).split(2)  # three: rank 0 has the first two, rank 1 the last and a shorter one
    own = (batches[:2], [batches[2], batches[0][:1]])[rank]
    results["measured False"] = measured(own, synchronized=False)
    results["measured True"] = measured(own, synchronized=True)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
