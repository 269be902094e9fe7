"""octavize against with_octave, against the vanilla network where both must agree, and on what it cannot carry."""

import copy
import math
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octvideo.models import NETWORKS, Spec, checkpoint_activations, create, with_octave
from octvideo.octave import ConversionError, OctaveNetwork, OctBatchNorm2d, OctConv2d, octavize
from octvideo.octave.convert import Convolution
from octvideo.octave.rewrite import Row

from ..models.shallow import cut

Alpha = float | Sequence[float] | Callable[[Convolution], float]
# name -> (input size, alpha of octavize). What with_octave keeps on one frequency by its own rules, a function says.
OURS = {
    "resnet50_v1b": ((3, 64, 64), 0.25),
    "resnext50_32x4d": ((3, 64, 64), 0.25),
    "se_resnet50": ((3, 64, 64), 0.25),
    "densenet121": ((3, 64, 64), 0.25),
    "mobilenet_v1_1.0": ((3, 64, 64), 0.25),
    "mobilenet_v2_1.0": (
        (3, 64, 64),
        lambda c: 0.0 if c.name.endswith("conv3") or "tail" in c.name or c.size == (2, 2) else 0.25,
    ),
    "c2d_r50": ((3, 4, 64, 64), 0.25),
    "i3d_r50": ((3, 4, 64, 64), 0.25),
    "slowfast_4x16_r50": ((3, 16, 64, 64), lambda c: 0.0 if "laterals.stem" in c.name or c.size == (2, 2) else 0.25),
}


def randomize(model: nn.Module) -> None:
    """Weights under which every layer matters."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


@pytest.mark.parametrize(("name", "pool"), [*((name, None) for name in OURS), ("i3d_r50", (2, 2, 2))])
def test_it_is_what_with_octave_builds(name: str, pool: tuple[int, ...] | None) -> None:
    check_against_with_octave(cut(NETWORKS[name](10), keep=1), *OURS[name], pool)


@pytest.mark.parametrize("name", ["i3d_r50", "densenet121"])
def test_rounded_to_multiples_it_is_so_too(name: str) -> None:
    check_against_with_octave(cut(NETWORKS[name](10), keep=1), *OURS[name], None, round_to=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50_v1b", "c2d_r50", "i3d_r50", "slowfast_4x16_r50"])
def test_it_is_what_with_octave_builds_at_full_depth(name: str) -> None:
    check_against_with_octave(NETWORKS[name](10), *OURS[name], None)


def check_against_with_octave(
    spec: Spec, size: tuple[int, ...], alpha: Alpha, pool: tuple[int, ...] | None, round_to: int = 1
) -> None:
    vanilla, octave = create(spec).eval(), create(with_octave(spec, 0.25, pool=pool, round_to=round_to)).eval()
    randomize(vanilla)
    octave.load_state_dict(vanilla.state_dict())
    x = torch.randn(1, *size)
    converted = octavize(vanilla, alpha, x, pool=pool, min_size=3, round_to=round_to)
    with torch.no_grad():
        assert torch.equal(converted(x), octave(x))
    assert not converted.report.notes and any(row.alpha_in and row.alpha_out for row in converted.report.rows)


def test_at_alpha_0_it_is_the_network_bit_for_bit() -> None:
    network = Everything().eval()
    x = torch.randn(2, 3, 32, 32)
    converted = octavize(network, 0.0, x)
    assert torch.equal(converted(x), network(x))
    before, after = converted.report.macs
    assert before == after > 0


class Everything(nn.Module):
    """Every kind of layer that carries two frequencies, and some that do not."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        max_pool, mean_pool = (nn.MaxPool2d, nn.AvgPool2d) if dims == 2 else (nn.MaxPool3d, nn.AvgPool3d)
        own: dict = {"padding_mode": "replicate", "padding": 1}  # a constant map stays one
        step = (1,) * (dims - 2) + (2, 2)
        self.stem = nn.Sequential(conv(3, 16, 3, step, **own), norm(16), nn.ReLU(inplace=True))
        self.same = nn.Sequential(conv(16, 16, 3, **own), norm(16), nn.GELU())
        self.depthwise = conv(16, 32, 3, groups=16, **own)
        self.dilated = conv(32, 16, 3, padding=2, dilation=2, padding_mode="replicate", bias=False)
        self.squeeze, self.excite = conv(16, 4, 1), conv(4, 16, 1)
        self.grow = conv(16, 8, 3, **own)
        self.joined = norm(40)
        self.pool = max_pool(3, step, 1)
        self.narrow = conv(40, 16, 1)
        self.scale = nn.Parameter(torch.rand(16, *(1,) * dims))
        self.shuffled = conv(16, 16, 1)
        self.half = mean_pool(step, step)
        self.strided = conv(16, 24, 3, step, **own)
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.same(x)  # one plain, one of two
        x = self.dilated(F.silu(self.depthwise(x)))
        gate = self.excite(F.relu(self.squeeze(x.mean(list(range(2, x.dim())), keepdim=True)))).sigmoid()
        x = F.dropout(gate * x, 0.5, training=self.training)
        y = self.grow(x)
        x = torch.cat([x, y, self.grow_twice(y)], dim=1)  # an order of channels of its own
        x = self.pool(F.relu(self.joined(x), inplace=True))
        x = self.narrow(x).mul_(self.scale)
        x = x.view(x.shape[0], 4, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)  # a shuffle of channels
        x = self.strided(self.shuffled(x) + 1)
        n, c = x.shape[:2]
        return self.fc(F.adaptive_avg_pool2d(x.flatten(2).unsqueeze(-1), 1).view(n, c))

    def grow_twice(self, y: Tensor) -> Tensor:
        return torch.cat((y, -y), 1)


