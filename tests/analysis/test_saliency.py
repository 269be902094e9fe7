import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octvideo.analysis.saliency import grad_cam
from octvideo.models import NETWORKS, SlowFastSpec, Spec, create, with_octave
from octvideo.models.densenet import DenseNet
from octvideo.octave import Octave
from tests.models.shallow import cut

OTHERS = (
    "101",
    "152_v1f",
    "200",
    "_8x8",
    "_balanced",
    "_0.75",
    "_1.125",
)  # depths and widths of networks that are here


def network(name: str, alpha: float, classes: int = 5) -> nn.Module:
    """Octave to its very last map, so that the classifier pools both frequencies."""
    spec: Spec = cut(NETWORKS[name](classes, dropout=0.5), 1)
    stages = spec.slow.stages if isinstance(spec, SlowFastSpec) else spec.stages
    torch.manual_seed(0)
    return create(with_octave(spec, alpha, ratios=[alpha] * len(stages) if alpha else None)).eval()


def input_for(model: nn.Module, batch: int = 2) -> Tensor:
    spec = model.spec
    video = isinstance(spec, SlowFastSpec) or spec.dims == 3
    return torch.randn(batch, 3, *((8, 48, 48) if video else (64, 64)), generator=torch.Generator().manual_seed(1))


def head_input(model: nn.Module, x: Tensor) -> tuple:
    seen = []
    handle = model.head.register_forward_pre_hook(lambda _, features: seen.append(features))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def spread(a: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Nearest upsampling [N, C, ...] -> [N, C, *size] by repeating, in NumPy."""
    for axis, (own, wanted) in enumerate(zip(a.shape[2:], size, strict=True), start=2):
        a = a.repeat(-(-wanted // own), axis).take(np.arange(wanted), axis)
    return a


@pytest.mark.parametrize(
    "name,alpha",
    [(name, 0.5) for name in NETWORKS if not any(part in name for part in OTHERS)]
    + [(name, 0.0) for name in ("i3d_tiny", "slowfast_4x16_r50", "resnet26", "densenet121", "mobilenet_v2_1.0")],
)
def test_at_the_classifier_it_is_the_closed_form(name: str, alpha: float) -> None:
    """Mean, then linear: the map is sum_c w_kc A_c over its size, low and slow maps repeated; it sums to the logit."""
    model = network(name, alpha)
    x, classes = input_for(model), torch.tensor([3, 1])
    found = grad_cam(model, x, classes)
    weights = model.head.fc.weight.detach().numpy()[classes]  # [N, C]
    maps: list[np.ndarray] = []
    for feature in head_input(model, x):
        maps += [part.numpy() for part in (feature if isinstance(feature, Octave) else [feature])]
    size = tuple(np.max([a.shape[2:] for a in maps], axis=0).tolist())
    channels = np.concatenate([spread(a, size) for a in maps], axis=1)
    if isinstance(model, DenseNet) and model.head.places is not None:
        channels = channels[:, model.head.places.numpy()]  # its weights are in the vanilla order
    expected = np.einsum("nc,nc...->n...", weights, channels) / np.prod(size)
    assert found.raw.shape == (2, *size)
    scale = abs(expected).max()
    np.testing.assert_allclose(found.raw, expected, rtol=1e-4, atol=1e-5 * scale)
    logits = (model(x) - model.head.fc.bias).detach().gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(found.raw.flatten(1).sum(1), logits, rtol=1e-3, atol=1e-4 * float(scale))
    assert found.heat.shape == (2, *x.shape[2:]) and found.heat.min() >= 0
    torch.testing.assert_close(found.heat.flatten(1).amax(1), (found.peak > 0).float())
    positive = F.interpolate(
        torch.from_numpy(expected).float().relu()[:, None],
        x.shape[2:],
        mode="trilinear" if x.dim() == 5 else "bilinear",
    )[:, 0]
    actual = found.heat * found.peak.reshape(-1, *[1] * (x.dim() - 2))
    torch.testing.assert_close(actual, positive, rtol=1e-3, atol=1e-4 * float(scale))


def by_hand(model: nn.Module, layer: nn.Module, x: Tensor, classes: Tensor) -> np.ndarray:
    """Equations 1 and 2 of the paper as they stand, for a layer of one frequency."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: kept.append(output))
    logits = model(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[torch.arange(len(x)), classes].sum(), kept)
    weights = gradient.numpy().mean(axis=tuple(range(2, x.dim())))
    return np.einsum("nc,nc...->n...", weights, kept[0].detach().numpy())


@pytest.mark.parametrize(
    "name,layer", [("i3d_tiny", "stages.res3"), ("resnet26", "stages.res4"), ("se_resnet50", "stem")]
)
def test_of_another_layer_it_is_the_paper_s_equations(name: str, layer: str) -> None:
    model = network(name, 0.0)
    x, classes = input_for(model), torch.tensor([0, 4])
    expected = by_hand(model, model.get_submodule(layer), x, classes)
    np.testing.assert_allclose(
        grad_cam(model, x, classes, layer).raw, expected, rtol=1e-3, atol=1e-5 * abs(expected).max()
    )


class TwoFrequencies(nn.Module):
    """A layer of two frequencies, and behind it the low map upsampled by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.split, self.upsampled = nn.Identity(), nn.Identity()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        low = F.avg_pool2d(x[:, :2], 2, ceil_mode=True, count_include_pad=False)
        high, low = self.split(Octave(x, low))
        all_high = torch.cat(
            [high, low.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., : x.shape[2], : x.shape[3]]], 1
        )
        return self.head(self.mix(self.upsampled(all_high)).relu().mean((2, 3)))


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_a_low_map_counts_as_its_upsampled_self(size: tuple[int, int]) -> None:
    """The Octave in front of the upsampling and the plain map behind it must give the same heat, at any size."""
    model = TwoFrequencies()
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    two, one = grad_cam(model, x, layer="split"), grad_cam(model, x, layer="upsampled")
    torch.testing.assert_close(two.raw, one.raw)
    torch.testing.assert_close(two.heat, one.heat)


def test_octave_and_vanilla_agree_where_both_frequencies_see_the_same() -> None:
    """An even picture and kernels of their centre only: the maps are even, and equal at any alpha with equal weights."""
    vanilla, octave = network("i3d_tiny", 0.0), network("i3d_tiny", 0.5)
    for module in vanilla.modules():
        if isinstance(module, nn.Conv3d):
            middle = tuple(size // 2 for size in module.kernel_size)
            centre = torch.zeros_like(module.weight.data)
            centre[(..., *middle)] = module.weight.data[(..., *middle)]
            module.weight.data = centre
    octave.load_state_dict(vanilla.state_dict())
    x = torch.randn(2, 3, 1, 1, 1, generator=torch.Generator().manual_seed(0)).expand(2, 3, 8, 48, 48)
    torch.testing.assert_close(grad_cam(octave, x).raw, grad_cam(vanilla, x).raw)


class Reds(nn.Module):
    """Class 0 is as much red as there is, class 1 blue."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential()
        self.pool = lambda x: x[:, [0, 2]].flatten(2).mean(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.head(x))


def test_a_network_that_looks_for_red_looks_at_the_red() -> None:
    x = torch.zeros(1, 3, 4, 16, 16)
    x[:, 0, 1:3, 2:6, 3:9] = 1.0
    x[:, 2, :, 10:14, 10:14] = 1.0
    red, blue = (grad_cam(Reds(), x, torch.tensor([label])).heat for label in (0, 1))
    assert torch.equal(red, x[:, 0]) and torch.equal(blue, x[:, 2])


def test_a_trained_network_looks_at_what_makes_the_class() -> None:
    """The class is the colour of a patch in one quarter of noise; the last map has 2 x 2 places."""
    generator = torch.Generator().manual_seed(0)
    places = list(itertools.product((0, 32), (0, 32)))

    def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
        x = 0.3 * torch.randn(count, 3, 64, 64, generator=generator)
        labels = torch.randint(3, (count,), generator=generator)
        quarters = torch.randint(4, (count,), generator=generator)
        for image, label, quarter in zip(x, labels.tolist(), quarters.tolist(), strict=True):
            top, left = places[quarter]
            image[label, top + 8 : top + 24, left + 8 : left + 24] += 2.0
        return x, labels, quarters

    model = network("resnet_tiny", 0.5, classes=3).train()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(25):
        x, labels, _ = batch(16)
        sgd.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        sgd.step()
    x, labels, quarters = batch(32)
    assert (model.eval()(x).argmax(1) == labels).all()
    heat = grad_cam(model, x, labels).heat
    # [N, H, W] -> [N, 2, 32, 2, 32] -> [N, 4], the share of each quarter
    share = heat.unflatten(2, (2, 32)).unflatten(1, (2, 32)).sum((2, 4)).flatten(1)
    assert (share.argmax(1) == quarters).float().mean() >= 0.9


def test_the_class_is_the_network_s_own_unless_one_is_given() -> None:
    model = network("i3d_tiny", 0.25)
    x = input_for(model)
    best = model(x).argmax(1)
    found = grad_cam(model, x)
    assert torch.equal(found.classes, best)
    assert all(torch.equal(a, b) for a, b in zip(found, grad_cam(model, x, best), strict=True))


def test_where_nothing_speaks_for_the_class_there_is_no_heat() -> None:
    found = grad_cam(Reds(), -torch.ones(1, 3, 2, 4, 4))
    assert (found.heat == 0).all() and found.peak == 0 and found.raw.sum() == -1.0


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("layer", [None, "stages.res3", "stages.res9"])
def test_the_model_is_left_as_it_was_also_after_an_error(layer: str | None) -> None:
    model = network("resnet26", 0.25).train()
    model.stages.res2.eval()
    model.stem.conv.weight.requires_grad_(False)
    model.head.fc.weight.grad = torch.ones_like(model.head.fc.weight)
    before, x = state(model), input_for(model)
    modes = [module.training for module in model.modules()]
    asking = [parameter.requires_grad for parameter in model.parameters()]
    if layer == "stages.res9":
        with pytest.raises(ValueError):
            grad_cam(model, x, layer=layer)
    else:
        assert not any(value.requires_grad for value in grad_cam(model, x, layer=layer))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.head.fc.weight.grad == 1).all()
    assert model.stem.conv.weight.grad is None and model.stem.bn.weight.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dropout_and_norms_run_as_in_evaluation() -> None:
    model = network("i3d_tiny", 0.25)
    x = input_for(model)
    assert torch.equal(grad_cam(model, x).raw, grad_cam(model.train(), x).raw)


