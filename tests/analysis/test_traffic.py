"""Kernels of one block, against counts by hand. float32, so 4 bytes a value."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octvideo.analysis.traffic import Recorder, fuse, separate
from octvideo.octave import Octave, OctConv2d


def record(module: nn.Module, *inputs: Tensor, align: int = 1) -> Recorder:
    """Record a forward and a backward pass; keep the outputs, the gradients and the module's buffers."""
    recorder = Recorder(align)
    recorder.follow(module.to("meta"))
    recorder.keep(module.buffers())
    leaves = [x.requires_grad_() for x in inputs]
    x = Octave(*leaves) if len(leaves) == 2 else leaves[0]
    with recorder:
        y = module(x)
        outputs = list(y) if isinstance(y, Octave) else [y]
        recorder.phase = "backward"
        torch.autograd.backward(outputs, [torch.empty_like(one) for one in outputs])
    recorder.keep(outputs)
    recorder.keep([one.grad for one in (*leaves, *module.parameters()) if one.grad is not None])
    return recorder


def values(kernels: list) -> list[tuple[str, str, str, float]]:
    return [(kernel.name.replace("aten.", ""), kernel.layer, kernel.phase, kernel.nbytes / 4) for kernel in kernels]


# Convolution 8 -> 16 of 3 x 3, batch norm, ReLU on 2 maps of 4 x 4.
X, Y, W, C = 2 * 8 * 16, 2 * 16 * 16, 16 * 8 * 9, 16


@pytest.fixture
def block() -> Recorder:
    layers = (nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    return record(nn.Sequential(*layers), torch.empty(2, 8, 4, 4, device="meta"))


def test_each_operator_reads_its_inputs_and_writes_its_outputs(block: Recorder) -> None:
    assert values(separate(block.operators)) == [
        ("convolution", "0", "forward", X + W + Y),
        ("add_", "1", "forward", 4),  # the int64 count of batches, read and written
        ("native_batch_norm (statistics)", "1", "forward", Y + 2 * C + 2 * C),  # of the batch, and running
        ("native_batch_norm", "1", "forward", Y + 2 * C + 2 * C + Y),
        ("relu_", "2", "forward", Y + Y),
        ("threshold_backward", "2", "backward", Y + Y + Y),
        ("native_batch_norm_backward (sums)", "1", "backward", Y + Y + 2 * C + 2 * C),
        ("native_batch_norm_backward", "1", "backward", Y + Y + 5 * C + Y),
        ("convolution_backward (input)", "0", "backward", Y + W + X),
        ("convolution_backward (weight)", "0", "backward", Y + X + W),
    ]
    macs = 2 * 16 * 16 * 8 * 9
    assert [one.flops for one in block.operators if one.flops] == [2 * macs] * 3


def test_fused_operators_move_what_crosses_kernels(block: Recorder) -> None:
    assert values(fuse(block.operators, block.kept)) == [
        ("convolution + native_batch_norm (statistics)", "0", "forward", X + W + Y + 4 * C),
        ("add_", "1", "forward", 4),
        ("native_batch_norm + relu_", "1", "forward", Y + 4 * C + Y),
        # reads the given gradient, the ReLU's output and the convolution's; writes the masked gradient and the sums
        ("threshold_backward + native_batch_norm_backward (sums)", "2", "backward", 3 * Y + 2 * C + Y + 2 * C),
        ("native_batch_norm_backward", "1", "backward", Y + Y + 5 * C + Y),
        ("convolution_backward (input)", "0", "backward", Y + W + X),
        ("convolution_backward (weight)", "0", "backward", Y + X + W),
    ]


def test_without_statistics_to_wait_for_a_block_is_one_kernel() -> None:
    block = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()).eval().to("meta")
    recorder = Recorder()
    with recorder, torch.no_grad():
        recorder.keep([block(torch.empty(2, 8, 4, 4, device="meta"))])
    (kernel,) = fuse(recorder.operators, recorder.kept)
    assert kernel.nbytes == 4 * (X + W + 4 * C + Y) and kernel.flops == 4 * 16 * 16 * 8 * 9


