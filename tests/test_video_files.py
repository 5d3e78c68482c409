"""Video files are decoded with PyAV: frames, order, sampling, times, rotation, and files that are broken."""

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.data import BadRowError, VisionLanguageCollator, load_rows
from modeling_sparse_moe_vlm.video_decoding import _decode
from modeling_sparse_moe_vlm.video_reading import FrameSampling, read_video
from tests.support.processors import assistant
from tests.test_videos import make_processor, text_of
from tests.toolbox.data.data_files import write_lines

av = pytest.importorskip("av")
pytestmark = pytest.mark.newest

NUM_FRAMES, FPS = 25, 10


def frame(number: int) -> np.ndarray:
    """The left half gets lighter from frame to frame, the upper right quarter is blue, and the lower one is red."""
    pixels = np.zeros((32, 48, 3), dtype=np.uint8)
    pixels[:, :24] = 10 * number
    pixels[:16, 24:, 2] = 255
    pixels[16:, 24:, 0] = 255
    return pixels


def write_video(file, format: str, codec: str = "mpeg4", rotation: int = 0):
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.bit_rate = 2_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(NUM_FRAMES):
            picture = av.VideoFrame.from_ndarray(frame(number), format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def numbers_of(video) -> list[int]:
    """Which frames of [`write_video`] these are, by their brightness."""
    assert video.frames.dtype == np.uint8
    return [round(float(brightness) / 10) for brightness in video.frames[:, 8:24, 4:20].mean(axis=(1, 2, 3))]


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("videos") / "a.mp4")
    write_video(path, "mp4")
    return path


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, [0, 12]),  # two and a half seconds, at one frame per second
        ({"fps": 2.0}, [0, 5, 10, 15, 20]),
        ({"fps": 100.0, "max_frames": 8}, [0, 3, 6, 9, 12, 15, 18, 21]),
        ({"num_frames": 3}, [0, 8, 16]),
        ({"do_sample": False}, list(range(NUM_FRAMES))),
    ],
)
def test_sampled_frames_and_times(mp4, options, numbers):
    sampling = FrameSampling(**{"max_frames": 32, "fps": 1.0} | options)
    with open(mp4, "rb") as file:
        data = file.read()
    for source in (mp4, data, {"path": mp4, "bytes": None}, {"path": "lost", "bytes": data}):
        video = read_video(source, "v", sampling)
        assert numbers_of(video) == video.metadata.frames_indices == numbers
        assert video.metadata.fps == FPS
        assert video.metadata.timestamps == [number / 10 for number in numbers]
        assert video.frames.shape == (len(numbers), 32, 48, 3)
        # Red, green and blue are not exchanged.
        assert np.abs(video.frames[:, 4:12, 30:42].mean(axis=(0, 1, 2)) - [0, 0, 255]).max() < 12
        assert np.abs(video.frames[:, 20:28, 30:42].mean(axis=(0, 1, 2)) - [255, 0, 0]).max() < 12


def test_files_that_do_not_tell_their_number_of_frames(tmp_path):
    for name, format, codec in (("a.webm", "webm", "libvpx"), ("a.mkv", "matroska", "mpeg4")):
        path = str(tmp_path / name)
        write_video(path, format, codec)
        with av.open(path) as container:
            assert container.streams.video[0].frames == 0
        assert numbers_of(read_video(path, "v", FrameSampling(4, 100.0))) == [0, 6, 12, 18]


def test_videos_of_phones_are_upright(tmp_path):
    path = str(tmp_path / "a.mov")
    write_video(path, "mov", rotation=-90)  # clockwise
    video = read_video(path, "v", FrameSampling(2, 1.0))
    assert video.frames.shape == (2, 48, 32, 3)
    right = np.rot90(frame(12), -1)
    assert np.abs(video.frames[1].astype(int) - right).mean() < 12


def test_frames_that_are_not_shown_do_not_count(mp4, tmp_path):
    """An editor cut the first half second: the file still contains its frames, which decoders leave out."""
    path = str(tmp_path / "edited.mp4")
    with av.open(path, "w", options={"avoid_negative_ts": "disabled"}) as output, av.open(mp4) as source:
        stream = output.add_stream_from_template(source.streams.video[0])
        shift = int(Fraction(5, FPS) / source.streams.video[0].time_base)
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream, packet.pts, packet.dts = stream, packet.pts - shift, packet.dts - shift
                output.mux(packet)
    video = read_video(path, "v", FrameSampling(8, 100.0))
    assert (numbers_of(video), video.metadata.frames_indices) == (
        [5, 7, 10, 12, 15, 17, 20, 22],
        [0, 2, 5, 7, 10, 12, 15, 17],
    )
    with pytest.raises(ValueError, match="it has no frames"):
        _decode(None, None, 0, None, FrameSampling(8, 1.0))


def test_processors_and_rows_decode_files(mp4):
    processor = make_processor()
    inputs = processor(text="<video>", videos=mp4, fps=2.0, return_tensors="pt")
    assert text_of(processor, inputs) == "".join(f"<{second / 2:.1f} seconds>[4]" for second in range(5))
    frames = read_video(mp4, "v", FrameSampling(32, 2.0)).frames
    expected = processor(text="<video>", videos=frames, return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(inputs["pixel_values_videos"], expected)
    row = {"messages": [{"role": "user", "content": [{"type": "video", "path": mp4}]}, assistant("x")]}
    batch = VisionLanguageCollator(processor)([row])
    assert "<0.0 seconds>[4]<1.2 seconds>[4]<|im_end|>" in text_of(processor, batch)


def test_files_that_cannot_be_decoded(mp4, tmp_path):
    data = Path(mp4).read_bytes()
    fast = str(tmp_path / "fast.mp4")
    with av.open(fast, "w", options={"movflags": "faststart"}) as output, av.open(mp4) as source:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    whole = (tmp_path / "fast.mp4").read_bytes()
    sound = io.BytesIO()
    with av.open(sound, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
    for content, reason in (
        (data[: len(data) // 2], "cannot be read as a video: "),  # without the index at its end
        (whole[: int(0.7 * len(whole))], "it should have 25 frames, but only has"),
        (b"", "cannot be read as a video: "),
        (b"no video", "cannot be read as a video: "),
        (sound.getvalue(), "it contains no video"),
    ):
        path = tmp_path / "broken.mp4"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^v \(.*broken.mp4\) cannot be read as a video: ") as raised:
            read_video(path, "v", FrameSampling(25, 100.0))
        assert reason in str(raised.value)
        with pytest.raises(ValueError, match=r"^v cannot be read as a video: "):
            read_video({"bytes": content}, "v", FrameSampling(25, 100.0))
    rows = write_lines(tmp_path / "rows.jsonl", [{"video": "broken.mp4", "question": "q", "answer": "a"}])
    with pytest.raises(BadRowError, match=r"row 0: videos\[0\] \(.*broken.mp4\) cannot be read as a video") as raised:
        load_rows(rows)
    assert raised.value.kind == "broken video"
    with pytest.raises(ValueError, match=r"v \(none.mp4\) cannot be read as a video: there is no such file"):
        read_video("none.mp4", "v", FrameSampling(1, 1.0))
