#!/usr/bin/env python
"""What a trained network says of videos: python tools/predict.py VIDEO [VIDEO ...] --cfg CONFIG [KEY VALUE ...]

Prints the best classes of each clip and of each video, and writes predictions.json. --annotate: also VIDEO_annotated.mp4,
the video with what is said of it. --saliency: VIDEO_saliency.png (Grad-CAM), with --annotate an mp4 too. --features:
VIDEO_features.npz. An image network takes images. More: docs/prediction.md.
"""

from __future__ import annotations

if __name__ == "__main__":
    import octvideo.starting  # noqa: F401  # first: importing the others takes seconds

import argparse
import difflib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from numpy.typing import NDArray
from PIL import Image
from tabulate import tabulate
from torch import Tensor, nn

from octvideo import build, command, config, jobs
from octvideo.analysis.contact import contact_sheet
from octvideo.analysis.overlay import Font, choose_font, draw_panel, heat_over, lacking, legible
from octvideo.analysis.saliency import grad_cam
from octvideo.data.dataset import EvalDataset
from octvideo.data.decode import DecodeError, Video, frames_at_a_time, open_video
from octvideo.data.encode import EncodeError, write_mp4
from octvideo.data.images import ImageEvalDataset
from octvideo.data.lists import unlabelled
from octvideo.data.transforms import scaled_size, uniform_crops
from octvideo.engine import checkpoint
from octvideo.engine.checkpoint import CheckpointError
from octvideo.engine.distributed import World, device_of
from octvideo.engine.predictions import Predictions
from octvideo.errors import UserError
from octvideo.files import path_argument, write_atomic

CHUNK = 16  # frames of a video held at a time while it is annotated
INPUT = (  # keys of DATA that decide what the network is shown
    *("NUM_FRAMES", "SAMPLING_RATE", "TARGET_FPS", "POLICY", "SHORT", "TEST_SHORT_SIDE", "TEST_CROP"),
    *("INTERPOLATION", "MEAN", "STD", "DECODER"),
)
SHOWN_FRAMES = 8  # of a clip in a contact sheet
SHEET_SIDE, VIDEO_SIDE, LONGEST = 128, 240, 4096  # pixels: what is smaller is enlarged, by a whole factor
LONGEST_NAME = 30  # signs of a class name in a table; files have all of it
UNTRAINED = "RANDOM WEIGHTS: this says nothing"


class RequestError(UserError, ValueError):
    """A command line that cannot be carried out."""


@dataclass(frozen=True)
class Network:
    """A network with its weights, and where they are from."""

    cfg: CfgNode
    model: nn.Module
    device: torch.device
    classes: list[str]  # K names
    weights: dict[str, Any]  # for the report: checkpoint (None: random), step, epoch, moving_average

    @property
    def mark(self) -> str:
        """What everything that is made with random weights says."""
        return UNTRAINED if self.weights["random_weights"] else ""


