"""Rows with videos: formats, validation, limits, batches, packing and evaluation."""

import copy
import json
from typing import TypedDict

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from PIL import Image
from torch.utils.data import DataLoader
from transformers import LlavaProcessor
from transformers.processing_utils import ProcessorMixin

from modeling_sparse_moe_vlm import video_reading
from modeling_sparse_moe_vlm.toolbox.data import (
    BadRowError,
    PreferenceCollator,
    VisionLanguageCollator,
    check_data,
    load_rows,
)
from modeling_sparse_moe_vlm.toolbox.data import media_sources as sources
from modeling_sparse_moe_vlm.toolbox.data.bad_rows import RowFault
from modeling_sparse_moe_vlm.toolbox.data.formats import FORMATS, find_format, recognise_format
from modeling_sparse_moe_vlm.toolbox.data.repeated_rows import RepeatedRow
from modeling_sparse_moe_vlm.toolbox.data.row_sizes import RowSize, find_excess
from modeling_sparse_moe_vlm.toolbox.data.rows import with_images
from modeling_sparse_moe_vlm.toolbox.data.videos import read_videos
from modeling_sparse_moe_vlm.toolbox.evaluation import evaluate_rows, generate_answers
from modeling_sparse_moe_vlm.toolbox.evaluation.own_data import texts_of_rows, without_images
from modeling_sparse_moe_vlm.video_reading import FrameSampling, read_video
from tests.support.processors import assistant, make_image_processor, make_tokenizer, speak_printably
from tests.support.processors import make_processor as make_image_processor_only
from tests.test_videos import VIDEO, make_model, make_processor, text_of
from tests.toolbox.data.data_files import text, write_image, write_lines

COLORS = [(40 * number, 255 - 40 * number, 0) for number in range(6)]
PLACE = {"type": "video"}
QUESTION = {"question": "what?", "answer": "x"}


def ask(*content) -> dict:
    return {"role": "user", "content": [text(item) if isinstance(item, str) else item for item in content]}


