"""Training steps of the motion demo's networks, as a run takes them, on random clips."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octvideo import build
from octvideo.engine.nonfinite import RunningStatistics
from octvideo.engine.train import train_step

ROOT = Path(__file__).parents[2]
SMALL = ("DATA.NUM_FRAMES", "4", "DATA.TRAIN_CROP", "32", "DATA.TEST_CROP", "32", "MODEL.DROPOUT", "0.0")


@dataclass
class Trained:
    losses: list[float]
    model: nn.Module
    before: dict[str, Tensor]


class Stepper:
    """A network on a device, and its optimizer. clips: of a batch, the same for each step."""

    def __init__(self, device: str, *overrides: str, name: str = "oct_i3d_tiny", batch: int = 4) -> None:
        self.device = torch.device(device)
        self.cfg = build.load_config(ROOT / f"configs/motion/{name}.yaml", [*SMALL, *overrides])
        model = build.network(self.cfg)
        self.before = {name: value.clone() for name, value in model.state_dict().items()}
        self.model = build.place(self.cfg, model, self.device, training=True).train()
        self.optimizer = build.optimizer(self.cfg, self.model)
        self.statistics = RunningStatistics(self.model)
        self.precision = build.precision(self.cfg, self.device)
        generator = torch.Generator().manual_seed(0)
        clips = torch.randn(batch, *build.clip_size(self.cfg, self.cfg.DATA.TRAIN_CROP), generator=generator)
        self.clips = clips.to(self.device).contiguous(memory_format=build.memory_format(self.cfg))
        self.labels = torch.arange(batch, device=self.device) % self.cfg.MODEL.NUM_CLASSES

    def step(self) -> Tensor:
        """Take a step; return the mean loss, on the device."""
        rest = (F.cross_entropy, self.precision, self.statistics)
        return train_step(self.model, self.optimizer, self.clips, self.labels, 0.02, *rest).loss

    def trained(self, steps: int) -> Trained:
        losses = [self.step().clone() for _ in range(steps)]
        return Trained([float(loss) for loss in losses], self.model, self.before)