class Seen(NamedTuple):
    """What the network was shown of a file, and what it said. Crops of a clip lie side by side."""

    clips: Tensor  # uint8 [V, C, (T,) H, W]
    probabilities: Tensor  # float32 [V, K]
    features: Tensor  # float32 [V, C], what the classifier is given
    indices: NDArray[np.int64] | None  # [clips, T], frames of the video; None for an image
    num_frames: int
    fps: float  # 0 for an image

    def of_clips(self, num_crops: int) -> Tensor:
        """[V, K] -> [clips, K]"""
        return self.probabilities.unflatten(0, (-1, num_crops)).mean(dim=1)

    def spans(self) -> list[tuple[float, float]]:
        """Seconds at which each clip's first frame begins and its last one ends, at the file's average rate."""
        if self.indices is None:
            return []
        return [(int(frames.min()) / self.fps, (int(frames.max()) + 1) / self.fps) for frames in self.indices]


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands between the flags -> files, overrides. A key takes the word behind it as its value.

    Errors: RequestError naming every word that is neither a file nor a key, or both.
    """
    keys = config.key_names()
    files, overrides, problems = [], [], []
    rest = iter(words)
    for word in rest:
        path = Path(word)
        if word in keys:
            if path.exists():
                problems.append(f"{word} is a key of the configuration and a file here; for the file write ./{word}")
            overrides += [word, *islice(rest, 1)]
        elif path.is_file():
            files.append(word)
            if not _is_utf8(word):
                problems.append(f"{word!a}: its name is not UTF-8; rename it")
        elif path.is_dir():
            problems.append(f"{word}: a folder; give the files in it, e.g. {word.rstrip('/')}/*.mp4")
        else:
            close = difflib.get_close_matches(word.upper(), keys, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            if close:
                next(rest, None)  # the value of what was meant
            problems.append(f"{word}: no such file, and no key of the configuration{hint}")
    if not files and not problems:
        problems.append("no video was given; write VIDEO [VIDEO ...] --cfg CONFIG [KEY VALUE ...]")
    if problems:
        raise RequestError("\n  ".join([f"{len(problems)} problem(s) with what was given", *problems]))
    return files, overrides


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_network(cfg: CfgNode, *, random_weights: bool) -> Network:
    """The network of TEST.CHECKPOINT, or of the newest checkpoint; of its moving average where it has one."""
    folder = Path(cfg.OUTPUT_DIR)
    device = device_of(cfg.DEVICE, World())
    if device.type == "cpu":
        build.use_threads(cfg, World())
    model = build.network(cfg)
    state: dict[str, Any] = {}
    weights: dict[str, Any] = {"checkpoint": None, "random_weights": True}
    if not random_weights:
        if not cfg.TEST.CHECKPOINT and not checkpoint.found(folder):
            remedy = "train first or give --checkpoint FILE; --random-weights goes on without any"
            raise CheckpointError(f"{folder}: no checkpoint to predict with; {remedy}")
        path, state = jobs.weights_to_test(cfg, folder)
        _check_classes(cfg, checkpoint.averaged(state), path)
        jobs.load_trained(cfg, model, state, path)
        weights = {"checkpoint": str(path), "random_weights": False, "moving_average": "ema" in state}
        weights |= {"step": state.get("step"), "epoch": state.get("epoch")}
    return Network(cfg, build.place(cfg, model, device).eval(), device, class_names(cfg, state), weights)


def _check_classes(cfg: CfgNode, weights: dict[str, Tensor], path: Path) -> None:
    bias = weights.get("head.fc.bias")
    count = len(bias) if bias is not None and bias.dim() else cfg.MODEL.NUM_CLASSES
    if count != cfg.MODEL.NUM_CLASSES:
        remedy = f"give MODEL.NUM_CLASSES {count} or another checkpoint"
        raise CheckpointError(f"{path}: of {count} classes, but MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}; {remedy}")


def class_names(cfg: CfgNode, state: dict[str, Any]) -> list[str]:
    """The names that the checkpoint holds, fit to be printed on one line; "class 3" where it holds none."""
    count = cfg.MODEL.NUM_CLASSES
    names = state.get("classes") or [f"class {label}" for label in range(count)]
    if not isinstance(names, list):
        raise CheckpointError(f"the checkpoint's class names are {type(names).__name__}, not a list; it is of no use")
    if len(names) != count:
        raise CheckpointError(
            f"the checkpoint names {len(names)} classes, but MODEL.NUM_CLASSES is {count}; correct it"
        )
    return ["".join(sign if sign.isprintable() else "\ufffd" for sign in str(name)) for name in names]


def look(network: Network, samples: EvalDataset | ImageEvalDataset, number: int) -> Seen:
    """Show the network the test views of a file, as a test does. Errors: DecodeError."""
    sample = samples[number]
    if sample.error:
        raise DecodeError(sample.error.partition(": ")[2])  # without the place in a list that there is not
    prepare, features = build.prepare_clips(network.cfg), []
    fc = network.model.get_submodule("head.fc")
    handle = fc.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float().cpu()))
    try:
        with torch.no_grad():
            parts = sample.clips.split(network.cfg.TEST.BATCH_SIZE)
            logits = torch.cat([network.model(prepare(part.to(network.device))).float() for part in parts])
    finally:
        handle.remove()
    probabilities = logits.softmax(dim=1).cpu()
    if not probabilities.isfinite().all():
        raise CheckpointError("the network's answer is not a number; its weights are of no use")
    seen = Seen(sample.clips, probabilities, torch.cat(features), None, 1, 0.0)
    if isinstance(samples, ImageEvalDataset):
        return seen
    with open_video(samples.videos.path(number), samples.decoder, max_pixels=samples.max_pixels) as video:
        return seen._replace(indices=samples.indices(video).numpy(), num_frames=video.num_frames, fps=video.fps)


def best(network: Network, probabilities: Tensor, top: int) -> list[dict[str, Any]]:
    """[K] -> the `top` best classes, best first."""
    values, labels = probabilities.topk(min(top, len(probabilities)))
    return [
        {"class": label, "name": network.classes[label], "probability": value}
        for label, value in zip(labels.tolist(), values.tolist(), strict=True)
    ]


def answers(network: Network, path: str, seen: Seen, top: int) -> dict[str, Any]:
    """A video's entry in predictions.json."""
    spans, num_crops = seen.spans(), network.cfg.TEST.CROPS
    clips: list[dict[str, Any]] = [{"top": best(network, one, top)} for one in seen.of_clips(num_crops)]
    for clip, (start, end) in zip(clips, spans, strict=False):  # an image has no times
        clip.update(start_s=start, end_s=end)
    times = {"frames": seen.num_frames, "fps": seen.fps} if spans else {}
    return {"path": path, **times, "clips": clips, "average": best(network, seen.probabilities.mean(dim=0), top)}


