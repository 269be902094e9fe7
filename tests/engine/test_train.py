import json
import math
import signal
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from octvideo.data.transforms import normalize
from octvideo.engine.distributed import World
from octvideo.engine.ema import Ema
from octvideo.engine.failures import BudgetError, FailureBudget
from octvideo.engine.log import Log
from octvideo.engine.meter import Meter
from octvideo.engine.nonfinite import NonFinite, NonFiniteError
from octvideo.engine.optim import SGD, sgd
from octvideo.engine.stop import Stopped, StopRequest
from octvideo.engine.train import Precision, Progress, TrainingError, fit, train_step
from octvideo.engine.unread import UnreadSteps
from octvideo.models import NETWORKS, create, with_octave

CPU = torch.device("cpu")


def test_train_step_is_sgd_on_the_mean_cross_entropy() -> None:
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    weight = net.weight.detach().clone().requires_grad_()
    loss = F.cross_entropy(x @ weight.T + net.bias.detach(), y)
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = (x @ weight.T + net.bias).detach()
    got, logits, norm, finite = train_step(net, SGD(net.parameters(), lr=99.0), x, y, lr=0.5, loss=F.cross_entropy)
    assert finite
    torch.testing.assert_close(net.weight, weight - 0.5 * gradient)
    assert got.item() == pytest.approx(loss.item())
    torch.testing.assert_close(logits, expected)
    (bias_gradient,) = torch.autograd.grad(F.cross_entropy(logits.requires_grad_(), y), logits)
    assert norm.item() == pytest.approx(math.hypot(gradient.norm(), bias_gradient.sum(0).norm()), rel=1e-5)


def linear(seed: int = 0) -> tuple[nn.Module, SGD]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    return net, SGD(net.parameters(), lr=0.1, momentum=0.9)


def stepped(precision: Precision, steps: int = 3, scale: float = 1.0) -> tuple[nn.Module, list[float], list[float]]:
    net, sgd = linear()
    draw = torch.Generator().manual_seed(1)
    losses, norms = [], []
    for _ in range(steps):
        x, y = scale * torch.randn(7, 3, 6, 6, generator=draw), torch.randint(5, (7,), generator=draw)
        value, logits, norm, _ = train_step(net, sgd, x, y, 0.1, F.cross_entropy, precision)
        assert logits.shape == (7, 5) and logits.dtype == torch.float32
        losses.append(float(value))
        norms.append(float(norm))
    return net, losses, norms


@pytest.mark.parametrize("accumulate", [2, 3, 7, 20])
def test_accumulated_gradients_are_the_large_batch_s(accumulate: int) -> None:
    """Of parts of unequal size too: 7 clips in 2 or 3 parts."""
    whole, losses, norms = stepped(Precision())
    parts, losses_of_parts, norms_of_parts = stepped(Precision(accumulate=accumulate))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert losses_of_parts == pytest.approx(losses, rel=1e-5) and norms_of_parts == pytest.approx(norms, rel=1e-5)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    net, sgd = linear()
    before = [p.detach().clone() for p in net.parameters()]
    _, _, norm, _ = train_step(
        net, sgd, torch.randn(7, 3, 6, 6), torch.arange(7) % 5, 1.0, F.cross_entropy, Precision(clip_norm=0.01)
    )
    moved = torch.cat([(p - q).flatten() for p, q in zip(net.parameters(), before, strict=True)]).norm()
    assert norm > 0.1 and moved.item() == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_computes_roughly_the_same_and_keeps_the_weights_in_float32() -> None:
    _, losses, _ = stepped(Precision())
    net, rough, _ = stepped(Precision(dtype=torch.bfloat16))
    assert rough == pytest.approx(losses, rel=0.03) and rough != losses
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_float16_with_a_scaler_computes_roughly_the_same() -> None:
    _, losses, norms = stepped(Precision())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    net, rough, rough_norms = stepped(Precision(dtype=torch.float16, scaler=scaler))
    assert rough == pytest.approx(losses, rel=0.01) and rough != losses
    assert rough_norms == pytest.approx(norms, rel=0.01)  # taken back to the loss's own scale before clipping
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert scaler.get_scale() == 512.0  # doubled once in three steps


