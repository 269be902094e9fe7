"""What fits, what is missing, and the table of it."""

import pytest
import torch

from octvideo.weights.coverage import SHOWN, compare

OWN = {
    "stem.conv.weight": (4, 3, 1, 1),
    "stem.bn.weight": (4,),
    "stem.bn.num_batches_tracked": (),
    "head.fc.weight": (2, 4),
}


def test_everything_fits() -> None:
    found = {name: torch.ones(shape) for name, shape in OWN.items()}
    weights, coverage = compare(found, OWN, [])
    assert coverage.complete
    assert coverage.matched == ("stem.conv.weight", "stem.bn.weight", "head.fc.weight")
    assert (coverage.parameters, coverage.own_parameters) == (24, 24)
    assert weights.keys() == OWN.keys()
    assert coverage.table() == "24 of 24 parameters matched, in 3 of 3 entries"


def test_what_does_not_fit() -> None:
    found = {"stem.conv.weight": torch.ones(4, 3, 7, 7), "head.fc.weight": torch.ones(2, 4)}
    weights, coverage = compare(found, OWN, ["extra", "extra.num_batches_tracked"])
    assert not coverage.complete
    assert weights.keys() == {"head.fc.weight"}
    assert coverage.missing == ("stem.bn.weight",)  # its counter is nobody's loss
    assert coverage.unexpected == ("extra",)
    assert coverage.mismatched == (("stem.conv.weight", (4, 3, 7, 7), (4, 3, 1, 1)),)
    assert (coverage.parameters, coverage.own_parameters) == (8, 24)
    assert coverage.table().splitlines() == [
        "8 of 24 parameters matched, in 1 of 3 entries",
        "  missing     stem.bn.weight",
        "  unexpected  extra",
        "  shape       stem.conv.weight: (4, 3, 7, 7) in the file, (4, 3, 1, 1) in ours",
    ]


def test_long_lists_are_cut() -> None:
    lines = compare({}, {f"conv{i}.weight": (1,) for i in range(SHOWN + 3)}, [])[1].table().splitlines()
    assert len(lines) == 1 + SHOWN + 1
    assert lines[-1].strip() == "... and 3 more"


def test_a_1x1_convolution_is_a_linear_layer() -> None:
    weights, coverage = compare(
        {"head.fc.weight": torch.arange(8.0).view(2, 4, 1, 1, 1)}, {"head.fc.weight": (2, 4)}, []
    )
    assert coverage.complete
    assert torch.equal(weights["head.fc.weight"], torch.arange(8.0).view(2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_float32_and_counters_stay(dtype: torch.dtype) -> None:
    own = {"bn.weight": (3,), "bn.num_batches_tracked": ()}
    weights, _ = compare({"bn.weight": torch.ones(3, dtype=dtype), "bn.num_batches_tracked": torch.tensor(7)}, own, [])
    assert weights["bn.weight"].dtype == torch.float32
    assert weights["bn.num_batches_tracked"].dtype == torch.int64