def table(answer: dict[str, Any]) -> str:
    """Of one file: a row per clip, then the average over them."""
    rows = [
        [number, f"{clip['start_s']:.2f}-{clip['end_s']:.2f}", *_cells(clip["top"])]
        for number, clip in enumerate(answer["clips"])
        if "start_s" in clip  # an image is its own average
    ]
    rows.append(["average", "", *_cells(answer["average"])])
    header = ["clip", "seconds", *map(str, range(1, len(rows[0]) - 1))]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def _cells(top: list[dict[str, Any]]) -> list[str]:
    return [f"{_brief(entry['name'])} {100 * entry['probability']:.1f} %" for entry in top]


def _brief(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3].rstrip() + "..."


def save_features(network: Network, path: str, seen: Seen, out: Path, cfg_path: str) -> None:
    """[V, C] features and which view each row is, readable without pickle."""
    num_crops = network.cfg.TEST.CROPS
    clip, crop = np.divmod(np.arange(len(seen.features)), num_crops)
    spans = np.array(seen.spans() or [(np.nan, np.nan)])[clip]
    arrays: dict[str, Any] = {
        "features": seen.features.numpy(),
        "probabilities": seen.probabilities.numpy(),
        "clip": clip,
        "crop": crop,
        "start_s": spans[:, 0],
        "end_s": spans[:, 1],
        "video": np.array(path),
        "config": np.array(cfg_path),
        "checkpoint": np.array(network.weights["checkpoint"] or network.mark),
    }
    write_atomic(out, lambda file: np.savez(file, **arrays))


def heat_of_clips(network: Network, seen: Seen) -> list[Tensor]:
    """For each clip, what speaks for its best class in each crop: [crops, (T,) H, W], 1 where most does in any of them."""
    num_crops, prepare = network.cfg.TEST.CROPS, build.prepare_clips(network.cfg)
    heats = []
    for views, scores in zip(seen.clips.split(num_crops), seen.of_clips(num_crops), strict=True):
        classes = scores.argmax().expand(num_crops).to(network.device)
        heat, peak, *_ = grad_cam(network.model, prepare(views.to(network.device)), classes)
        share = peak / peak.max() if peak.max() > 0 else peak
        heats.append((heat * share.reshape(-1, *[1] * (heat.dim() - 1))).cpu())
    return heats