def constant_maps(*size: int) -> Tensor:
    """[N, C, ...] float64: every position has the same value, so the frequencies hold the same too."""
    return torch.randn(*size[:2], *(1,) * (len(size) - 2), dtype=torch.float64).expand(size).clone()


@pytest.mark.parametrize("pool", [(2, 2), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_on_constant_maps_it_agrees_with_the_vanilla_network(alpha: float, pool: tuple[int, ...]) -> None:
    # There pooling and upsampling change nothing: what is left is that each channel meets its own weights.
    network = Everything(len(pool)).double().eval()
    randomize(network)
    size = (4,) * (len(pool) - 2) + (32, 32)
    x = constant_maps(3, 3, *size)
    converted = octavize(network, [alpha] * 3, x, pool=pool)
    assert sum(row.alpha_out == alpha for row in converted.report.rows) >= 7
    torch.testing.assert_close(converted(x), network(x), rtol=1e-10, atol=1e-10)


def test_names_and_state_dict_are_the_network_s() -> None:
    network, x = Everything(), torch.randn(2, 3, 32, 32)
    converted = octavize(network, 0.5, x, min_size=4)
    assert [name for name, _ in converted.named_modules()] == [name for name, _ in network.named_modules()]
    assert list(converted.state_dict()) == list(network.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(converted.state_dict().values(), network.state_dict().values(), strict=True)
    )
    other = Everything()
    converted.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(converted.state_dict(), strict=True)


def test_weights_are_copied_or_shared() -> None:
    network, x = Everything(), torch.randn(2, 3, 32, 32)
    copied, shared = (octavize(network, 0.5, x, min_size=4, share=share) for share in (False, True))
    assert not {id(t) for t in copied.parameters()} & {id(t) for t in network.parameters()}
    assert {id(t) for t in shared.parameters()} == {id(t) for t in network.parameters()}
    shared(x).sum().backward()
    assert network.dilated.weight.grad is not None
    assert torch.equal(network.joined.running_mean, shared.joined.running_mean)
    assert not torch.equal(network.joined.running_mean, copied.joined.running_mean)
    assert type(network.same[0]) is nn.Conv2d  # the network itself is as it was


def test_it_trains_and_follows_the_mode_and_other_sizes() -> None:
    converted = octavize(Everything(), 0.5, torch.randn(1, 3, 32, 32), min_size=4)
    assert converted.training
    x = torch.randn(5, 3, 50, 46)
    loss = converted(x).square().sum()
    loss.backward()
    assert all(p.grad is not None for name, p in converted.named_parameters() if "unused" not in name)
    assert not torch.equal(converted(x), converted(x))  # F.dropout reads the network's own mode
    converted.eval()
    assert torch.equal(converted(x), converted(x))


def test_a_deep_copy_is_whole_and_apart() -> None:
    converted = octavize(Everything().eval(), 0.5, torch.randn(1, 3, 32, 32), min_size=4)
    twin, x = copy.deepcopy(converted), torch.randn(2, 3, 32, 32)
    assert isinstance(twin, OctaveNetwork) and list(twin.state_dict()) == list(converted.state_dict())
    assert torch.equal(twin(x), converted(x)) and str(twin.report) == str(converted.report)
    nn.init.zeros_(twin.fc.weight)
    assert not torch.equal(twin(x), converted(x))


def test_it_can_be_pickled() -> None:
    converted, x = octavize(Everything().eval(), 0.5, torch.randn(1, 3, 32, 32), min_size=4), torch.randn(2, 3, 32, 32)
    twin = pickle.loads(pickle.dumps(converted))
    assert torch.equal(twin(x), converted(x)) and str(twin.report) == str(converted.report)


def test_it_compiles_and_exports_in_one_graph() -> None:
    converted, x = octavize(Everything().eval(), 0.5, torch.randn(1, 3, 32, 32), min_size=4), torch.randn(2, 3, 32, 32)
    exported = torch.export.export(converted, (x,)).module()
    assert torch.equal(exported(x), converted(x))
    assert torch._dynamo.explain(converted)(x).graph_break_count == 0


def test_hooks_stay() -> None:
    network, seen = Everything(), []
    network.dilated.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    octavize(network, 0.5, torch.randn(1, 3, 32, 32), min_size=4).eval()(torch.randn(1, 3, 32, 32))
    assert seen == [OctConv2d]


# --- what it costs ---


def rows(network: nn.Module, alpha: Alpha, x: Tensor, **options: int) -> dict[str, Row]:
    return {row.name: row for row in octavize(network, alpha, x, **options).report.rows}


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75, 1.0])
def test_multiply_adds_follow_the_law(alpha: float) -> None:
    found = rows(Everything(), [alpha, alpha, 0.0], torch.randn(2, 3, 32, 32))
    law, one_side = 1 - 0.75 * alpha * (2 - alpha), 1 - 0.75 * alpha  # Table 1 of the paper
    expected = {"stem.0": 1, "same.0": one_side, "depthwise": one_side, "dilated": law, "grow": law, "narrow": law}
    expected["squeeze"] = 1
    for name, share in expected.items():
        assert found[name].macs_after == share * found[name].macs_before, name
    assert found["stem.0"].macs_before == 16 * 16 * 16 * 3 * 9
    assert found["depthwise"].macs_before == 32 * 16 * 16 * 9


