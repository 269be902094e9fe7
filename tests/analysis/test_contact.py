import numpy as np
import torch

from octvideo.analysis.contact import LINE, MARGIN, contact_sheet


def test_every_frame_stands_in_its_place_unchanged() -> None:
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (3, 4, 20, 30), dtype=torch.uint8, generator=generator)
    image = torch.randint(0, 256, (3, 24, 16), dtype=torch.uint8, generator=generator)
    sheet = np.asarray(contact_sheet([("clip", clip), ("image", image)]))
    assert sheet.shape == (MARGIN + 20 + LINE + MARGIN + 24 + LINE + MARGIN, 4 * (30 + MARGIN) + MARGIN, 3)
    for t in range(4):
        left = MARGIN + t * (30 + MARGIN)
        place = sheet[MARGIN + LINE : MARGIN + LINE + 20, left : left + 30]
        np.testing.assert_array_equal(place, clip[:, t].permute(1, 2, 0).numpy())
    top = MARGIN + 20 + LINE + MARGIN + LINE
    np.testing.assert_array_equal(sheet[top : top + 24, MARGIN : MARGIN + 16], image.permute(1, 2, 0).numpy())
    assert (sheet[-1] == 255).all()


def test_a_long_title_is_not_cut_off() -> None:
    narrow = contact_sheet([("x", torch.zeros(3, 8, 8, dtype=torch.uint8))])
    wide = contact_sheet([("a path of some length / and a name.mp4", torch.zeros(3, 8, 8, dtype=torch.uint8))])
    assert narrow.width < 30 < 150 < wide.width
    assert (np.asarray(wide)[:, -MARGIN:] == 255).all() and (np.asarray(wide)[: LINE + MARGIN, -20:] < 128).any()