def saliency_sheet(network: Network, seen: Seen, heats: list[Tensor], answer: dict[str, Any], font: Font) -> bytes:
    """A PNG: for each clip, frames of its central crop, and the same under the heat."""
    rows: list[tuple[str, Tensor]] = []
    centre = network.cfg.TEST.CROPS // 2
    for views, heat, clip in zip(seen.clips.split(network.cfg.TEST.CROPS), heats, answer["clips"], strict=True):
        # [C, (T,) H, W] -> [T, H, W, C]; an image is a clip of one frame
        frames = views[centre].reshape(3, -1, *views.shape[-2:]).permute(1, 2, 3, 0)
        shown = np.unique(np.linspace(0, len(frames) - 1, min(SHOWN_FRAMES, len(frames))).round().astype(int))
        plain = np.stack([enlarged(frame, SHEET_SIDE) for frame in frames.numpy()[shown]])
        hot = heat[centre].reshape(frames.shape[:3])[shown]
        hot = F.interpolate(hot[None], size=plain.shape[1:3], mode="bilinear", align_corners=False)[0]
        span = f", {clip['start_s']:.2f}-{clip['end_s']:.2f} s" if "start_s" in clip else ""
        title = f"{Path(answer['path']).name}{span}: {_cells(clip['top'])[0]}"
        both = np.concatenate([plain, heat_over(plain, hot.numpy())], axis=1)  # one above the other
        rows.append((legible(f"{title}  {network.mark}".rstrip(), font), torch.from_numpy(both).permute(3, 0, 1, 2)))
    content = io.BytesIO()
    contact_sheet(rows, font).save(content, "PNG")
    return content.getvalue()


