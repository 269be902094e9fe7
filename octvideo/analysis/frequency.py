"""Which frequencies activation maps hold: their spectra in space and in time (the paper's Figure 4).

Of every sampled map: |FFT|^2 without a window, summed over square rings max(|f_x|, |f_y|) and divided by the map's own
energy, so that loud channels do not outweigh the others; then the mean over maps.

Square rings, since what a grid of half the size can hold is a square, exactly the one below half of Nyquist. No window:
it would smear one ring into the next, and a map of 8 x 8 has only four. What a map's opposite edges differ by leaks into
high frequencies instead, in all groups alike. The mean (frequency 0) is much of the energy behind a ReLU and no pattern:
it is left out of the curves, and shares are given without it and with it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor, nn

from octvideo.analysis.chart import Line, Panel, draw
from octvideo.errors import UserError
from octvideo.octave import Feature, Octave, upsample

ALL, HIGH, LOW, LOW_OWN_GRID = "all", "high", "low", "low, own grid"
VANILLA = "vanilla"  # ALL of another network, shown beside these
COLOURS = {VANILLA: "#555555", ALL: "#555555", HIGH: "#0072b2", LOW: "#d55e00", LOW_OWN_GRID: "#e6a000"}
EVEN = 1e-12  # a map that varies by less of its energy is even: float32 rounds to 1e-7, squared
CHUNK = 256  # maps that are transformed at a time
STAGE = re.compile(r"(?:^|\.)stages\.[^.]+$")


class LayerError(UserError, ValueError):
    """A layer whose maps cannot be measured."""


@dataclass(frozen=True)
class Profile:
    """The mean spectrum of maps in space, or in time. Of R rings; ring 0 is the mean.

    frequency: [R] cycles per pixel of the high map, or per frame of it.
    energy: [R] share of what varies in a map: energy[0] is 0, the sum 1. None where no map varies.
    density: [R] energy per area of frequencies; 1 is white noise on the high map's grid.
    mean: the mean's share of a map's energy.
    below_half, below_half_with_mean: share of the energy below half of the grid's Nyquist frequency; a ring that lies
    across it counts in part. white: below_half of white noise on the same grid, upsampled where the maps are.
    count, even: maps that were seen, and those of them that do not vary and are left out.
    """

    frequency: list[float]
    energy: list[float] | None
    density: list[float] | None
    mean: float | None
    below_half: float | None
    below_half_with_mean: float | None
    white: float | None
    count: int
    even: int


@dataclass(frozen=True)
class Spectrum:
    """Of one frequency group of a layer. own, grid: [(T,) H, W] of its maps, and of what they were measured on. time: of
    whole channels, each over all places. None for images, and where it would repeat LOW's: on its own grid, unless time
    is pooled."""

    own: tuple[int, ...]
    grid: tuple[int, ...]
    space: Profile
    time: Profile | None


def space_rings(maps: Tensor) -> Tensor:
    """[M, H, W] -> float64 [M, R], R = max(H, W) // 2 + 1: the energy in each square ring; the sum is the mean square."""
    height, width = maps.shape[1:]
    power = torch.fft.fft2(maps.double(), norm="forward").abs().square()
    return power.new_zeros(len(maps), _rings(max(height, width))).index_add_(
        1, _square_rings(height, width).flatten(), power.flatten(1)
    )


def time_rings(series: Tensor) -> Tensor:
    """[M, P, T] -> float64 [M, T // 2 + 1]: the energy of each frequency in time, mean over the P places."""
    power = torch.fft.fft(series.double(), norm="forward").abs().square().mean(dim=1)
    ring = _line_rings(series.shape[2])
    return power.new_zeros(len(series), _rings(series.shape[2])).index_add_(1, ring, power)


def _rings(size: int) -> int:
    return size // 2 + 1


def _line_rings(size: int) -> Tensor:
    """int64 [size]: the ring of each place in an FFT."""
    place = torch.arange(size)
    return torch.minimum(place, size - place)