def frames(number: int = 6, size=(8, 8)) -> list[Image.Image]:
    return [Image.new("RGB", size, color) for color in COLORS[:number]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`a.gif` has 6 frames of half a second, `0.png` to `5.png` are the same frames."""
    folder = tmp_path_factory.mktemp("videos")
    first, *others = frames()
    first.save(folder / "a.gif", save_all=True, append_images=others, duration=500)
    for number, frame in enumerate(frames()):
        frame.save(folder / f"{number}.png")
    write_image(folder / "red.png", size=(20, 24))
    return folder


@pytest.fixture(scope="module")
def processor():
    return make_processor()


# ------------------------------------------------------------------------------------------------ formats


def part(video) -> dict:
    return PLACE | {"video": video}


@pytest.mark.parametrize(
    ("name", "row", "content"),
    [
        ("vqa", QUESTION | {"video": "a.mp4"}, [part("a.mp4"), text("what?")]),
        ("vqa", QUESTION | {"videos": ["a.mp4", None, "b.mp4"]}, [part("a.mp4"), part("b.mp4"), text("what?")]),
        ("vqa", QUESTION | {"video": ["a.mp4", "b.MOV"]}, [part("a.mp4"), part("b.MOV"), text("what?")]),
        ("vqa", QUESTION | {"video": ["1.png", "2.png"]}, [part(["1.png", "2.png"]), text("what?")]),
        ("vqa", QUESTION | {"videos": [["1.png", "2.png"]]}, [part(["1.png", "2.png"]), text("what?")]),
        ("vqa", QUESTION | {"videos": "a.gif"}, [part("a.gif"), text("what?")]),
        ("vqa", QUESTION | {"video": []}, [part([]), text("what?")]),
        ("vqa", QUESTION | {"video": None}, [text("what?")]),
        ("vqa", QUESTION | {"image": "i.png", "video": "a.mp4"}, [{"type": "image"}, part("a.mp4"), text("what?")]),
        ("captions", {"caption": "x", "video": "a.mp4"}, [part("a.mp4"), text("Describe the video.")]),
        ("captions", {"text": "x", "file_name": "a.webm"}, [part("a.webm"), text("Describe the video.")]),
        (
            "captions",
            {"text": "x", "file_names": ["i.gif", "a.mkv"]},
            [{"type": "image"}, part("a.mkv"), text("Describe the image.")],
        ),
        ("texts", {"texts": [{"user": "what?", "assistant": "x"}], "videos": ["a"]}, [part("a"), text("what?")]),
        (
            "prompt-completion",
            {"prompt": "what?", "completion": "x", "video": "a.mp4"},
            [part("a.mp4"), text("what?")],
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "x"}], "video": "a"},
            [part("a"), text("what?")],
        ),
        (
            "messages",
            {"messages": [ask(PLACE, part("b"), PLACE | {"path": "c"}), assistant("x")], "videos": ["a"]},
            [part("a"), part("b"), part("c")],
        ),
        (
            "messages",
            {"messages": [ask(PLACE | {"video": ["1.png"], "fps": 2}, "q"), assistant("x")]},
            [part({"frames": ["1.png"], "fps": 2}), text("q")],
        ),
        (
            "llava",
            {
                "conversations": [
                    {"from": "human", "value": "<video>\nwhat?<image>"},
                    {"from": "gpt", "value": "<video>"},
                ],
                "video": "a.mp4",
                "image": "i.png",
            },
            [part("a.mp4"), text("what?"), {"type": "image"}],
        ),
        (
            "llava",
            {
                "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "x"}],
                "video": "a.mp4",
            },
            [part("a.mp4"), text("what?")],
        ),
    ],
)
def test_formats(name, row, content):
    assert recognise_format(list(row), "data").name == name
    messages, images = find_format(name).convert(row)
    assert messages[0] == {"role": "user", "content": content}
    assert len(images) == content.count({"type": "image"})
    assert messages[1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [ask(PLACE), assistant("x")]},
            "the row has 0 videos, but 1 placeholders for videos: give one video for each placeholder.",
        ),
        (
            {"messages": [ask(part("b"), "q"), assistant("x")], "videos": ["a"]},
            "the row has 2 videos, but 1 placeholders for videos: give one video for each placeholder.",
        ),
        (
            {"messages": [ask("q"), assistant("x")], "video": "a", "videos": ["b"]},
            "the row has videos in 'videos' and in 'video': use one of these fields.",
        ),
        (
            {"messages": [ask("q"), assistant("x")], "video": "a", "file_name": "b.mp4"},
            "the row has videos in 'video' and in 'file_name': use one of these fields.",
        ),
        (
            {"messages": [ask(part("a") | {"max_pixels": 5}), assistant("x")]},
            "messages[0].content[0] has the field 'max_pixels', which would be lost: set options for all videos in the "
            "processor of the model.",
        ),
        (
            {"messages": [ask(part("a.mp4") | {"fps": 5}), assistant("x")]},
            "messages[0].content[0] has `fps`, which is the frame rate of a video that is a list of frames, but its "
            "video is 'a.mp4': set the number of frames per second to read in the processor of the model.",
        ),
    ],
)
def test_rows_that_do_not_fit_the_format(row, reason):
    with pytest.raises(RowFault) as raised:
        FORMATS["messages"].convert(row)
    assert raised.value.reason == reason


# ------------------------------------------------------------------------------------------------ validation


def pixels(data, processor, **kwargs) -> torch.Tensor:
    return VisionLanguageCollator(processor)(list(load_rows(data, **kwargs)))["pixel_values_videos"]


@pytest.mark.parametrize("streaming", [False, True])
def test_forms_of_videos(folder, processor, streaming):
    """Every form of a video gives the same frames."""
    array = np.stack([np.asarray(frame) for frame in frames()])
    expected = processor(text="<video>", videos=array, return_tensors="pt")["pixel_values_videos"]
    paths = [f"{number}.png" for number in range(6)]
    lists = [paths, {"frames": paths, "fps": 1}, {"frames": array.tolist()}, [{"path": path} for path in paths]]
    in_lines = write_lines(folder / "forms.jsonl", [QUESTION | {"video": video} for video in lists])
    assert torch.equal(pixels(in_lines, processor, streaming=streaming), torch.cat([expected] * 4))
    columns = {
        "PIL images": (List(List(datasets.Image())), [frames()]),
        "bytes": (
            List(List(datasets.Image())),
            [[{"bytes": (folder / p).read_bytes(), "path": "lost"} for p in paths]],
        ),
        "array": (List(datasets.Array4D((6, 8, 8, 3), "uint8")), [array]),
        "floats": (List(datasets.Array4D((6, 8, 8, 3), "float32")), [array / np.float32(255)]),
    }
    for feature, videos in columns.values():
        features = Features({"question": Value("string"), "answer": Value("string"), "videos": feature})
        data = Dataset.from_list([QUESTION | {"videos": videos}], features=features)
        assert torch.equal(pixels(data, processor, streaming=streaming), expected)


def test_files_and_the_video_feature(folder, processor):
    """A file by its path, by its bytes, and in a column of `datasets` that would decode it."""
    expected = processor(text="<video>", videos=str(folder / "a.gif"), return_tensors="pt")["pixel_values_videos"]
    assert len(expected) == 3  # one per second
    path = write_lines(folder / "files.jsonl", [QUESTION | {"video": "a.gif"}])
    (row,) = load_rows(path)
    assert row["videos"] == [{"path": str(folder / "a.gif"), "bytes": None, "frames": None, "fps": None}]
    assert torch.equal(pixels(path, processor), expected)
    features = Features({"question": Value("string"), "answer": Value("string"), "video": datasets.Video()})
    for video in (str(folder / "a.gif"), {"bytes": (folder / "a.gif").read_bytes(), "path": "a"}):
        data = Dataset.from_list([QUESTION | {"video": video}], features=features)
        assert torch.equal(pixels(data, processor), expected)
        for streaming in (False, True):
            data.to_parquet(folder / "a.parquet")
            assert torch.equal(pixels(folder / "a.parquet", processor, streaming=streaming), expected)


def test_dark_frames_of_floats_are_dark():
    """Their values are up to 1, but those of the other frames are up to 255."""
    video = np.zeros((3, 8, 8, 3), dtype=np.float32)
    video[0], video[1] = 200, 1
    source = sources.video_source(video, 0, None)
    assert [frame.getpixel((0, 0)) for frame in source["frames"]] == [(200, 200, 200), (1, 1, 1), (0, 0, 0)]
    assert read_video(video, "v", FrameSampling(3, 1.0)).frames[:, 0, 0, 0].tolist() == [200, 1, 0]
    assert read_video(list(video), "v", FrameSampling(3, 1.0)).frames[:, 0, 0, 0].tolist() == [200, 1, 0]
    grey = list(video[..., 0])
    assert read_video(grey, "v", FrameSampling(3, 1.0)).frames[:, 0, 0].tolist() == [[200] * 3, [1] * 3, [0] * 3]


@pytest.mark.parametrize(
    ("video", "kind", "reason"),
    [
        ("none.gif", "missing file", "videos[0]: there is no file '{folder}/none.gif'."),
        (["0.png", "none.png"], "missing file", "videos[0], frame 1: there is no file '{folder}/none.png'."),
        (["0.png", "red.png"], "broken video", "videos[0] has frames of different sizes [(8, 8), (20, 24)]: resize"),
        (["0.png", "forms.txt"], "broken image", "videos[0], frame 1 ({folder}/forms.txt) cannot be read as an image"),
        ("broken.gif", "broken video", "videos[0] ({folder}/broken.gif) cannot be read as a video"),
        ([], "wrong type", "videos[0] has no frames: give at least one, or drop the row."),
        ({"frames": []}, "wrong type", "videos[0] has no frames"),
        ({"frames": ["0.png"], "fps": 0}, "wrong type", "videos[0]['fps'] must be a number of more than 0, but got 0."),
        (
            {"frames": ["0.png"], "fps": "2"},
            "wrong type",
            "videos[0]['fps'] must be a number of more than 0, but got '2'",
        ),
        ({"frames": ["0.png"], "path": "a"}, "wrong type", "videos[0] has the field 'path' besides `frames`: remove"),
        (
            5,
            "wrong type",
            "videos[0] must be a path, bytes, or a dict with one of them, or a list of frames, but got 5.",
        ),
        ("https://a.b/c.mp4", "wrong type", "videos[0] is the URL 'https://a.b/c.mp4': download the video, and give"),
        ([[1, 2]], "broken video", "videos[0], frame 0 cannot be read: images[0] is not an image"),
        ([[[1, 2], [3]]], "broken video", "videos[0]"),
        ([[[300000]]], "broken video", "videos[0], frame 0 cannot be read: images[0] has values from 300000 to 300000"),
    ],
)
def test_broken_videos(folder, video, kind, reason):
    (folder / "forms.txt").write_text("no image")
    (folder / "broken.gif").write_bytes(b"GIF89a")
    path = write_lines(folder / "broken.jsonl", [QUESTION | {"video": "a.gif"}, QUESTION | {"video": video}])
    with pytest.raises(BadRowError) as raised:
        load_rows(path)
    assert (raised.value.row, raised.value.kind) == (1, kind)
    assert raised.value.reason.startswith(reason.format(folder=folder))
    report = check_data(path)
    assert report.bad_rows == {kind: 1}
    assert report.as_dict()["videos_per_row"] == {"1": 1}
    assert "videos per row: 1: 1 row\n" in str(report)
    for streaming in (False, True):
        rows = list(load_rows(path, on_bad_row="skip", streaming=streaming, skipped_file=folder / "skipped.jsonl"))
        assert [row["row"] for row in rows] == [0]


def test_reports_without_videos_do_not_mention_them(folder):
    report = check_data(Dataset.from_list([QUESTION]))
    assert "video" not in str(report)
    assert "videos_per_row" not in report.as_dict()


def test_typed_video_tokens(folder):
    for token in ("<video>", "<|video_pad|>", "<|video|>"):
        with pytest.raises(BadRowError, match=r"messages\[0\] contains the video token .*'type': 'video'") as raised:
            load_rows(Dataset.from_list([QUESTION | {"question": f"a {token}"}]))
        assert raised.value.kind == "typed video token"


def test_a_missing_decoder_is_not_a_bad_row(folder, monkeypatch):
    monkeypatch.setattr(video_reading, "is_av_available", lambda: False)
    monkeypatch.setattr(video_reading, "is_cv2_available", lambda: False)
    (folder / "a.mp4").write_bytes(b"video")
    path = write_lines(folder / "mp4.jsonl", [QUESTION | {"video": "a.mp4"}])
    for streaming in (False, True):
        with pytest.raises(ImportError, match=r"videos\[0\] \(.*a.mp4\) needs a package that decodes videos"):
            list(load_rows(path, on_bad_row="skip", streaming=streaming))
    with pytest.raises(ImportError, match="needs a package that decodes videos"):
        VisionLanguageCollator(make_processor())([{"messages": [ask(part("a.mp4")), assistant("x")]}])


# ------------------------------------------------------------------------------------------------ limits


def test_limits_count_the_tokens_of_videos(folder, processor):
    """Three frames of 4 tokens, and an image."""
    path = write_lines(folder / "limits.jsonl", [QUESTION | {"video": "a.gif", "image": "red.png"}])
    (row,) = load_rows(path, processor=processor, max_image_tokens=16)
    with pytest.raises(BadRowError) as raised:
        load_rows(path, processor=processor, max_image_tokens=15)
    assert raised.value.reason == (
        "the row has 16 image tokens in 1 images and 1 videos, more than `max_image_tokens` (15): increase "
        "`max_image_tokens`, use fewer or smaller images, let the processor read fewer frames of videos, or drop the "
        "row."
    )
    (size,) = VisionLanguageCollator(processor, max_image_tokens_per_batch=16)([row]).row_sizes
    assert (size.images, size.videos, size.image_tokens) == (1, 1, 16)
    assert "images: 1, videos: 1, image tokens: 16" in str(size)
    with pytest.raises(ValueError, match="the batch has 16 image tokens, more than `max_image_tokens_per_batch`"):
        VisionLanguageCollator(processor, max_image_tokens_per_batch=15)([row])
    assert "video" not in str(RowSize("r", 5, 1, 4))
    assert "video" not in find_excess(RowSize("r", 5, 1, 4), None, 3).reason


# ------------------------------------------------------------------------------------------------ batches


def test_places_are_filled():
    row = {
        "messages": [ask(PLACE, part("b"), PLACE, "q"), assistant("x")],
        "videos": ["a", None, {"frames": ["1.png"]}],
    }
    content = with_images(row, 0)[0]["content"]
    assert content == [part("a"), part("b"), part({"frames": ["1.png"]}), text("q")]
    with pytest.raises(ValueError, match=r"row 3 has 1 videos in `videos`, but 2 placeholders .* 'video' that do not"):
        with_images(row | {"videos": ["a"]}, 3)
    with pytest.raises(ValueError, match=r"row 3: `videos` must be a list of videos, got <class 'str'>"):
        with_images(row | {"videos": "a"}, 3)


def test_batches_with_and_without_videos(folder, processor):
    rows = [
        QUESTION | {"video": "a.gif", "image": "red.png"},
        QUESTION | {"video": None, "image": None},
        QUESTION | {"video": {"frames": ["0.png", "1.png"], "fps": 0.5}, "image": None},
    ]
    rows = list(load_rows(write_lines(folder / "batch.jsonl", rows)))
    batch = VisionLanguageCollator(processor)(rows)
    singles = [VisionLanguageCollator(processor)([row]) for row in rows]
    assert [text_of(processor, single).count("[4]") for single in singles] == [3, 0, 2]
    assert "<0.0 seconds>[4]<2.0 seconds>[4]what?" in text_of(processor, singles[2])
    assert torch.equal(
        batch["pixel_values_videos"],
        torch.cat([single["pixel_values_videos"] for single in singles if "pixel_values_videos" in single]),
    )
    for number, single in enumerate(singles):
        length = single["input_ids"].shape[1]
        for name in ("input_ids", "labels", "mm_token_type_ids"):
            assert torch.equal(batch[name][number, :length], single[name][0])
    model = make_model()
    losses = [model(**single).loss for single in singles]
    counts = torch.tensor([(single["labels"] >= 0).sum() for single in singles])
    torch.testing.assert_close(model(**batch).loss, (torch.stack(losses) * counts).sum() / counts.sum())


def test_workers_decode_videos(folder, processor):
    path = write_lines(folder / "workers.jsonl", [QUESTION | {"video": "a.gif"}] * 4)
    collator = VisionLanguageCollator(processor)
    for streaming in (False, True):
        rows = load_rows(path, streaming=streaming)
        batches = list(DataLoader(rows, batch_size=2, num_workers=2, collate_fn=collator))
        assert [tuple(batch["pixel_values_videos"].shape) for batch in batches] == [(6, 3, 16, 16)] * 2


def test_videos_that_vanish_after_validation(folder):
    """The policy for bad rows applies, as for images."""
    for name in ("lost.gif", "lost.png"):
        (folder / name).write_bytes((folder / "a.gif").read_bytes())
    videos = ["a.gif", "lost.gif", ["0.png"], ["lost.png"]]
    path = write_lines(folder / "vanish.jsonl", [QUESTION | {"video": video} for video in videos])
    strict, lenient = load_rows(path), load_rows(path, on_bad_row="skip", skipped_file=folder / "skipped.jsonl")
    (folder / "lost.gif").unlink()
    (folder / "lost.png").unlink()
    assert strict[0]["row"] == 0
    for number, reason in (
        (1, r"row 1: videos\[0\]: there is no file"),
        (3, r"row 3: videos\[0\], frame 0: there is no"),
    ):
        with pytest.raises(BadRowError, match=reason) as raised:
            strict[number]
        assert raised.value.kind == "missing file"
    with pytest.raises(BadRowError, match="row 1"):
        strict.__getitems__([0, 1])
    assert [row["row"] for row in lenient.__getitems__([0, 1, 2, 3])] == [0, 2]
    (row,) = lenient.__getitems__([1])
    assert isinstance(row, RepeatedRow)
    assert [row["row"] for row in lenient] == [0, 2]
    assert len(strict["videos"]) == 4


def test_packed_rows_have_the_loss_of_padded_rows(folder, processor):
    model = make_model()
    rows = [
        QUESTION | {"video": "a.gif", "answer": "the cat"},
        QUESTION | {"answer": "the mat"},
        QUESTION | {"image": "red.png", "video": ["0.png", "1.png"], "answer": "the image"},
    ]
    rows = list(load_rows(write_lines(folder / "packed.jsonl", rows)))
    packed = VisionLanguageCollator(processor, packing=True, model=model)(rows)
    padded = VisionLanguageCollator(processor)(rows)
    assert len(packed["input_ids"]) < 3
    assert len(packed["pixel_values_videos"]) == len(padded["pixel_values_videos"])
    torch.testing.assert_close(model(**packed).loss, model(**padded).loss)
    without = make_model(video_token_id=None)
    with pytest.raises(ValueError, match="returns `pixel_values_videos`, which packing does not know"):
        VisionLanguageCollator(processor, packing=True, model=without)(rows)


def test_blank_images_are_not_added_to_videos(folder, processor):
    row = {"messages": [ask(PLACE, "q"), assistant("x")], "videos": [frames(2)]}
    batch = VisionLanguageCollator(processor, blank_images=True)([row])
    assert len(batch["input_ids"]) == 1
    assert "pixel_values" not in batch


def test_preferences_have_the_videos_of_their_row(processor):
    row = {"prompt": [ask(PLACE, "q")], "chosen": [assistant("x")], "rejected": [assistant("y")], "videos": [frames(2)]}
    batch = PreferenceCollator(processor)([row])
    assert batch["pixel_values_videos"].shape == (4, 3, 16, 16)


def test_processors_without_videos(folder):
    row = {"messages": [ask(part(frames(2))), assistant("x")]}
    llava = LlavaProcessor(
        make_image_processor(), make_tokenizer(), chat_template="{% generation %}{% endgeneration %}"
    )
    with pytest.raises(ValueError, match="row 0 cannot be processed: there is a video, but LlavaProcessor takes no"):
        VisionLanguageCollator(llava)([row])
    with pytest.raises(ValueError, match="content parts must be of type 'text' or 'image', got 'video'"):
        VisionLanguageCollator(make_image_processor_only())([row])


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_answers_rows_with_videos(folder, processor, tmp_path):
    model = speak_printably(make_model())
    model.generation_config.suppress_tokens.append(VIDEO)
    path = write_lines(
        folder / "eval.jsonl", [QUESTION | {"video": "a.gif"}, QUESTION, QUESTION | {"video": ["5.png", "4.png"]}]
    )
    rows = load_rows(path)
    assert [row["num_images"] for row in texts_of_rows(rows)] == [1, 0, 1]
    assert all("videos" not in row for row in texts_of_rows(rows))
    result = evaluate_rows(model, processor, rows, ["exact_match"], tmp_path, max_new_tokens=3, blind=True)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    for row, line in zip(rows, lines, strict=True):
        (answer,) = generate_answers(model, processor, [row], max_new_tokens=3)
        assert line["prediction"] == answer
    assert ["prediction_without_images" in line for line in lines] == [True, False, True]
    assert result.blind is not None
    blind = without_images(rows[0])
    assert blind["videos"] == []
    assert [part["type"] for part in blind["messages"][0]["content"]] == ["text"]


# ------------------------------------------------------------------------------------------------ other processors


class SomeKwargs(TypedDict, total=False):
    do_sample_frames: bool
    fps: float
    min_frames: int


class SomeVideoProcessor:
    """Chooses every second frame, like a video processor of Transformers."""

    valid_kwargs = SomeKwargs
    do_sample_frames, fps, size = True, 3.0, 5

    def __init__(self):
        self.calls = []

    def sample_frames(self, metadata, **kwargs):
        self.calls.append((metadata.total_num_frames, metadata.fps, kwargs))
        return torch.arange(1, metadata.total_num_frames, 2)


class SomeProcessor(ProcessorMixin):
    video_token = "<video>"

    def __init__(self):
        self.video_processor = SomeVideoProcessor()


def test_video_processors_of_other_models_choose_the_frames(folder):
    """They get the frames that they choose, for every form of a video, and all frames if there is no rate."""
    processor = SomeProcessor()
    listed = {"frames": [str(folder / f"{number}.png") for number in range(4)]}
    conversations = [
        [ask(part(str(folder / "a.gif")), "q"), {"role": "assistant", "content": "x"}],
        [ask({"type": "video", "path": str(folder / "a.gif")}, part(listed)), {"role": "assistant", "tool_calls": []}],
        [ask(part(listed | {"fps": 2.0})), assistant("x")],
    ]
    given = copy.deepcopy(conversations)
    read, options = read_videos(processor, conversations)
    assert conversations == given
    metadata = options["videos_kwargs"].pop("video_metadata")
    assert options == {"videos_kwargs": {"do_sample_frames": False}}
    assert [item.frames_indices for item in metadata] == [[1, 3, 5], [1, 3, 5], [0, 1, 2, 3], [1, 3]]
    assert [item.fps for item in metadata] == [2.0, 2.0, None, 2.0]
    options = {"do_sample_frames": True, "fps": 3.0, "min_frames": None}
    assert processor.video_processor.calls == [(6, 2.0, options), (6, 2.0, options), (4, 2.0, options)]
    videos = [part["video"] for messages in read for part in messages[0]["content"] if part["type"] == "video"]
    for video, item in zip(videos, metadata, strict=True):
        assert video.shape == (len(item.frames_indices), 8, 8, 3)
        assert np.abs(video[:, 0, 0].astype(int) - [COLORS[index] for index in item.frames_indices]).max() <= 1
    assert read[0][0]["content"][1] == text("q")
    assert [messages[1] for messages in read] == [messages[1] for messages in given]
    assert set(read[1][0]["content"][0]) == {"type", "video"}
    processor.video_processor.do_sample_frames = False
    _, options = read_videos(processor, conversations[:1])
    assert options["videos_kwargs"]["video_metadata"][0].frames_indices == list(range(6))
    with pytest.raises(ValueError, match=r"videos\[1\], frame 0 cannot be read"):
        read_videos(processor, [[ask(part(str(folder / "a.gif")), part([str(folder / "none.png")]))]])
    without = [[ask("q"), {"role": "assistant", "content": "x"}]]
    assert read_videos(processor, without) == (without, {})