def enlarged(frame: NDArray[np.uint8], least: int) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] by the smallest whole factor that makes both sides at least `least`, or that LONGEST allows."""
    factor = max(1, min(-(-least // min(frame.shape[:2])), LONGEST // max(frame.shape[:2])))
    if factor == 1:
        return frame
    size = frame.shape[1] * factor, frame.shape[0] * factor
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))


@dataclass
class Annotation:
    """The frames of a video with what is said of the clip whose middle is nearest, and with heat where there is some."""

    network: Network
    seen: Seen
    answer: dict[str, Any]
    font_path: str | None
    samples: EvalDataset
    heats: list[Tensor] | None = None

    def frames(self, video: Video) -> Iterator[NDArray[np.uint8]]:
        """One at a time, of all frames of the video. Heat lasts as long as its clip."""
        indices, spans, font = self.seen.indices, self.seen.spans(), None
        assert indices is not None
        first, last = indices.min(axis=1), indices.max(axis=1)

        @lru_cache(maxsize=1)
        def whole(clip: int, height: int, width: int) -> Tensor:
            assert self.heats is not None
            return self.whole_frame(self.heats[clip], height, width)

        @lru_cache(maxsize=1)
        def heat(clip: int, t: int, height: int, width: int) -> NDArray[np.float32]:
            one = whole(clip, height, width)[t][None, None]
            return F.interpolate(one, size=(height, width), mode="bilinear", align_corners=False)[0, 0].numpy()

        count = min(CHUNK, frames_at_a_time(video))
        for start in range(0, video.num_frames, count):
            part = video.frames(range(start, min(start + count, video.num_frames))).numpy()
            for number, frame in enumerate(part, start):
                clip = int(abs((first + last) / 2 - number).argmin())
                if self.heats is not None and first[clip] <= number <= last[clip]:
                    t = int(abs(indices[clip] - number).argmin())  # the nearest of the frames that the network saw
                    frame = heat_over(frame, heat(clip, t, frame.shape[0], frame.shape[1]))
                frame = enlarged(frame, VIDEO_SIDE)
                font = font or self.font(min(frame.shape[:2]))
                begin, end = spans[clip]
                title = f"{number / self.seen.fps:.2f} s   clip {clip}: {begin:.2f}-{end:.2f} s"
                rows = [(entry["name"], entry["probability"]) for entry in self.answer["clips"][clip]["top"]]
                yield draw_panel(frame, title, rows, font, mark=self.network.mark)

    def font(self, side: int) -> Font:
        return choose_font(max(12, round(side / 30)), self.network.classes, self.font_path)

    def whole_frame(self, heat: Tensor, height: int, width: int) -> Tensor:
        """[crops, T, H, W] of the crops -> [T, H', W'] of the scaled frame that they were cut from, the highest of each."""
        whole = torch.zeros(heat.shape[1], *scaled_size(height, width, self.samples.short_side), 1)
        places = uniform_crops(whole, self.samples.crop, self.samples.num_crops)  # views of it
        for place, one in zip(places, heat[..., None], strict=True):
            place.copy_(torch.maximum(place, one))
        return whole[..., 0]

    def write(self, path: str, out: Path) -> None:
        with open_video(path, self.samples.decoder, max_pixels=self.samples.max_pixels) as video:
            write_atomic(out, lambda file: write_mp4(file, self.frames(video), video.fps))


def outputs(options: argparse.Namespace, out: Path, name: str) -> dict[str, Path]:
    """What is to be written of one file: kind -> path."""
    endings = {"annotated": "_annotated.mp4", "sheet": "_saliency.png", "heat": "_saliency.mp4", "npz": "_features.npz"}
    wanted = {"annotated": options.annotate, "sheet": options.saliency, "npz": options.features}
    wanted["heat"] = options.annotate and options.saliency
    return {kind: out / f"{name}{ending}" for kind, ending in endings.items() if wanted[kind]}


def write_outputs(
    options: argparse.Namespace,
    network: Network,
    samples: EvalDataset | ImageEvalDataset,
    seen: Seen,
    answer: dict[str, Any],
    paths: dict[str, Path],
) -> None:
    """Errors: DecodeError for a frame between the clips that does not decode."""
    if "npz" in paths:
        save_features(network, answer["path"], seen, paths["npz"], options.cfg)
    heats = heat_of_clips(network, seen) if "sheet" in paths else None
    if heats:
        font = choose_font(12, network.classes, options.font)
        write_atomic(paths["sheet"], saliency_sheet(network, seen, heats, answer, font))
    if isinstance(samples, EvalDataset):
        annotation = partial(Annotation, network, seen, answer, options.font, samples)
        if "annotated" in paths:
            annotation().write(answer["path"], paths["annotated"])
        if "heat" in paths:
            annotation(heats).write(answer["path"], paths["heat"])


def predict(options: argparse.Namespace) -> int:
    files, overrides = split_words(options.words)
    cfg = build.load_config(options.cfg, [*overrides, *_flags_as_overrides(options)])
    if cfg.MODEL.FACTORY:
        raise RequestError(f"this reads the head of octvideo's own networks, which {cfg.MODEL.FACTORY}'s is not")
    if options.random_weights and options.checkpoint:
        raise RequestError("--random-weights and --checkpoint contradict each other; give one of them")
    if options.top < 1:
        raise RequestError(f"--top is {options.top}; allowed: 1 or more")
    if options.annotate and build.takes_images(cfg):
        raise RequestError(f"--annotate is for videos, but {cfg.MODEL.NAME} takes images; --saliency draws over those")
    out = options.out or Path(cfg.OUTPUT_DIR) / "predictions"
    network = load_network(cfg, random_weights=options.random_weights)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{out}: cannot be made ({error.strerror}); give another --out") from None
    predictions = Predictions(out / "predictions.json", _header_of(network, options.cfg))
    names = predictions.output_names(files)
    paths = [outputs(options, out, name) for name in names]
    inputs = {Path(file).resolve() for file in files}
    for path in (path for each in paths for path in each.values()):
        if path.resolve() in inputs:
            raise RequestError(f"{path}: would be written over, but is one of the videos; give another --out")
    _warn_of_font(network, options)
    print(_introduction(network))
    videos: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    notes: list[str] = []
    try:
        _predict_each(options, network, list(zip(files, names, paths, strict=True)), (videos, failed))
    finally:  # what was predicted until then is not lost
        if videos or failed:
            notes = predictions.write(videos, failed)
    print(f"\n{predictions.path}: {len(videos)} of {len(files)} files predicted", *notes, sep="\n")
    if failed:
        print(f"error: {len(failed)} of {len(files)} files failed, see above", file=sys.stderr)
    return 1 if failed else 0


def _predict_each(
    options: argparse.Namespace,
    network: Network,
    files: Sequence[tuple[str, str, dict[str, Path]]],
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    """Predict each (file, name of its outputs, paths of its outputs); add to `found`, the entries of videos and failures."""
    cfg, (videos, failed) = network.cfg, found
    listed = unlabelled([file for file, *_ in files], "the command line")
    samples = build.eval_samples(cfg, listed, cfg.TEST.CLIPS, cfg.TEST.CROPS)
    for number, (file, name, paths) in enumerate(files):
        try:
            seen = look(network, samples, number)
            answer = answers(network, file, seen, options.top)
            videos.append({**answer, "file": str(Path(file).resolve()), "name": name})
            print(f"\n{_header(answer)}\n{table(answer)}", flush=True)
            replaced = {path for path in paths.values() if path.exists()}
            write_outputs(options, network, samples, seen, answer, paths)
            for path in paths.values():
                print(f"replaced {path}" if path in replaced else path)
        except (DecodeError, EncodeError) as error:
            failed.append({"path": file, "reason": str(error)})
            print(f"\nerror: {error}", file=sys.stderr)


def _header_of(network: Network, cfg_path: str) -> dict[str, Any]:
    """Return what all predictions in one file share."""
    cfg = network.cfg
    views = {"clips": cfg.TEST.CLIPS, "crops": cfg.TEST.CROPS, "input": {key.lower(): cfg.DATA[key] for key in INPUT}}
    return {"config": cfg_path, "model": cfg.MODEL.NAME, "alpha": cfg.OCTAVE.ALPHA, **network.weights, **views}


def _flags_as_overrides(options: argparse.Namespace) -> list[str]:
    flags = {"TEST.CLIPS": options.clips, "TEST.CROPS": options.crops, "TEST.CHECKPOINT": options.checkpoint}
    return [word for key, value in flags.items() if value is not None for word in (key, str(value))]


def _warn_of_font(network: Network, options: argparse.Namespace) -> None:
    """What the pictures cannot show is said once, before anything is drawn."""
    if not (options.annotate or options.saliency):
        return
    try:
        absent = lacking("".join(network.classes), choose_font(12, network.classes, options.font))
    except OSError as error:
        raise RequestError(f"--font {options.font}: cannot be used ({error}); give a TrueType file") from None
    if absent:
        some = "".join(absent[:20]) + ("..." if len(absent) > 20 else "")
        print(f"the font lacks {some} of the class names; --font FILE gives another", file=sys.stderr)


def _introduction(network: Network) -> str:
    cfg, weights = network.cfg, network.weights
    octave = f"octave alpha {cfg.OCTAVE.ALPHA:g}" if cfg.OCTAVE.ALPHA else "vanilla"
    source = network.mark
    if not source:
        average = ", moving average" if weights["moving_average"] else ""
        source = f"{weights['checkpoint']} (epoch {weights['epoch']}, step {weights['step']}{average})"
    return f"{cfg.MODEL.NAME} ({octave}), {source}, {cfg.TEST.CLIPS} clip(s) x {cfg.TEST.CROPS} crop(s)"


def _header(answer: dict[str, Any]) -> str:
    if "fps" not in answer:
        return str(answer["path"])
    seconds = answer["frames"] / answer["fps"]
    return f"{answer['path']}: {answer['frames']} frames at {answer['fps']:.6g} a second, {seconds:.2f} s"


@command.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 a file or the run failed, 2 the request was wrong, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words", nargs="+", metavar="VIDEO | KEY VALUE", help="files, and overrides of the configuration"
    )
    parser.add_argument("--cfg", required=True, metavar="CONFIG", help="YAML file that the network was trained with")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights (default: the newest whole one in OUTPUT_DIR)")
    parser.add_argument("--random-weights", action="store_true", help="go on without trained weights, and say so")
    parser.add_argument("--clips", type=int, metavar="N", help="clips in time per video (default: TEST.CLIPS)")
    parser.add_argument("--crops", type=int, metavar="N", help="crops per clip, 1 or 3 (default: TEST.CROPS)")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes to name (default 5)")
    parser.add_argument(
        "--out", type=path_argument, metavar="FOLDER", help="for what is written (default OUTPUT_DIR/predictions)"
    )
    parser.add_argument("--annotate", action="store_true", help="write VIDEO_annotated.mp4")
    parser.add_argument("--saliency", action="store_true", help="write VIDEO_saliency.png; with --annotate an mp4 too")
    parser.add_argument("--features", action="store_true", help="write VIDEO_features.npz")
    parser.add_argument("--font", metavar="FILE", help="TrueType font for class names in pictures")
    options = parser.parse_intermixed_args(arguments)  # so that KEY VALUE may stand behind the flags
    return predict(options)


if __name__ == "__main__":
    sys.exit(command.run(main))
