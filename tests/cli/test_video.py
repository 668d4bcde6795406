"""Videos out of the command line and the Python API: every format decodes again, and says what it was made from."""

from __future__ import annotations

import re
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from stepwell import DiffGenerator
from stepwell.cli.main import main
from stepwell.errors import InvalidRequest
from stepwell.media.video import parameters_in
from stepwell.types import Event, Progress
from tests.cli.test_generate import fails

MODEL = "stepwell/fake-video"
OF_A_PICTURE = ("image = 'clip.mp4' can't be read", "a picture's name ends in", "num_frames = 9: must be between 1 and 1")
CLIP = ["generate", "--model-path", MODEL, "--prompt", "ein Kreis, naïf ☀", "--num-frames", "9", "--fps", "12"]
SIZE = ["--width", "48", "--height", "32", "--seed", "7"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def held(path: Path) -> tuple[int, tuple[int, int], float]:
    """Frames, size and frames per second of a file, all of it decoded."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.average_rate is not None
            return len(list(container.decode(stream))), (stream.width, stream.height), float(stream.average_rate)
    with Image.open(path) as image:
        count, milliseconds = getattr(image, "n_frames", 1), 0.0
        for index in range(count):
            image.seek(index)
            image.load()
            milliseconds += image.info["duration"]
        return count, image.size, count * 1000 / milliseconds


def test_a_video_is_an_mp4_that_can_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CLIP, *SIZE]) == 0
    path = Path(re.search(r"saved (.+) \(9 frames, seed 7,", capsys.readouterr().out)[1])  # type: ignore[index]
    assert path == Path("outputs/ein-kreis-naïf-7.mp4") and held(path) == (9, (48, 32), 12.0)
    assert main(["generate", "--from", str(path), "--output-file-name", "again"]) == 0
    assert Path("outputs/again.mp4").read_bytes() == path.read_bytes()
    assert main(["generate", "--from", str(path), "--output-file-name", "other.mp4", "--num-frames", "5", "--fps", "4"]) == 0
    assert held(Path("outputs/other.mp4")) == (5, (48, 32), 4.0)


@pytest.mark.parametrize(("name", "fps"), [("clip.gif", 50), ("clip.webp", 90), ("clip.mp4", 240)])
def test_the_fastest_that_viewers_show(name: str, fps: int) -> None:
    assert main([*CLIP, *SIZE, "--fps", str(fps), "--output-file-name", name]) == 0
    assert held(Path(f"outputs/{name}"))[2] == pytest.approx(fps, rel=0.01)


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp"])
def test_formats_hold_every_frame_and_their_parameters(suffix: str) -> None:
    path = Path(f"outputs/clip.{suffix}")
    assert main([*CLIP, *SIZE, "--guidance-scale-2", "3.5", "--output-file-name", path.name, "--output-path", "outputs"]) == 0
    count, size, rate = held(path)
    assert (count, size) == (9, (48, 32)) and rate == pytest.approx(12, rel=0.01)
    carried = {"prompt": "ein Kreis, naïf ☀", "num_frames": 9, "fps": 12, "seed": 7, "guidance_scale_2": 3.5, "model_path": MODEL}
    assert carried.items() <= parameters_in(path).items()
    assert main(["generate", "--from", str(path), "--output-file-name", f"again.{suffix}"]) == 0
    assert Path(f"outputs/again.{suffix}").read_bytes() == path.read_bytes()


def test_frames_as_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CLIP, *SIZE, "--output-file-name", "clip.png", "--return-frames"]) == 0
    assert "saved outputs/clip (9 frames" in capsys.readouterr().out
    names = [f"{index:04}.png" for index in range(9)]
    assert sorted(path.name for path in Path("outputs/clip").iterdir()) == names
    frames = np.load("outputs/clip.npy")
    assert (frames.shape, frames.dtype) == ((9, 32, 48, 3), np.uint8) and len(np.unique(frames, axis=0)) > 1
    for name, frame in zip(names, frames, strict=True):
        with Image.open(Path("outputs/clip") / name) as picture:
            assert np.array_equal(np.asarray(picture), frame)
    assert parameters_in(Path("outputs/clip/0008.png"))["num_frames"] == 9
    Path("outputs/clip/2019.png").write_bytes(b"somebody's")
    shorter = [*CLIP, *SIZE, "--num-frames", "5", "--output-file-name", "clip.png"]
    assert main(shorter) == 0
    assert sorted(path.name for path in Path("outputs/clip").iterdir()) == [*names[:5], "2019.png"]


def test_one_frame_is_a_picture_too() -> None:
    for name in ("one.png", "one.jpg", "one.webp", "one.mp4", "one.gif"):
        assert main([*CLIP, *SIZE, "--num-frames", "1", "--output-file-name", name]) == 0
        assert Path(f"outputs/{name}").is_file() and parameters_in(Path(f"outputs/{name}"))["num_frames"] == 1


def test_what_stands_in_the_way_is_told_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("outputs/clip.mp4", "outputs/pair-1.gif"):
        Path(folder).mkdir(parents=True)
    Path("outputs/frames").write_bytes(b"somebody's")
    assert "outputs/clip.mp4 is a folder" in fails([*CLIP, "--output-file-name", "clip.mp4"], capsys)
    assert "outputs/pair-1.gif is a folder" in fails([*CLIP, "--n", "2", "--output-file-name", "pair.gif"], capsys)
    assert "outputs/frames is a file" in fails([*CLIP, "--output-file-name", "frames.png"], capsys)
    assert "File name too long" in fails([*CLIP, "--output-file-name", f"{'x' * 300}.mp4"], capsys)
    Path("run.yaml").write_text('output_file_name: "a\\0b.mp4"')
    assert "null byte" in fails([*CLIP, "--config", "run.yaml"], capsys)


def test_a_video_says_that_its_picture_is_missing(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (64, 64), "red").save("first.png")
    assert main([*CLIP, "--image-path", "first.png", "--strength", "0.5", "--seed", "1", "--output-file-name", "a.mp4"]) == 0
    assert "strength does not apply: a video's first picture is taken as it is" in caplog.text
    again = ["generate", "--from", "outputs/a.mp4", "--output-file-name", "b.mp4"]
    assert main(again) == 0 and "made from a picture" in capsys.readouterr().err
    assert main([*again, "--image-path", "first.png"]) == 0 and "made from a picture" not in capsys.readouterr().err
    assert Path("outputs/b.mp4").read_bytes() == Path("outputs/a.mp4").read_bytes()


def test_the_longest_picture_makes_no_larger_video() -> None:
    Image.new("RGB", (4000, 2), "red").save("line.png")
    assert main([*CLIP, "--image-path", "line.png", "--output-file-name", "line.mp4"]) == 0
    (width, height) = held(Path("outputs/line.mp4"))[1]
    assert width * height <= 64 * 64 and width > height


def test_several_videos_and_a_first_picture() -> None:
    Image.new("RGB", (1600, 800), "red").save("first.jpg")
    first = ["--image-path", "first.jpg", "--num-outputs", "2", "--seed", "3"]
    assert main([*CLIP, *first, "--output-file-name", "clip.mp4"]) == 0
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["clip-0.mp4", "clip-1.mp4"]
    assert held(Path("outputs/clip-1.mp4"))[1] == (80, 32)  # the picture's shape, no larger than the model's own size
    assert parameters_in(Path("outputs/clip-1.mp4"))["seed"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output-file-name", "clip.avi"], "webp; a video's name ends in .mp4, .gif, .webp, .png"),
        (["--output-file-name", "clip.gif", "--fps", "51"], "fps = 51: viewers show .gif at up to 50 frames a second"),
        (["--output-file-name", "clip.webp", "--fps", "100"], "fps = 100: viewers show .webp at up to 90 frames a second"),
        (["--output-file-name", "clip.jpg"], "'clip.jpg': a video's name ends in .mp4, .gif, .webp, .png"),
        (["--num-frames", "10"], "9 or 13 would do"),
        (["--fps", "0"], "fps = 0"),
        (["--image-path", "clip.mp4"], "image = 'clip.mp4' can't be read"),
        (["--guidance-scale-2", "-1"], "guidance_scale_2 = -1"),
        (["--guidance-scale-2", "nan"], "guidance_scale_2 = nan"),
        (
            ["--num-frames", "1", "--output-file-name", "clip.mp4"],
            "a picture's name ends in",
        ),
        ([], "num_frames = 9: must be between 1 and 1"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["stepwell/tiny-flux" if each == MODEL else each for each in CLIP] if words in OF_A_PICTURE else CLIP
    assert words in fails([*command, *arguments], capsys)


def test_videos_that_carry_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.mp4").write_bytes(b"\0\0\0\x18ftypisom" + b"x" * 100)
    assert "not an MP4 video" in fails(["generate", "--from", "broken.mp4"], capsys)
    Image.new("RGB", (8, 8)).save("plain.gif")
    assert "carries no parameters" in fails(["generate", "--from", "plain.gif"], capsys)


def test_python(tmp_path: Path) -> None:
    events: list[Event] = []
    with DiffGenerator.from_pretrained(MODEL) as generator:
        (made,) = generator.generate("x", num_frames=9, fps=6, seed=1, output_path=tmp_path, on_event=events.append)
        assert made.frames.shape == (9, 64, 64, 3) and made.path == tmp_path / "x-1.mp4"
        assert held(made.save(tmp_path / "clip.gif"))[:2] == (9, (64, 64))
        assert made.save(tmp_path / "frames.png") == tmp_path / "frames"
        with pytest.raises(InvalidRequest, match="video's name ends in"):
            made.save(tmp_path / "clip.mov")
        (fast,) = generator.generate("x", num_frames=9, fps=60, seed=1)
        with pytest.raises(InvalidRequest, match="fps = 60: viewers show .gif"):
            fast.save(tmp_path / "fast.gif")
        assert made.image.tobytes() == made.frames[0].tobytes()
    shares = [event.share for event in events if isinstance(event, Progress)]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0, 1)
    decoding = [event.share for event in events if isinstance(event, Progress) and event.stage == "decode"]
    assert len(set(decoding)) == 3  # a step per chunk of frames


@pytest.mark.parametrize(
    ("asked", "filled"),
    [
        ({}, 0.0),
        ({"guidance_scale": 4.0}, 4.0),
        ({"guidance_scale": 4.0, "guidance_scale_2": 3.0}, 3.0),
        ({"guidance_scale_2": 3.0}, 3.0),
    ],
)
def test_the_second_guidance_is_the_first_unless_it_is_said(asked: dict[str, float], filled: float) -> None:
    with DiffGenerator.from_pretrained(MODEL) as generator:
        assert generator.generate("x", num_frames=1, **asked)[0].parameters.guidance_scale_2 == filled


def test_a_model_with_one_transformer_says_so(tiny: DiffGenerator, caplog: pytest.LogCaptureFixture) -> None:
    (made,) = tiny.generate("a star", guidance_scale_2=3.0, width=32, height=32, num_inference_steps=1)
    assert "guidance_scale_2 does not apply" in caplog.text and made.parameters.guidance_scale_2 is None