def test_inside_no_grad_it_works_too() -> None:
    model = network("i3d_tiny", 0.25)
    x = input_for(model)
    with torch.no_grad():
        inside = grad_cam(model, x).raw
        assert not torch.is_grad_enabled()
    assert torch.equal(inside, grad_cam(model, x).raw)


@pytest.mark.parametrize(
    "layer,message",
    [
        ("stages.res6", "no layer 'stages.res6' in ResNet; did you mean 'stages.res"),
        ("", "no layer '' in ResNet"),
        ("zzz", "named_modules() has the names"),
        ("head.dropout", "has no maps of 5 dimensions but [(2, 512)]"),
        ("stages.res2.0.relu", "layer 'stages.res2.0.relu' runs more than once"),
        ("relu", "layer 'relu' did not run"),
    ],
)
def test_a_layer_that_cannot_be_looked_at(layer: str, message: str) -> None:
    model = network("i3d_tiny", 0.0)
    with pytest.raises(ValueError) as error:
        grad_cam(model, input_for(model), layer=layer)
    assert message in str(error.value)


def test_a_layer_that_leads_nowhere() -> None:
    class Idle(Reds):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x)
            return super().forward(x)

    with pytest.raises(ValueError, match="layer 'idle' does not lead to the logits"):
        grad_cam(Idle(), torch.zeros(1, 3, 2, 4, 4), layer="idle")