def _square_rings(height: int, width: int) -> Tensor:
    """int64 [H, W], in steps of the longer side's frequency."""
    size = max(height, width)
    down, across = (_line_rings(side) / side for side in (height, width))
    return (torch.maximum(down[:, None], across) * size).round().long().clamp(max=size // 2)


def _below_half(size: int) -> Tensor:
    """[R]: how much of each ring, from k - 1/2 to k + 1/2 cycles in `size` pixels, lies below half of Nyquist, size / 4."""
    share = (size / 4 - torch.arange(_rings(size), dtype=torch.float64) + 0.5).clamp(0, 1)
    share[0] = 1
    return share


def white_power(own: int, grid: int) -> Tensor:
    """float64 [grid]: |FFT|^2 to be expected of white noise of variance 1, upsampled from `own` to `grid` values.

    The values are independent, so it is the sum of |FFT|^2 of each alone. In two directions it is a product.
    """
    impulses = upsample(torch.eye(own, dtype=torch.float64)[None], (grid,))[0]
    return torch.fft.fft(impulses, norm="forward").abs().square().sum(dim=0)


@dataclass
class _Sum:
    """Spectra being added up. own, grid: sizes of the maps and of what is transformed, one for time and two for space.
    step: of the grid, in pixels of the high map."""

    own: tuple[int, ...]
    grid: tuple[int, ...]
    step: int = 1
    count: int = 0
    even: int = 0
    varying: Tensor = field(init=False)  # [R] sums of shares of what varies, and of all
    whole: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.varying, self.whole = torch.zeros(2, _rings(max(self.grid)), dtype=torch.float64)

    def add(self, energy: Tensor) -> None:
        """energy: [M, R] of M maps."""
        total, varying = energy.sum(dim=1), energy[:, 1:].sum(dim=1)
        kept = varying > EVEN * total
        self.count += len(energy)
        self.even += int((~kept).sum())
        self.varying[1:] += (energy[kept, 1:] / varying[kept, None]).sum(dim=0)
        self.whole += (energy[kept] / total[kept, None]).sum(dim=0)

    def profile(self) -> Profile:
        size, kept = max(self.grid), self.count - self.even
        frequency = (torch.arange(_rings(size)) / (size * self.step)).tolist()
        if not kept:
            return Profile(frequency, None, None, None, None, None, None, self.count, self.even)
        below, places = _below_half(size), self._per_ring(torch.ones(self.grid, dtype=torch.float64))
        energy, whole = self.varying / kept, self.whole / kept
        white = self._white()
        # White noise spreads evenly over all places but the mean's; a grid of wider steps has them closer together.
        density = energy / places * (places.sum() - 1) * self.step ** len(self.grid)
        return Profile(
            frequency,
            energy.tolist(),
            density.tolist(),
            float(whole[0]),
            float(below @ energy),
            float(below @ whole),
            float(below[1:] @ white[1:] / white[1:].sum()),
            self.count,
            self.even,
        )

    def _white(self) -> Tensor:
        powers = [white_power(own, grid) for own, grid in zip(self.own, self.grid, strict=True)]
        return self._per_ring(powers[0][:, None] * powers[1] if len(powers) == 2 else powers[0])

    def _per_ring(self, power: Tensor) -> Tensor:
        ring = _square_rings(*self.grid) if len(self.grid) == 2 else _line_rings(*self.grid)
        return power.new_zeros(_rings(max(self.grid))).index_add_(0, ring.flatten(), power.flatten())


class _Group:
    """The sampled maps of a frequency group, measured and forgotten."""

    def __init__(
        self, own: tuple[int, ...], grid: tuple[int, ...], high: tuple[int, ...], limit: int, seed: int
    ) -> None:
        steps = [-(-wide // narrow) for wide, narrow in zip(high, grid, strict=True)]
        self.own, self.grid, self.limit = own, grid, limit
        self.space = _Sum(own[-2:], grid[-2:], max(steps[-2:]))
        timed = len(grid) == 3 and (steps[0] > 1 or max(steps) == 1)
        self.time = _Sum(own[:1], grid[:1], steps[0]) if timed else None
        # Apart, so that LOW and LOW_OWN_GRID draw the same planes.
        self.of_planes, self.of_channels = (torch.Generator().manual_seed(seed) for _ in range(2))

    @property
    def full(self) -> bool:
        return self.space.count >= self.limit

    def add(self, maps: Tensor, per_input: int) -> None:
        """Draw from the maps [C, (T,) H, W] of one input: planes for space, and for time as many in whole channels."""
        planes = maps.flatten(0, -3)  # [C, (T,) H, W] -> [C*T, H, W]
        take = min(per_input, self.limit - self.space.count)
        if not take:
            return
        for part in _draw(planes, take, self.of_planes).split(CHUNK):
            self.space.add(space_rings(upsample(part[:, None], self.grid[-2:])[:, 0]))
        if self.time is not None:
            frames = maps.shape[1]
            for part in _draw(maps, -(-take // frames), self.of_channels).split(max(1, CHUNK // frames)):
                series = part.flatten(2).transpose(1, 2)  # [M, T, H, W] -> [M, H*W, T]
                self.time.add(time_rings(upsample(series, self.grid[:1])))

    def spectrum(self) -> Spectrum:
        return Spectrum(self.own, self.grid, self.space.profile(), self.time.profile() if self.time else None)


def _draw(maps: Tensor, count: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randperm(len(maps), generator=generator)[:count]
    return maps[chosen.to(maps.device)].cpu().double()


Spectra = dict[str, dict[str, Spectrum]]
"""Layer -> group -> its spectrum."""


def stages(model: nn.Module) -> list[str]:
    """The names of the network's stages, in both pathways of a SlowFast."""
    return [name for name, _ in model.named_modules() if STAGE.search(name)]


@torch.no_grad()
def spectra(
    model: nn.Module,
    inputs: Iterable[Tensor],
    *,
    layers: Sequence[str] | None = None,
    maps: int = 10_000,
    per_input: int = 50,
    seed: int = 0,
) -> Spectra:
    """Spectra of the outputs of `layers`, from network inputs [N, C, (T,) H, W] of one size, read until there are enough.

    layers: names of modules. None is every stage that hands on two frequencies, and every stage of a network that has
    no such stage.
    maps: [H, W] maps to draw of each group of a layer; per_input: of those, from each of the N at most. 10,000 are the
    paper's. Fewer where the inputs end.

    Groups are ALL for a layer of one frequency, else HIGH, LOW and LOW_OWN_GRID. LOW is upsampled to the high map's size
    (low[i // 2]), which is how the network adds it to high ones, and shares an axis with them; the steps that this
    puts in are part of it. LOW_OWN_GRID is the same maps as they are stored: nothing above half of Nyquist can be in them,
    whatever the weights, and their `below_half` is about half of their OWN Nyquist.

    Errors: LayerError for a layer that is not there, does not run, gives no maps, maps of several sizes or values that
    are not finite; ValueError for a model in training mode, whose statistics would change.
    """
    if model.training:
        raise ValueError("the model is in training mode; call eval() first")
    names = list(dict.fromkeys(layers or stages(model)))
    modules = {name: _module(model, name) for name in names}
    groups: dict[str, dict[str, _Group]] = {name: {} for name in names}
    dims = 0

    def watch(name: str) -> Callable[[nn.Module, object, Feature], None]:
        # Measured here and not behind the network: what follows may be a ReLU in place.
        def behind(module: nn.Module, _: object, output: Feature) -> None:
            for group, (part, grid, high) in _parts(name, output, dims).items():
                own = tuple(part.shape[2:])
                sampled = groups[name].setdefault(group, _Group(own, grid, high, maps, seed))
                if sampled.own != own:
                    raise LayerError(f"layer {name!r} gives maps of {sampled.own} and of {own}; choose another")
                for one in part:
                    sampled.add(one, per_input)

        return behind

    handles = [modules[name].register_forward_hook(watch(name)) for name in names]
    try:
        for x in inputs:
            dims = x.dim()
            model(x)
            if absent := [name for name in names if not groups[name]]:
                raise LayerError(f"layer {absent[0]!r} did not run; choose another")
            if all(group.full for of_layer in groups.values() for group in of_layer.values()):
                break
    finally:
        for handle in handles:
            handle.remove()
    if not layers and any(LOW in of_layer for of_layer in groups.values()):
        groups = {name: of_layer for name, of_layer in groups.items() if LOW in of_layer}
    return {name: {key: group.spectrum() for key, group in of_layer.items()} for name, of_layer in groups.items()}


def _module(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules())
    if name not in modules or not name:
        close = difflib.get_close_matches(name, modules, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"stages are {', '.join(stages(model))}"
        raise LayerError(f"no layer {name!r} in {type(model).__name__}; {hint}")
    return modules[name]


def _parts(name: str, output: Feature, dims: int) -> dict[str, tuple[Tensor, tuple[int, ...], tuple[int, ...]]]:
    """Group -> its maps [N, C, (T,) H, W], the grid to measure them on, and the high map's size."""
    given = output if isinstance(output, Octave) else (output,)
    if not all(isinstance(part, Tensor) and part.dim() == dims for part in given):
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in given]
        raise LayerError(f"layer {name!r} has no maps of {dims} dimensions but {shapes}; choose another")
    if not all(part.isfinite().all() for part in given):
        raise LayerError(f"layer {name!r} gives values that are not finite; the weights are of no use")
    if not isinstance(output, Octave):
        size = tuple(output.shape[2:])
        return {ALL: (output, size, size)}
    high, low = output
    size, own = tuple(high.shape[2:]), tuple(low.shape[2:])
    parts = {HIGH: (high, size, size), LOW: (low, size, size), LOW_OWN_GRID: (low, own, size)}
    return {group: part for group, part in parts.items() if part[0].shape[1]}


def picture(found: Spectra) -> Image.Image:
    """Density over frequency: layers side by side, space above time."""
    rows = [[_panel(layer, "space", "pixel of the high map", groups) for layer, groups in found.items()]]
    if any(one.time for groups in found.values() for one in groups.values()):
        rows.append([_panel(layer, "time", "frame of the map", groups) for layer, groups in found.items()])
    return draw(rows, note="energy without the mean, over that of white noise; the upright line is half of Nyquist")


def _panel(layer: str, kind: str, unit: str, groups: dict[str, Spectrum]) -> Panel:
    lines = []
    for group, one in groups.items():
        profile: Profile | None = getattr(one, kind)
        if profile and profile.density:
            points = list(zip(profile.frequency, profile.density, strict=True))[1:]
            lines.append(Line(group, COLOURS[group], points, dashed=group == LOW_OWN_GRID))
    size = " x ".join(str(side) for side in next(iter(groups.values())).grid)
    return Panel(f"{layer} ({size})", f"cycles per {unit}", lines, end=0.5, upright=0.25, level=1.0)