# Octave convolution of 3 x 3 from 6 high and 2 low channels to as many, on maps of 4 x 4 and 2 x 2.
HIGH, LOW, POOLED = 6 * 16, 2 * 4, 6 * 4
HH, HL, FROM_LOW = 6 * 6 * 9, 2 * 6 * 9, 8 * 2 * 9
UP = 6 * 4  # low's part in high, before it is upsampled


@pytest.fixture
def octave() -> Recorder:
    layer = OctConv2d(8, 8, 3, padding=1, bias=False, alpha_in=0.25, alpha_out=0.25)
    return record(layer, torch.empty(1, 6, 4, 4, device="meta"), torch.empty(1, 2, 2, 2, device="meta"))


def test_an_octave_convolution_operator_by_operator(octave: Recorder) -> None:
    forward = [kernel for kernel in separate(octave.operators) if kernel.phase == "forward"]
    assert values(forward) == [
        ("convolution", "", "forward", HIGH + HH + HIGH),
        ("avg_pool2d", "", "forward", HIGH + POOLED),
        ("convolution", "", "forward", POOLED + HL + LOW),
        ("convolution", "", "forward", LOW + FROM_LOW + UP + LOW),  # both outputs at once
        ("add_", "", "forward", HIGH + UP + HIGH),  # each value of UP is added to its window
        ("add_", "", "forward", LOW + LOW + LOW),
    ]


def test_an_octave_convolution_fused(octave: Recorder) -> None:
    forward = [kernel for kernel in fuse(octave.operators, octave.kept) if kernel.phase == "forward"]
    assert values(forward) == [
        ("convolution + add_", "", "forward", HIGH + HH + UP + HIGH),
        ("avg_pool2d", "", "forward", HIGH + POOLED),
        ("convolution", "", "forward", POOLED + HL + LOW),
        # reads the other path's low output too; writes both outputs of the convolution, of which the first kernel reads UP
        ("convolution + add_", "", "forward", LOW + FROM_LOW + LOW + (UP + LOW) + LOW),
    ]


def test_an_octave_convolution_as_one_kernel(octave: Recorder) -> None:
    forward, backward = fuse(octave.operators, octave.kept, joint=[""])
    weight = HH + HL + FROM_LOW
    assert weight == 8 * 8 * 9
    assert forward.nbytes / 4 == 2 * (HIGH + LOW) + weight  # inputs, outputs, weight
    # gradients of the outputs, inputs, weight; then the three gradients
    assert backward.nbytes / 4 == 2 * (HIGH + LOW) + weight + (HIGH + LOW) + weight
    assert backward.flops == 2 * forward.flops == 4 * (16 * HH + 4 * (HL + FROM_LOW))


def convolve(x: Tensor, c_out: int) -> Tensor:
    """A 1x1 convolution."""
    return F.conv2d(x, torch.empty(c_out, x.shape[1], 1, 1, device="meta"))


def test_an_upsampled_map_is_read_where_it_is_small() -> None:
    recorder = Recorder()
    with recorder, torch.no_grad():
        recorder.keep([convolve(F.interpolate(torch.empty(1, 4, 2, 2, device="meta"), scale_factor=2.0), 8)])
    (kernel,) = fuse(recorder.operators, recorder.kept)
    assert kernel.nbytes / 4 == 4 * 4 + 4 * 8 + 8 * 16
    assert [one.nbytes / 4 for one in separate(recorder.operators)] == [16 + 64, 64 + 32 + 128]


def test_an_operator_does_not_join_a_kernel_that_its_inputs_need() -> None:
    """[x, conv(x)] joins the convolution, although the kernel of x made its largest input."""
    recorder = Recorder()
    with recorder, torch.no_grad():
        x = convolve(torch.empty(1, 8, 4, 4, device="meta"), 8)
        recorder.keep([torch.cat([x, convolve(x, 4)], dim=1)])
    assert values(fuse(recorder.operators, recorder.kept)) == [
        ("convolution", "", "forward", 128 + 64 + 128),
        ("convolution + cat", "", "forward", 128 + 32 + 192),
    ]


def test_what_a_kernel_needs_by_a_later_operator_counts_too() -> None:
    """The second kernel needs the first, and since the first [a, c] the third: [c, b] cannot join the third."""
    recorder = Recorder()
    with recorder, torch.no_grad():
        x = torch.empty(1, 8, 4, 4, device="meta")
        a = convolve(x, 32)
        b = convolve(a, 8)
        c = convolve(x, 16)
        recorder.keep([torch.cat([a, c], dim=1), torch.cat([c, b], dim=1)])
    names = [kernel.name for kernel in fuse(recorder.operators, recorder.kept)]
    assert names == ["convolution + cat", "convolution + cat", "convolution"]


