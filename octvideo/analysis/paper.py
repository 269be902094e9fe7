"""What the paper and its authors' code give for their networks (Chen et al., ICCV 2019, arXiv 1904.05049)."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """G multiply-adds of one clip and Kinetics top-1 in percent, as printed."""

    gmacs: float
    top1: float


# Table 8, by the configuration that reproduces the row: folder/file under configs/.
PRINTED = {
    "kinetics400/i3d_r50_8x8": Row(28.1, 72.6),
    "kinetics400/oct_i3d_r50_8x8_a0.1": Row(25.6, 73.6),
    "kinetics400/oct_i3d_r50_8x8_a0.2": Row(22.1, 73.1),
    "kinetics400/oct_i3d_r50_8x8_a0.5": Row(15.3, 72.1),
    "kinetics400/c2d_r50_8x8_in1k": Row(19.3, 71.9),
    "kinetics400/oct_c2d_r50_8x8_a0.1_in1k": Row(17.4, 73.8),
    "kinetics400/i3d_r50_8x8_in1k": Row(28.1, 73.3),
    "kinetics400/oct_i3d_r50_8x8_a0.1_in1k": Row(25.6, 74.6),
    "kinetics400/i3d_nl_r50_8x8_in1k": Row(33.3, 74.7),
    "kinetics400/oct_i3d_nl_r50_8x8_a0.1_in1k": Row(28.9, 75.7),
    "kinetics400/slowfast_r50_4x16": Row(27.6, 75.6),
    "kinetics400/oct_slowfast_r50_4x16_a0.1": Row(24.5, 76.2),
    "kinetics400/oct_slowfast_r50_4x16_a0.2": Row(22.9, 75.8),
    "kinetics600/i3d_r50_8x8_in1k": Row(28.1, 74.3),
    "kinetics600/oct_i3d_r50_8x8_a0.1_in1k": Row(25.6, 76.0),
}


def allowed_difference(name: str) -> float:
    """G multiply-adds that a count may differ from the printed one: no single octave SlowFast design gives both rows."""
    return 0.3 if "oct_slowfast" in name else 0.1


# Table 2, by alpha: ms of ResNet-50 on one core of a Skylake processor, compiled by TVM.
TABLE_2 = {0.0: 115, 0.125: 116, 0.25: 99, 0.5: 74, 0.75: 61}


class ImageRow(NamedTuple):
    """M parameters and M multiply-adds (convolution + FC, 224 x 224) counted on the authors' code; ImageNet top-1 and
    top-5 in percent of their weights, where they are printed."""

    params: float
    mmacs: float
    top1: float | None
    top5: float | None


# By the file under configs/imagenet/.
IMAGES = {
    "resnet26": ImageRow(15.9913, 2342.26, 73.2, 91.3),
    "oct_resnet26_a0.125": ImageRow(15.9913, 2086.96, 75.8, 92.6),
    "oct_resnet26_a0.25": ImageRow(15.9913, 1858.16, 76.1, 92.6),
    "oct_resnet26_a0.5": ImageRow(15.9913, 1480.03, 75.5, 92.5),
    "oct_resnet26_a0.75": ImageRow(15.9913, 1207.88, 74.6, 92.1),
    "resnet50": ImageRow(25.5532, 4089.18, 77.0, 93.4),
    "oct_resnet50_a0.125": ImageRow(25.5532, 3565.2, 78.2, 93.9),
    "oct_resnet50_a0.25": ImageRow(25.5532, 3103.53, 78.0, 93.8),
    "oct_resnet50_a0.5": ImageRow(25.5532, 2367.14, 77.4, 93.6),
    "oct_resnet50_a0.75": ImageRow(25.5532, 1880.04, 76.7, 93.0),
    "resnet101": ImageRow(44.5453, 7801.41, 78.5, 94.1),
    "oct_resnet101_a0.125": ImageRow(44.5453, 6624.88, 79.2, 94.4),
    "oct_resnet101_a0.25": ImageRow(44.5453, 5597.68, 79.2, 94.4),
    "oct_resnet101_a0.5": ImageRow(44.5453, 3991.24, 78.7, 94.1),
    "resnet200": ImageRow(64.67, 15007.48, 79.6, 94.7),
    "oct_resnet200_a0.125": ImageRow(64.67, 12564.26, 80.0, 94.9),
    "oct_resnet200_a0.25": ImageRow(64.67, 10439.26, 79.8, 94.8),
    "oct_resnet200_a0.5": ImageRow(64.67, 7143.9, 79.5, 94.7),
    "resnext50_32x4d": ImageRow(25.0251, 4230.48, 78.4, 94.0),
    "oct_resnext50_32x4d_a0.25": ImageRow(25.0251, 3170.99, 78.8, 94.2),
    "oct_resnext50_32x4d_a0.5": ImageRow(25.0251, 2386.51, 78.4, 94.0),
    "oct_resnext50_32x4d_a0.75": ImageRow(25.0251, 1877.05, 77.5, 93.6),
    "resnext101_32x4d": ImageRow(44.1739, 7970.0, 79.4, 94.6),
    "oct_resnext101_32x4d_a0.25": ImageRow(44.1739, 5683.48, 79.6, 94.5),
    "oct_resnext101_32x4d_a0.5": ImageRow(44.1739, 4022.55, 78.9, 94.4),
    "se_resnet50": ImageRow(28.0842, 4091.7, 77.6, 93.6),
    "oct_se_resnet50_a0.125": ImageRow(28.0842, 3567.71, 78.7, 94.1),
    "oct_se_resnet50_a0.25": ImageRow(28.0842, 3106.04, 78.4, 94.0),
    "oct_se_resnet50_a0.5": ImageRow(28.0842, 2369.66, 77.9, 93.8),
    "oct_se_resnet50_a0.75": ImageRow(28.0842, 1882.55, 77.4, 93.5),
    "densenet121": ImageRow(7.9789, 2834.16, 75.4, 92.7),
    "oct_densenet121_a0.125": ImageRow(7.9789, 2398.42, 76.1, 93.0),
    "oct_densenet121_a0.25": ImageRow(7.9789, 2017.25, 75.9, 93.1),
    "oct_mobilenet_v1_0.75_a0.375": ImageRow(2.5856, 211.38, 70.5, None),
    "oct_mobilenet_v1_1.0_a0.5": ImageRow(4.232, 318.17, 72.5, None),
    "oct_mobilenet_v2_1.0_a0.375": ImageRow(3.506, 254.03, 72.0, None),
    "oct_mobilenet_v2_1.125_a0.5": ImageRow(4.243, 292.76, 73.0, None),
    "oct_resnet152_v1f_a0.125": ImageRow(60.2222, 10819.3, 81.4, None),
    "oct_se_resnet152_v1e_a0.125": ImageRow(66.841, 10838.8, 81.6, None),
    "oct_resnet50_v1b_a0.5": ImageRow(25.557, 2367.14, None, None),
}