def test_the_table_names_every_layer() -> None:
    converted = octavize(Everything(), 0.5, torch.randn(2, 3, 32, 32), min_size=4)
    before, after = converted.report.macs
    lines = str(converted.report).splitlines()
    assert lines[0].split("  ")[0] == "layer" and lines[0].endswith("multiply-adds before  after")
    assert lines[3].split() == ["depthwise", "16", "x", "16", "0.5", "0.5", "73,728", "46,080"]
    assert lines[11].split() == ["total", f"{before:,}", f"{after:,}", f"{after / before:.1%}"]
    assert lines[12].startswith("split: add: one operand has one frequency, the other has two (")
    assert "test_convert.py" in lines[12] and lines[12].endswith(": x = x + self.same(x)  # one plain, one of two)")
    assert lines[13].startswith("merge: view: it cannot carry two frequencies (")


# --- which layers ---


def test_small_maps_stay_vanilla_and_the_last_convolution_merges() -> None:
    network, x = Everything(), torch.randn(1, 3, 64, 64)  # maps of 32, 16 and 8; the last convolution feeds the head
    octave = [
        [name for name, row in rows(network, 0.5, x, min_size=size).items() if row.alpha_out] for size in (17, 9, 8)
    ]
    # A map that only a strided layer reads is the next stage's: what is joined for the pool, and shuffled.
    at_32, at_16, at_8 = ["same.0", "depthwise", "dilated"], ["grow", "narrow"], ["shuffled"]
    assert octave == [at_32, at_32[:3] + at_16, at_32[:3] + at_16 + at_8]