def test_a_scale_that_overflows_is_halved_and_the_step_skipped() -> None:
    net, sgd = linear()
    before = [p.detach().clone() for p in net.parameters()]
    precision = Precision(dtype=torch.float16, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40))
    x, y = torch.randn(7, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 5
    value, _, norm, finite = train_step(net, sgd, x, y, 0.1, F.cross_entropy, precision)
    assert value.isfinite() and not norm.isfinite() and not finite
    assert precision.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_a_step_whose_gradient_is_not_finite_changes_nothing() -> None:
    net, sgd = linear()
    before = [p.detach().clone() for p in net.parameters()]
    x = torch.full((2, 3, 6, 6), 1e38)
    value, _, norm, _ = train_step(net, sgd, x, torch.tensor([0, 1]), 0.1, F.cross_entropy)
    assert value.isfinite() and norm == math.inf  # the loss alone would not tell
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert all(not state["momentum_buffer"].any() for state in sgd.state.values())


def test_a_batch_that_is_not_finite_leaves_no_trace_in_the_norms() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    sgd = SGD(net.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.full((2, 3, 2, 2), float("nan"))
    assert not train_step(net, sgd, x, torch.tensor([0, 1]), 0.1, F.cross_entropy).finite
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@dataclass
class Failed:
    video: int
    reason: str
    trace: str = "Traceback: why"


@dataclass
class Batch:
    clips: Tensor
    labels: Tensor
    videos: Tensor = field(default_factory=lambda: torch.arange(4))
    errors: list[str] = field(default_factory=list)
    replaced: list[Failed] = field(default_factory=list)


class Batches:
    """The batches of 4 clips that a loader has; remembers where epochs began."""

    global_batch = 4

    def __init__(self, steps: int) -> None:
        self.steps, self.started, self.start_clip = steps, [], 0

    def set_epoch(self, epoch: int, start_clip: int = 0) -> None:
        self.epoch, self.start_clip = epoch, start_clip

    def __len__(self) -> int:
        return self.steps - self.start_clip // self.global_batch


class Loader:
    def __init__(self, *batches: Batch) -> None:
        self.batches, self.batch_sampler = batches, Batches(len(batches))

    def __iter__(self):
        self.batch_sampler.started.append((self.batch_sampler.epoch, self.batch_sampler.start_clip))
        return iter(self.batches[self.batch_sampler.start_clip // 4 :])


def batch(value: float = 1.0) -> Batch:
    return Batch(torch.full((4, 1, 3, 1, 1, 1), value), torch.tensor([0, 1, 0, 1]))


def keep(clips: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
    return clips, labels


def run(
    loader: Loader,
    progress: Progress,
    tmp_path,
    epochs: float = 3,
    mix=keep,
    allowed: int = 0,
    meter: Meter | None = None,
    nonfinite: int = 0,
    after_step=lambda: None,
    after_epoch=lambda values: None,
    log_period: int = 1,
) -> tuple[list[dict], list[float]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    ended, rates = [], []

    def note(values: dict[str, float]) -> None:
        ended.append({"epoch": progress.epoch, "step": progress.step, **values})
        after_epoch(values)

    def lr_at(epoch: float) -> float:
        rates.append(epoch)
        return 0.1

    log = Log(tmp_path, main=True, step=progress.step)
    meter = meter or Meter(CPU, World())
    fit(
        net,
        SGD(net.parameters(), lr=1.0),
        loader,
        progress=progress,
        meter=meter,
        epochs=epochs,
        lr_at=lr_at,
        prepare=lambda clips: clips,
        mix=mix,
        loss=F.cross_entropy,
        device=CPU,
        world=World(),
        precision=Precision(),
        freeze_norm_stats=False,
        failures=FailureBudget(allowed, log, tmp_path / "failed.txt"),
        unread=UnreadSteps(meter, NonFinite(nonfinite, tmp_path, "clips/{}.mp4".format, log)),
        log=log,
        log_period=log_period,
        after_step=after_step,
        after_epoch=note,
    )
    return ended, rates


def test_fit_counts_epochs_and_steps_and_moves_the_rate_every_step(tmp_path) -> None:
    loader = Loader(batch(), batch())
    ended, rates = run(loader, Progress(), tmp_path)
    assert [(e["epoch"], e["step"]) for e in ended] == [(1, 2), (2, 4), (3, 6)]
    assert loader.batch_sampler.started == [(0, 0), (1, 0), (2, 0)]
    assert {0.0, 0.5, 1.0, 1.5, 2.0, 2.5} == set(rates)
    assert ended[0]["top1"] in {0.0, 25.0, 50.0, 75.0, 100.0} and ended[0]["clips_per_s"] > 0


def test_fit_goes_on_where_progress_says(tmp_path) -> None:
    loader = Loader(batch(), batch())
    ended, _ = run(loader, Progress(epoch=2, step=4), tmp_path)
    assert [(e["epoch"], e["step"]) for e in ended] == [(3, 6)]
    assert loader.batch_sampler.started == [(2, 0)]


def test_a_run_may_end_within_an_epoch(tmp_path) -> None:
    loader = Loader(batch(), batch(), batch(), batch())
    ended, rates = run(loader, Progress(), tmp_path, epochs=1.5)
    assert [(e["epoch"], e["step"]) for e in ended] == [(1, 4), (2, 6)]
    assert max(rates) == 1.25  # of the last step; a quarter of an epoch is one step of four
    assert run(loader, Progress(epoch=2, step=6), tmp_path, epochs=1.5) == ([], [])


def test_a_line_of_training_holds_what_it_costs(tmp_path, capsys) -> None:
    run(Loader(batch(), batch(), batch()), Progress(), tmp_path, epochs=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["event"] == "train"]
    assert len(train) == 3
    for line in train:
        assert line["clips_per_s"] == pytest.approx(4 / line["step_s"])
        assert 0.01 < line["memory_gb"] < 100 and 0 <= line["data_wait"] <= 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2  # the line of the epoch follows its last step
    assert said[1].startswith(
        f"step 2, epoch 0.67: loss {train[1]['loss']:.4f}, top-1 {train[1]['top1']:.1f} %, lr 0.1, "
    )


def test_a_clip_that_cannot_be_decoded_stops_the_run_with_its_reason(tmp_path) -> None:
    bad = batch()
    bad.errors.append("train.txt:7: a.mp4: truncated")
    with pytest.raises(TrainingError, match="train.txt:7: a.mp4: truncated"):
        run(Loader(batch(), bad), Progress(), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path) -> None:
    message = r"(?s)step 2 was skipped: loss \[nan\], gradient norm nan.*MAX_NONFINITE allows 0; lower SOLVER.BASE_LR"
    with pytest.raises(NonFiniteError, match=message):
        run(Loader(batch(), batch(float("nan"))), Progress(), tmp_path)
    record = json.loads((tmp_path / "nonfinite_00000002.json").read_text())
    assert record == {
        "step": 2,
        "lr": 0.1,
        "scale": 1.0,
        "loss": ["nan"],
        "grad_norm": "nan",
        "paths": [f"clips/{video}.mp4" for video in range(4)],
    }


def test_within_its_number_a_step_that_is_not_finite_is_skipped_and_nothing_else(tmp_path) -> None:
    """Three epochs of two good steps and a bad one: the sums and weights are those of the good steps."""
    bad, good = Loader(batch(), batch(float("inf")), batch()), Loader(batch(), batch())
    with_bad, _ = run(bad, Progress(), tmp_path / "bad", nonfinite=3)
    without, _ = run(good, Progress(), tmp_path / "good")
    assert [e["loss"] for e in with_bad] == [e["loss"] for e in without]
    assert len(list((tmp_path / "bad").glob("nonfinite_*.json"))) == 3
    late, _ = run(bad, Progress(), tmp_path / "late", nonfinite=3, log_period=100)
    assert [(e["loss"], e["top1"]) for e in late] == [(e["loss"], e["top1"]) for e in without]
    names = [sorted(p.name for p in (tmp_path / folder).glob("nonfinite_*.json")) for folder in ("bad", "late")]
    assert names[0] == names[1] == [f"nonfinite_{step:08d}.json" for step in (2, 5, 8)]
    with pytest.raises(NonFiniteError, match="4 step.s. of this run were not finite"):
        run(bad, Progress(), tmp_path / "more", epochs=4, nonfinite=3)


def test_targets_may_be_shares_of_mixed_labels_while_top_1_counts_the_labels(tmp_path) -> None:
    steps = []

    def mix(clips: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        steps.append(step)
        return clips, 0.75 * F.one_hot(labels, 2) + 0.25 * F.one_hot(1 - labels, 2)

    ended, _ = run(Loader(batch()), Progress(), tmp_path, epochs=40, mix=mix)
    assert steps == list(range(40))
    # the clips are all alike and the mixed shares even, so the network ends where both classes are equally likely
    assert ended[-1]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert ended[-1]["top1"] in {0.0, 50.0}


def failing(*videos: int) -> Batch:
    one = batch()
    one.replaced += [Failed(video, f"train.txt:{video}: {video}.mp4: cut short") for video in videos]
    return one


def test_replaced_clips_are_said_once_per_file_and_listed(tmp_path, capsys) -> None:
    run(Loader(failing(3, 4), failing(3)), Progress(), tmp_path, epochs=2, allowed=3)
    said = capsys.readouterr().out
    assert said.count("replaced a clip that cannot be decoded: train.txt:3: 3.mp4: cut short\n") == 1
    assert "Traceback" not in said
    assert said.count("train.txt:4: 4.mp4") == 1
    lines = [f"train.txt:{video}: {video}.mp4: cut short\n  Traceback: why\n" for video in (3, 4)]
    assert (tmp_path / "failed.txt").read_text() == "".join(lines)


def test_a_spent_budget_ends_the_run_and_names_the_worst_files(tmp_path) -> None:
    """Three an epoch are allowed; the counts begin anew with each epoch, so two epochs of three pass."""
    run(Loader(failing(3, 3), failing(4)), Progress(), tmp_path / "passes", epochs=2, allowed=3)
    message = (
        r"4 clips of this epoch could not be decoded, by step 2; DATA.MAX_FAILED_FRACTION allows 3. Most often:\n"
        r"  train.txt:3: 3.mp4: cut short \(3 x\)\n  train.txt:4: 4.mp4: cut short \(1 x\)\n"
    )
    with pytest.raises(BudgetError, match=message):
        run(Loader(failing(3, 3), failing(3, 4)), Progress(), tmp_path / "stops", allowed=3)


def test_fit_goes_on_in_mid_epoch_with_its_sums(tmp_path) -> None:
    """Stopped behind the second of three steps and gone on, the epoch's numbers are those of one go."""
    batches = [batch(0.5), batch(1.0), batch(2.0)]
    whole, _ = run(Loader(*batches), Progress(), tmp_path / "whole", epochs=1)
    progress, meter, kept = Progress(), Meter(CPU, World()), {}

    def stop() -> None:
        if progress.step == 2:
            kept.update(meter.state_dict())
            raise Stopped(signal.SIGTERM, progress.step)

    with pytest.raises(Stopped, match="stopped by SIGTERM at step 2"):
        run(Loader(*batches), progress, tmp_path / "parts", epochs=1, meter=meter, after_step=stop)
    assert (progress.epoch, progress.step, progress.clips_in_epoch) == (0, 2, 8)
    again = Meter(CPU, World())
    again.load_state_dict(kept)
    loader = Loader(*batches)
    ended, rates = run(loader, progress, tmp_path / "parts", epochs=1, meter=again)
    assert loader.batch_sampler.started == [(0, 8)] and rates[0] == pytest.approx(2 / 3)
    assert (ended[0]["epoch"], ended[0]["step"]) == (1, 3)
    # the weights of the second part are fresh here, so only what was summed before can be compared: two of three steps
    assert again.loss.count == 12 and whole[0]["loss"] > 0


def test_stopped_behind_an_epoch_its_end_comes_again(tmp_path) -> None:
    """Validation was interrupted: progress is that of the last step, and going on takes no step but ends the epoch."""
    progress = Progress()

    def stop(values: dict) -> None:
        assert (progress.epoch, progress.clips_in_epoch) == (1, 0)
        raise Stopped(signal.SIGTERM, progress.step)

    with pytest.raises(Stopped):
        run(Loader(batch(), batch()), progress, tmp_path, epochs=2, after_epoch=stop)
    assert (progress.epoch, progress.step, progress.clips_in_epoch) == (0, 2, 8)
    ended, rates = run(Loader(batch(), batch()), progress, tmp_path, epochs=1)
    assert [(e["epoch"], e["step"]) for e in ended] == [(1, 2)] and rates == [0.5]  # the rate of the last step


def test_a_step_that_was_skipped_is_reported_at_the_next_line_of_the_log(tmp_path) -> None:
    progress = Progress()
    loader = Loader(batch(), batch(float("nan")), batch(), batch(), batch())
    with pytest.raises(NonFiniteError, match="step 2 was skipped"):
        run(loader, progress, tmp_path, log_period=4)
    assert progress.step == 4
    assert json.loads((tmp_path / "nonfinite_00000002.json").read_text())["step"] == 2


class Reads(TorchDispatchMode):
    """Counts what waits for a device: a scalar read by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_between_two_lines_of_the_log_nothing_is_read_from_the_device(
    half: bool, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's complete step: an octave network, accumulation, clipping, a scaler, a moving average, a stop flag."""
    torch.manual_seed(0)
    spec = NETWORKS["i3d_tiny"](5)
    model = create(with_octave(replace(spec, stages=spec.stages[:2]), 0.25, ratios=[0.25, 0.0]))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if half else None
    dtype = torch.float16 if half else torch.float32
    progress, ema, reads, counts = Progress(), Ema(model, 0.9), Reads(), []
    for method in ("cpu", "numpy", "tolist"):  # these reach no operator on a CPU
        original = getattr(Tensor, method)

        def read(self: Tensor, *args, original=original):
            reads.count += 1
            return original(self, *args)

        monkeypatch.setattr(Tensor, method, read)
    log, stop = Log(tmp_path, main=True, step=0), StopRequest()

    def after_step() -> None:
        ema.update(progress.step)
        stop.check(progress.step)
        counts.append(reads.count)
        reads.count = 0

    clips = torch.randint(256, (4, 1, 3, 4, 16, 16), dtype=torch.uint8)
    steps = [Batch(clips, torch.tensor([0, 1, 2, 3])) for _ in range(8)]
    meter = Meter(CPU, World())
    with reads:
        fit(
            model,
            sgd(model, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, weight_decay_norm=0.0),
            Loader(*steps),
            progress=progress,
            meter=meter,
            epochs=1,
            lr_at=lambda epoch: 0.1 / (1 + epoch),
            prepare=partial(normalize, mean=0.45, std=0.225),
            mix=keep,
            loss=partial(F.cross_entropy, label_smoothing=0.1),
            device=CPU,
            world=World(),
            precision=Precision(accumulate=2, clip_norm=1.0, dtype=dtype, scaler=scaler),
            freeze_norm_stats=False,
            failures=FailureBudget(0, log, tmp_path / "failed.txt"),
            unread=UnreadSteps(meter, NonFinite(0, tmp_path, str, log)),
            log=log,
            log_period=4,
            after_step=after_step,
            after_epoch=lambda values: None,
        )
    assert counts[:3] == [0, 0, 0] and counts[4:7] == [0, 0, 0]
    assert counts[3] > 0 and counts[7] > 0  # the lines of the log, so the count works
