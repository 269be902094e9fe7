import pytest
import torch

from octvideo.data.sampling import POLICIES, SHORT, contained, eval_indices, seeded_generator, train_indices

EIGHT_BY_EIGHT = {"num_frames": 8, "sampling_rate": 8, "target_fps": 30}


def test_strided_test_clips_of_300_frames() -> None:
    clips = eval_indices(300, 30.0, policy="strided", num_clips=10, **EIGHT_BY_EIGHT)
    assert (clips.dtype, clips.shape) == (torch.int64, (10, 8))
    assert clips[0].tolist() == [0, 8, 16, 24, 32, 40, 48, 56]
    assert clips[:, 0].tolist() == [0, 27, 54, 81, 108, 135, 162, 189, 216, 243]
    assert clips[9, -1] == 299  # the end is seen


def test_pyslowfast_test_clips_of_300_frames() -> None:
    clips = eval_indices(300, 30.0, policy="pyslowfast", num_clips=10, **EIGHT_BY_EIGHT)
    assert clips[0].tolist() == [0, 9, 18, 27, 36, 45, 54, 63]
    assert clips[:, 0].tolist() == [0, 23, 47, 70, 94, 118, 141, 165, 188, 212]  # int(236 * i / 10)
    assert clips[9].tolist() == [212, 221, 230, 239, 248, 257, 266, 275]
    wide = eval_indices(300, 30.0, policy="pyslowfast", num_clips=1, num_frames=32, sampling_rate=2, target_fps=30)
    assert wide[0, :8].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert wide[0, -3:].tolist() == [58, 60, 63]  # 63 / 31 apart


def test_a_single_clip() -> None:
    strided = eval_indices(300, 30.0, policy="strided", num_clips=1, **EIGHT_BY_EIGHT)
    assert strided.tolist() == [[121, 129, 137, 145, 153, 161, 169, 177]]  # 121 frames before, 122 behind
    pyslowfast = eval_indices(300, 30.0, policy="pyslowfast", num_clips=1, **EIGHT_BY_EIGHT)
    assert pyslowfast[0, 0] == 0


@pytest.mark.parametrize(
    ("fps", "target_fps", "step"),
    [(30, 30, 8), (29.97, 30, 8), (25, 30, 7), (60, 30, 16), (15, 30, 4), (1, 30, 1), (50, 0, 8), (25, 25, 8)],
)
def test_stride_follows_the_frame_rate(fps: float, target_fps: float, step: int) -> None:
    clips = eval_indices(900, fps, num_frames=4, sampling_rate=8, target_fps=target_fps, policy="strided", num_clips=2)
    assert clips[0].tolist() == [0, step, 2 * step, 3 * step]
    assert clips[1, -1] == 899


def test_pyslowfast_at_another_frame_rate() -> None:
    """8 * 8 / 30 * 25 = 53.3 frames, both ends taken: 52.3 / 7 apart."""
    clips = eval_indices(250, 25.0, policy="pyslowfast", num_clips=2, **EIGHT_BY_EIGHT)
    assert clips[0].tolist() == [0, 7, 14, 22, 29, 37, 44, 52]
    assert clips[1, 0] == 98  # (250 - 53.3) / 2


@pytest.mark.parametrize(
    ("policy", "short", "expected"),
    [
        ("strided", None, [0, 2, 0, 2]),
        ("strided", "loop", [0, 2, 0, 2]),
        ("strided", "clamp", [0, 2, 3, 3]),
        ("pyslowfast", None, [0, 2, 3, 3]),
        ("pyslowfast", "loop", [0, 2, 0, 3]),
    ],
)
def test_clip_longer_than_the_video(policy: str, short: str | None, expected: list[int]) -> None:
    times = {"num_frames": 4, "sampling_rate": 2, "target_fps": 0}
    assert eval_indices(4, 30.0, policy=policy, num_clips=3, short=short, **times).tolist() == [expected] * 3
    generator = seeded_generator(0)
    assert train_indices(4, 30.0, policy=policy, generator=generator, short=short, **times).tolist() == expected
    one = eval_indices(1, 30.0, policy=policy, num_clips=2, short=short, **times)
    assert one.tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("short", SHORT)