def test_alpha_by_stage_and_by_layer() -> None:
    network, x = Everything(), torch.randn(1, 3, 64, 64)
    converted = octavize(network, [0.25, 0.5, 0.75], x)
    assert converted.report.stages == ((32, 32), (16, 16), (8, 8))
    found = {row.name: row.alpha_out for row in converted.report.rows}
    assert (found["dilated"], found["narrow"], found["shuffled"], found["strided"]) == (0.25, 0.5, 0.75, 0.75)
    asked: list[Convolution] = []
    only = rows(network, lambda c: asked.append(c) or (0.5 if c.name == "dilated" else 0.0), x)
    assert [name for name, row in only.items() if row.alpha_out] == ["dilated"]
    assert asked[1] == Convolution("dilated", 32, 16, (3, 3), (32, 32))
    assert [c.name for c in asked] == ["same.0", "dilated", "grow", "narrow", "shuffled", "strided"]


def test_strides() -> None:
    """Behind the first octave layer they pool, as in the paper, or are the convolutions' own, as asked."""

    def conv(channels: int, stride: int) -> nn.Module:
        return nn.Conv2d(channels, 8, 3, stride, 1)

    network = nn.Sequential(conv(3, 2), conv(8, 2), conv(8, 1), conv(8, 1), conv(8, 2), conv(8, 2), conv(8, 1))
    x = torch.randn(1, 3, 64, 64)
    pooled, own = (octavize(network, [0.5, 0, 0], x, pool_stride=pool) for pool in (True, False))
    assert [row.alpha_out for row in pooled.report.rows] == [0, 0.5, 0.5, 0, 0, 0, 0]
    assert [row.strides_by_pooling for row in pooled.report.rows] == [False, True, False, False, True, True, False]
    assert not any(row.strides_by_pooling for row in own.report.rows)
    assert type(own.get_submodule("4")) is nn.Conv2d and type(pooled.get_submodule("4")) is OctConv2d
    by_hand = F.conv2d(F.avg_pool2d(x := torch.randn(1, 8, 16, 16), 2), network[4].weight, network[4].bias, padding=1)
    torch.testing.assert_close(pooled.get_submodule("4")(x), by_hand)


@pytest.mark.parametrize(("groups", "alpha", "octave"), [(4, 0.5, True), (4, 0.25, False)])
def test_groups(groups: int, alpha: float, octave: bool) -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.Conv2d(8, 8, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    converted = octavize(network, alpha, torch.randn(1, 3, 16, 16))
    assert isinstance(converted.get_submodule("2"), OctConv2d) == octave
    reasons = [note.why for note in converted.report.notes]
    assert bool(reasons) != octave
    if not octave:
        assert "4 groups do not divide the split of in 6 + 2 and out 6 + 2 channels" in reasons[0]


def test_a_layer_called_twice_stays_vanilla() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.again, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.again(self.again(self.second(self.first(x)))))

    converted = octavize(Twice(), 0.5, torch.randn(1, 3, 16, 16))
    assert type(converted.again) is nn.Conv2d
    assert {(note.what, note.name, note.why) for note in converted.report.notes} == {
        (what, "again", "it is called 2 times") for what in ("vanilla", "merge")
    }


def test_an_activation_in_place_may_follow_a_convolution() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(True), nn.Conv2d(8, 8, 1), nn.ReLU(True), nn.Conv2d(8, 2, 1)
    )
    for alpha in (0.5, 1.0):
        converted = octavize(network, alpha, torch.randn(1, 3, 16, 16))
        converted(torch.randn(2, 3, 16, 16)).sum().backward()