def test_an_operator_between_modules_belongs_to_their_parent() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sigmoid, self.relu = nn.Sigmoid(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(x * self.sigmoid(x))

    recorder = record(Gate(), torch.empty(10, device="meta"))
    layers = [(one.name.removeprefix("aten."), one.layer) for one in recorder.operators]
    assert layers == [
        ("sigmoid", "sigmoid"),
        ("mul", ""),
        ("relu", "relu"),
        ("threshold_backward", "relu"),
        ("mul", ""),
        ("mul", ""),
        ("sigmoid_backward", "sigmoid"),
        ("add", "sigmoid"),  # the sum of x's two gradients, in autograd's engine
    ]


def test_an_expanded_tensor_is_read_where_it_is_small() -> None:
    recorder = Recorder()
    with recorder:
        torch.empty(1, 8, device="meta").expand(4, 8) + torch.empty(4, 8, device="meta")
    assert [kernel.nbytes / 4 for kernel in separate(recorder.operators)] == [8 + 32 + 32]


def test_an_upsampled_map_that_is_changed_in_place_is_a_new_map() -> None:
    recorder = Recorder()
    with recorder, torch.no_grad():
        x = convolve(torch.empty(1, 8, 2, 2, device="meta"), 4)
        recorder.keep([convolve(F.interpolate(x, scale_factor=2.0).mul_(2.0), 8)])
    assert values(fuse(recorder.operators, recorder.kept)) == [
        ("convolution + mul_", "", "forward", 32 + 32 + 64),
        ("convolution", "", "forward", 64 + 32 + 128),
    ]


def test_tensors_that_are_gone_are_not_taken_for_new_ones() -> None:
    recorder = Recorder()
    with recorder:
        for _ in range(10):
            torch.empty(4, device="meta").relu()
    assert len({one.writes[0].storage for one in recorder.operators}) == 10


def test_views_and_allocations_move_nothing() -> None:
    x = torch.empty(2, 6, 4, 4, device="meta")
    recorder = Recorder()
    with recorder:
        x.transpose(0, 1)[1:3].reshape(2, -1).detach()
        torch.empty_like(x)
    # reshape copies here: the channels of two images are not adjacent
    assert values(separate(recorder.operators)) == [("clone", "", "forward", 64 + 64)]


def test_a_tensor_is_overwritten_without_being_read() -> None:
    x = torch.empty(10, device="meta")
    recorder = Recorder()
    with recorder:
        x.copy_(torch.empty(10, device="meta"))
        x.zero_()
        x.add_(1.0)
    assert [kernel.nbytes / 4 for kernel in separate(recorder.operators)] == [20, 10, 20]


@pytest.mark.parametrize("groups,padding", [(1, True), (5, False)])
def test_channels_are_padded(groups: int, padding: bool) -> None:
    layers = (nn.Conv2d(5, 10, 3, padding=1, bias=False, groups=groups) for _ in range(2))
    x = torch.empty(1, 5, 4, 4, device="meta")
    plain, padded = (record(layer, x.clone(), align=align) for layer, align in zip(layers, (1, 8), strict=True))
    kernels = [separate(one.operators) for one in (plain, padded)]
    for before, after in zip(*kernels, strict=True):
        assert after.flops == before.flops * (16 * 8 / 50 if padding else 1)
        # 5 -> 8 channels of the input, 10 -> 16 of the output
        more = 3 * 16 + 6 * 16 + (8 * 16 - 50) * 9 if padding else 0
        assert after.nbytes == before.nbytes + 4 * more
    assert len({kernel.flops for kernel in kernels[0]}) == 1  # a gradient costs what the convolution does


def test_an_unknown_batch_norm_is_an_error() -> None:
    x, c = torch.empty(2, 3, 4, 4, device="meta"), torch.empty(3, device="meta")
    with pytest.raises(NotImplementedError, match="_native_batch_norm_legit"), Recorder():
        torch.ops.aten._native_batch_norm_legit(x, c, c, c, c, True, 0.1, 1e-5)