def test_every_index_is_in_the_video(policy: str, short: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        num_video_frames, num_frames, rate, clips = (
            int(torch.randint(1, high, (), generator=generator)) for high in (90, 12, 9, 6)
        )
        fps = float(torch.rand((), generator=generator) * 59 + 1)
        times = {"num_frames": num_frames, "sampling_rate": rate, "target_fps": 30, "policy": policy, "short": short}
        tested = eval_indices(num_video_frames, fps, num_clips=clips, **times)
        trained = train_indices(num_video_frames, fps, generator=generator, **times)
        assert tested.shape == (clips, num_frames)
        assert trained.shape == (num_frames,)
        for indices in (tested, trained):
            assert 0 <= int(indices.min()) <= int(indices.max()) < num_video_frames


@pytest.mark.parametrize(("policy", "last"), [("strided", 3), ("pyslowfast", 1)])
def test_training_clips_start_anywhere_and_equally_often(policy: str, last: int) -> None:
    """10 frames, 3 at stride 3: strided clips are 7 long (starts 0..3), PySlowFast's 9 (starts in 0..1)."""
    generator = torch.Generator().manual_seed(0)
    times = {"num_frames": 3, "sampling_rate": 3, "target_fps": 0, "policy": policy}
    clips = torch.stack([train_indices(10, 30.0, generator=generator, **times) for _ in range(2000)])
    starts = torch.bincount(clips[:, 0])
    if policy == "strided":
        assert len(starts) == last + 1
        assert starts.min() > 440  # of 500 expected
        assert (clips.diff(dim=1) == 3).all()
    else:
        assert starts.tolist() == [2000]  # a whole number only at the very end of the range
        assert set(clips[:, 1].tolist()) == {4}


def test_random_starts_repeat_vary_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    times = {"policy": "strided", **EIGHT_BY_EIGHT}
    draws = [train_indices(300, 30.0, generator=seeded_generator("clip", 0, e, 5), **times) for e in range(20)]
    again = train_indices(300, 30.0, generator=seeded_generator("clip", 0, 3, 5), **times)
    assert torch.equal(again, draws[3])
    assert len({int(draw[0]) for draw in draws}) > 15
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_are_hashed_and_the_same_everywhere() -> None:
    def first(*key: int | str) -> int:
        return int(torch.randint(2**31, (), generator=seeded_generator(*key)))

    keys = [(seed, epoch, index) for seed in range(4) for epoch in range(4) for index in range(40)]
    assert len({first("clip", *key) for key in keys}) == len(keys)
    assert first(1, 23) != first(12, 3)
    assert first("order", 0, 1) != first("clip", 0, 1)
    # The same in every process and on every machine: no salted hash().
    assert seeded_generator("clip", 7, 1, 2).initial_seed() == 17121065382355500613


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("saved", [1, 2, 4, 9, 10, 12])
def test_fewer_clips_are_contained_exactly_where_contained_says_so(policy: str, saved: int) -> None:
    lengths = [(1, 30.0), (30, 25.0), *((frames, fps) for frames in range(64, 330, 7) for fps in (30.0, 29.97, 23.976))]
    every = [eval_indices(*length, policy=policy, num_clips=saved, **EIGHT_BY_EIGHT) for length in lengths]
    for num_clips in range(1, saved + 1):
        few = [eval_indices(*length, policy=policy, num_clips=num_clips, **EIGHT_BY_EIGHT) for length in lengths]
        chosen = contained(num_clips, saved, policy)
        if chosen is not None:
            assert all(torch.equal(a, b[chosen]) for a, b in zip(few, every, strict=True))
        else:
            rows = [[set(map(tuple, clips.tolist())) for clips in sets] for sets in (few, every)]
            assert not all(a <= b for a, b in zip(*rows, strict=True))


def test_which_clip_counts_are_contained() -> None:
    assert contained(4, 10, "strided") == [0, 3, 6, 9]
    assert [n for n in range(1, 11) if contained(n, 10, "strided")] == [2, 4, 10]
    assert [n for n in range(1, 10) if contained(n, 9, "strided")] == [1, 2, 3, 5, 9]
    assert [n for n in range(1, 11) if contained(n, 10, "pyslowfast")] == [1, 2, 5, 10]
    assert contained(5, 10, "pyslowfast") == [0, 2, 4, 6, 8]