def test_lists_of_tensors_are_an_input() -> None:
    class Pathways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slow, self.fast, self.both = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(12, 8, 1)
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x: list[Tensor]) -> Tensor:
            assert isinstance(x, list)
            return self.last(self.both(torch.cat([self.slow(x[0]), self.fast(x[1])], 1)))

    x = [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)]
    network = Pathways()
    assert torch.equal(octavize(network, 0.0, x)(x), network(x))
    assert octavize(network, 0.5, x)(x).shape == (2, 2, 16, 16)


class DropPath(nn.Module):
    """timm's and torchvision's, by name: keeps or drops samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full((x.shape[0], *(1,) * (x.dim() - 1)), 0.5)) if self.training else x


def test_stochastic_depth_drops_both_frequencies_of_a_sample() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), DropPath(), nn.Conv2d(4, 2, 1, bias=False)
    )
    converted = octavize(network, lambda c: 0.5, torch.randn(1, 3, 8, 8))
    out = converted(torch.randn(64, 3, 8, 8))
    dropped = (out == 0).flatten(1).all(1)
    assert 10 < dropped.sum() < 54
    assert (out[~dropped] != 0).all()
    assert (converted.eval()(torch.randn(64, 3, 8, 8)) != 0).all()


def test_norms_become_ours() -> None:
    converted = octavize(Everything(), 0.5, torch.randn(1, 3, 32, 32), min_size=4)
    norms = [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 and all(type(m) is OctBatchNorm2d for m in norms)


def test_its_activations_cannot_be_checkpointed() -> None:
    network = create(NETWORKS["resnet_tiny"](10))
    checkpoint_activations(network)
    with pytest.raises(TypeError, match="no Blocks"):
        checkpoint_activations(octavize(network, 0.5, torch.randn(1, 3, 64, 64)))


# --- what is asked for wrongly, and what stays ---


def test_kept_modules_stay() -> None:
    network, x = Everything(), torch.randn(1, 3, 32, 32)
    converted = octavize(network, 0.5, x, min_size=4, keep=["dil*", "same"])
    assert type(converted.dilated) is nn.Conv2d and type(converted.same[1]) is nn.BatchNorm2d
    assert "dilated" not in {row.name for row in converted.report.rows if row.alpha_in or row.alpha_out}
    assert converted(x).shape == (1, 5)


WRONG = [
    ({"keep": ["dilate"]}, "keep names 'dilate', which the network has not; did you mean dilated"),
    ({"alpha": 1.5}, "alpha is 1.5; it is the share of low-frequency channels, from 0 to 1"),
    ({"alpha": lambda c: -1.0}, "alpha for same.0 is -1.0"),
    ({"alpha": [0.5]}, "1 alphas for 3 stages (16 x 16, 8 x 8, 4 x 4); give one per stage"),
    ({"pool": (2, 2, 2)}, "pool is (2, 2, 2); it gives 1 or 2 for each of 2 dimensions"),
    ({"example_input": torch.zeros(3, 8)}, "example_input holds no [N, C, H, W] or [N, C, T, H, W]"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[next(iter(w)) + str(i) for i, (w, _) in enumerate(WRONG)])
def test_wrong_arguments_are_named(wrong: dict, message: str) -> None:
    arguments = {"alpha": 0.5, "example_input": torch.randn(1, 3, 32, 32), **wrong}
    with pytest.raises(ValueError) as error:
        octavize(Everything(), **arguments)
    assert message in str(error.value)


def test_math_of_the_example() -> None:
    """The multiply-adds of one sample, whatever the example's batch."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1))
    for batch in (1, 3):
        assert octavize(network, 0.5, torch.randn(batch, 3, 16, 16)).report.macs[0] == math.prod((16, 16, 12 + 144 + 8))


def test_where_nothing_converts_is_an_error() -> None:
    with pytest.raises(ConversionError, match="no convolution of this network can carry two frequencies") as error:
        octavize(Everything(), 0.5, torch.randn(1, 3, 16, 16))
    assert "of size 8 x 8, 4 x 4, 2 x 2, min_size is 10: give a larger example_input" in str(error.value)
    unpadded = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ConversionError, match=r"vanilla: 1: OctConv2d: kernel \(3, 3\) with padding \(0, 0\)"):
        octavize(unpadded, 0.5, torch.randn(1, 3, 16, 16))
