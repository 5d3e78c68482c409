"""Videos are read as frames with their times, and the model encodes the frames like images."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor
from modeling_sparse_moe_vlm import video_reading as reading
from modeling_sparse_moe_vlm.video_decoding import is_animation
from modeling_sparse_moe_vlm.video_reading import FrameSampling, metadata_of, read_video, split_videos
from tests.support.models import IMAGE_TOKEN_ID, TEXT_CONFIG, VISION_CONFIG
from tests.support.processors import IMAGE_SEQ_LENGTH, VOCAB_SIZE, make_image, make_image_processor, make_tokenizer

VIDEO = VOCAB_SIZE  # id of the video token
FRAMES = np.random.default_rng(0).integers(0, 256, (10, 20, 24, 3), dtype=np.uint8)


def make_processor(**kwargs) -> SparseMoeVlmProcessor:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<video>"]}, replace_extra_special_tokens=False)
    options = {"image_seq_length": IMAGE_SEQ_LENGTH, "video_token": "<video>"} | kwargs
    return SparseMoeVlmProcessor(make_image_processor(), tokenizer, **options)


def make_config(text=None, **fields) -> SparseMoeVlmConfig:
    text = TEXT_CONFIG | {"vocab_size": VOCAB_SIZE + 1, "modalities": ["text", "image", "video"]} | (text or {})
    options = {"image_token_id": IMAGE_TOKEN_ID, "video_token_id": VIDEO} | fields
    return SparseMoeVlmConfig(text_config=text, vision_config=VISION_CONFIG, **options)


def make_model(**kwargs) -> SparseMoeVlmForConditionalGeneration:
    torch.manual_seed(0)
    return SparseMoeVlmForConditionalGeneration(make_config(**kwargs)).eval()


def text_of(processor, inputs, row: int = 0) -> str:
    return processor.decode(inputs["input_ids"][row]).replace("<video>" * IMAGE_SEQ_LENGTH, "[4]")


@pytest.fixture(scope="module")
def processor() -> SparseMoeVlmProcessor:
    return make_processor()


# ------------------------------------------------------------------------------------------------ frames


@pytest.mark.parametrize(
    ("total", "fps", "options", "expected"),
    [
        (10, None, {}, [0, 2, 5, 7]),
        (3, None, {}, [0, 1, 2]),
        (10, 4.0, {}, [0, 5]),  # two and a half seconds, at one frame per second
        (10, 4.0, {"fps": 2.0}, [0, 2, 5, 7]),  # five frames would be too many
        (10, 4.0, {"fps": 2.0, "max_frames": 5}, [0, 2, 4, 6, 8]),
        (10, 4.0, {"fps": 2.0, "max_frames": 2}, [0, 5]),
        (10, 4.0, {"fps": 100.0, "max_frames": 20}, list(range(10))),
        (3, 24.0, {}, [0]),  # shorter than a second
        (10, 4.0, {"num_frames": 5}, [0, 2, 4, 6, 8]),  # more than `max_frames`
        (3, None, {"num_frames": 5}, [0, 1, 2]),
        (6, 4.0, {"num_frames": 2, "do_sample": False}, list(range(6))),
        (6, 4.0, {"do_sample": False}, list(range(6))),
    ],
)
def test_sampled_frames(total, fps, options, expected):
    sampling = FrameSampling(**{"max_frames": 4, "fps": 1.0} | options)
    video = read_video(np.arange(total, dtype=np.uint8)[:, None, None, None].repeat(3, 3), "v", sampling, {"fps": fps})
    assert video.frames[:, 0, 0, 0].tolist() == expected
    assert video.metadata.frames_indices == expected
    assert video.metadata.fps == fps
    assert video.metadata.total_num_frames == len(expected)


def test_times_of_frames_that_were_chosen_before():
    given = VideoMetadata(total_num_frames=100, fps=10.0, frames_indices=list(range(0, 100, 10)))
    video = read_video(FRAMES, "v", FrameSampling(2, 100.0), given)
    assert video.metadata.timestamps == [0.0, 5.0]
    for number in (3, 11):
        with pytest.raises(ValueError, match=f"v has 10 frames, but `frames_indices` has {number} entries"):
            read_video(FRAMES, "v", FrameSampling(2, 1.0), {"fps": 1, "frames_indices": list(range(number))})
    whole = read_video(FRAMES, "v", FrameSampling(2, 100.0), VideoMetadata(total_num_frames=10, fps=10.0))
    assert whole.metadata.timestamps == [0.0, 0.5]
    assert read_video(FRAMES, "v", FrameSampling(2, 1.0), {"fps": 0}).metadata.fps is None


def test_forms_of_videos(processor, tmp_path):
    images = [Image.fromarray(frame) for frame in FRAMES]
    paths = [str(tmp_path / f"{number}.png") for number in range(10)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    expected = processor(text="<video>", videos=FRAMES, return_tensors="pt")
    assert torch.equal(
        expected["pixel_values_videos"], make_image_processor()(images, return_tensors="pt")["pixel_values"]
    )
    tensor = torch.tensor(FRAMES)
    for form in (tensor, tensor.permute(0, 3, 1, 2), FRAMES / 255, list(FRAMES), images, FRAMES[None], [[paths]]):
        actual = processor(text="<video>", videos=form, return_tensors="pt")
        assert torch.equal(actual["input_ids"], expected["input_ids"])
        assert torch.equal(actual["pixel_values_videos"], expected["pixel_values_videos"])


def test_animations(processor, tmp_path):
    """The frames have different colours, and 250 ms each."""
    colours = [(40 * number, 255 - 40 * number, 0) for number in range(6)]
    frames = [Image.new("RGB", (8, 8), colour) for colour in colours]
    for name, options in (
        ("a.webp", {"lossless": True}),
        ("a.png", {}),
        ("a.apng", {"format": "PNG"}),
        ("a.GIF", {}),
    ):
        path = tmp_path / name
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=250, **options)
        assert is_animation(path.read_bytes())
        for source in (path, path.read_bytes()):
            video = read_video(source, "v", FrameSampling(32, 2.0))
            assert video.metadata.timestamps == [0.0, 0.5, 1.0]
            assert np.abs(video.frames[:, 0, 0].astype(int) - np.array(colours[::2])).max() <= 1
    frames[0].save(tmp_path / "still.png")
    assert read_video(tmp_path / "still.png", "v", FrameSampling(32, 2.0)).frames.shape == (1, 8, 8, 3)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "transparent.png")
    assert (read_video(tmp_path / "transparent.png", "v", FrameSampling(1, 1.0)).frames == 255).all()
    assert not is_animation(b"RIFF\x00\x00\x00\x00AVI LIST")


def test_files_are_decoded_by_the_library(monkeypatch):
    def load_video(path, backend, sample_indices_fn):
        metadata = VideoMetadata(total_num_frames=10, fps=0.0 if "without_rate" in path else 2.0)
        metadata.frames_indices = sample_indices_fn(metadata=metadata)
        if "lost" in path:
            raise OSError("404")
        return FRAMES[metadata.frames_indices][: 3 if "cut" in path else None], metadata

    monkeypatch.setattr(reading, "load_video", load_video)
    monkeypatch.setattr(reading, "is_av_available", lambda: False)
    monkeypatch.setattr(reading, "is_cv2_available", lambda: False)
    with pytest.raises(ImportError, match=r"videos\[0\] \(a.mp4\) needs a package .* `pip install av`"):
        make_processor()(text="<video>", videos="a.mp4")
    monkeypatch.setattr(reading, "is_cv2_available", lambda: True)
    video = read_video("a.mp4", "v", FrameSampling(32, 1.0))
    assert video.metadata.timestamps == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert np.array_equal(video.frames, FRAMES[::2])
    assert read_video("without_rate.mp4", "v", FrameSampling(2, 1.0)).metadata.fps is None
    with pytest.raises(ValueError, match="only 3 of 5 frames can be decoded: the file is cut off"):
        read_video("https://cut.mp4", "v", FrameSampling(32, 1.0))
    with pytest.raises(ValueError, match="v cannot be read as a video: OpenCV only reads files: run `pip install av`"):
        read_video(b"no animation", "v", FrameSampling(32, 1.0))
    backends = []
    monkeypatch.setattr(
        reading, "load_video", lambda *args, **kwargs: backends.append(kwargs["backend"]) or load_video(*args, **kwargs)
    )
    monkeypatch.setattr(reading, "is_av_available", lambda: True)
    for url in ("https://example.org/a.gif", "https://example.org/a.mp4"):  # only files are decoded here
        assert np.array_equal(read_video(url, "v", FrameSampling(32, 1.0)).frames, FRAMES[::2])
    with pytest.raises(ValueError, match=r"v \(https://lost.mp4\) cannot be read as a video: 404"):
        read_video("https://lost.mp4", "v", FrameSampling(32, 1.0))
    assert backends == ["pyav"] * 3


def test_frames_of_different_types_are_read_one_by_one():
    """Values of a float image are up to 1, even if another frame has values up to 255."""
    frames = [np.full((8, 8, 3), 200, dtype=np.uint8), np.ones((8, 8, 3), dtype=np.float32)]
    assert read_video(frames, "v", FrameSampling(2, 1.0)).frames[:, 0, 0, 0].tolist() == [200, 255]


def test_nested_videos():
    a, b = FRAMES, FRAMES[:2]
    for videos, expected in (
        ("a.mp4", ["a.mp4"]),
        (["a.mp4", "b.mp4"], ["a.mp4", "b.mp4"]),
        ([["a.mp4"], [], None, ["b.mp4", "c.mp4"]], ["a.mp4", "b.mp4", "c.mp4"]),
        ([[["1.png", "2.png"]]], [["1.png", "2.png"]]),
        (Path("a.mp4"), [Path("a.mp4")]),
        ([b"a", [Path("b.mp4"), {"path": "c.mp4"}]], [b"a", Path("b.mp4"), {"path": "c.mp4"}]),
    ):
        assert split_videos(videos) == expected
    for videos in ([a, b], [[a], [b]], [[a, b]]):
        assert [video.shape for video in split_videos(videos)] == [a.shape, b.shape]
    for frames in (list(a), list(a[..., 0])):  # in colours and in grey
        assert [len(video) for video in split_videos(frames)] == [10]
        assert [len(video) for video in split_videos([frames, frames[:2]])] == [10, 2]
    metadata = {"fps": 1.0}
    assert metadata_of(metadata, 1) == metadata_of([[metadata]], 1) == [metadata]
    assert metadata_of(None, 2) == [None, None]
    with pytest.raises(ValueError, match=r"one entry per video \(2\), but has 1"):
        metadata_of(metadata, 2)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([np.zeros((9, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)], r"videos\[0\] has frames of different sizes"),
        (np.zeros((0, 4, 5, 3), np.uint8), r"videos\[0\] has no frames"),
        (FRAMES[0], r"`videos` is not a video, but an array of shape \(20, 24, 3\): .* with 4 dimensions"),
        ([None, torch.zeros(2, 3)], r"videos\[1\] is not a video, but an array of shape \(2, 3\)"),
        (5, r"`videos` is not a video, but of type <class 'int'>: pass a path"),
        ([5], r"videos\[0\] is not a video, but of type <class 'int'>"),
        ({"frames": FRAMES, "fps": -3}, r"`fps` of `videos\[0\]` must be a number of at least 0, got -3"),
        ({"frames": FRAMES, "fps": ""}, r"`fps` of `videos\[0\]` must be a number of at least 0, got ''"),
        ({"frames": FRAMES, "fps": float("nan")}, r"`fps` of `videos\[0\]` must be a number .* got nan"),
        ([["nothing.gif", "a"]], r"videos\[0\]"),
        (np.full((2, 8, 8), 3.7)[..., None], r"videos\[0\], frame 0 cannot be read: images\[0\] has values"),
    ],
)
def test_videos_that_cannot_be_read(processor, video, message):
    with pytest.raises((ValueError, ImportError), match=message):
        processor(text="<video>", videos=video)


def test_videos_belong_to_their_texts(processor):
    rule = "the number of <video> tokens in the prompts should be the same as the number of videos passed: "
    a, b = FRAMES[:2], FRAMES[:3]
    for texts, videos, message in (
        (["<video>", "<video><video>"], [[a, b], [a]], r"text\[0\] has 1 tokens, but 2 videos."),
        (["<video>", "none"], [None, a], r"text\[0\] has 1 tokens, but 0 videos."),
        (["<video>"], [[a], []], r"`videos` is for 2 texts, but `text` has 1."),
    ):
        with pytest.raises(ValueError, match=rule + message):
            processor(text=texts, videos=videos, padding=True)
    inputs = processor(text=["none", "<video><video>"], videos=[None, [a, b]], padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == VIDEO).sum(dim=1).tolist() == [0, 5 * IMAGE_SEQ_LENGTH]
    for none in ([], [[]], [None]):
        assert sorted(processor(text="none", videos=none)) == ["attention_mask", "input_ids", "mm_token_type_ids"]
    flat = processor(text=["<video>", "<video><video>"], videos=[a, b, a], padding=True, return_tensors="pt")
    assert (flat["input_ids"] == VIDEO).sum(dim=1).tolist() == [2 * IMAGE_SEQ_LENGTH, 5 * IMAGE_SEQ_LENGTH]


def test_wrong_options(processor):
    with pytest.raises(ValueError, match="`video_fps` must be more than 0, got 0"):
        processor(text="<video>", videos=FRAMES, fps=0)
    with pytest.raises(ValueError, match=r"`fps` of `videos\[0\]` must be a number of at least 0, got '1'"):
        processor._get_num_multimodal_tokens(video_sizes=[(4, 8, 8)], video_metadata={"fps": "1"})
    for options, message in (
        ({"max_frames": 0}, "`max_frames` must be an integer of at least 1, got 0"),
        ({"video_fps": 0}, "`video_fps` must be more than 0"),
        ({"video_temporal_pooling": 0}, "`video_temporal_pooling` must be an integer of at least 1"),
        ({"video_token": "<image>"}, "`video_token` must be a token .* other than the image token"),
        (
            {"video_token": "<|im_start|>", "row_separator": "<|im_start|>"},
            "other than the image token and the separator",
        ),
        ({"video_token": "<vid>"}, "`video_token` must be a token of the vocabulary .* got '<vid>'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_processor(**options)
    with pytest.raises(ValueError, match="`num_frames` must be an integer of at least 1, got 0"):
        processor(text="<video>", videos=FRAMES, num_frames=0)
    for text, videos in (("<video>", [FRAMES, FRAMES]), ("none", FRAMES), ("<video><video>", FRAMES)):
        count = text.count("<video>")
        with pytest.raises(
            ValueError, match=rf"number of <video> tokens .* {count} tokens, but {len(split_videos(videos))}"
        ):
            processor(text=text, videos=videos)
    with pytest.raises(ValueError, match=r"neither `videos` nor `audio`.*`video_token`"):
        make_processor(video_token=None)(text="<video>", videos=FRAMES)


# ------------------------------------------------------------------------------------------------ tokens


def test_tokens_of_a_video(processor):
    inputs = processor(text="a<video>b", videos=FRAMES, video_metadata={"fps": 4.0}, fps=2.0, return_tensors="pt")
    assert sorted(inputs) == ["attention_mask", "input_ids", "mm_token_type_ids", "pixel_values_videos"]
    assert text_of(processor, inputs) == (
        "a<0.0 seconds>[4]<0.5 seconds>[4]<1.0 seconds>[4]<1.5 seconds>[4]<2.0 seconds>[4]b"
    )
    assert torch.equal(inputs["mm_token_type_ids"], 2 * (inputs["input_ids"] == VIDEO))
    frames = [Image.fromarray(frame) for frame in FRAMES[::2]]
    expected = make_image_processor()(frames, return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values_videos"], expected)
    unknown = processor(text="<video>", videos=FRAMES, videos_kwargs={"num_frames": 2}, return_tensors="pt")
    assert text_of(processor, unknown) == "<frame 1>[4]<frame 6>[4]"
    assert text_of(processor, processor(text="<video>", videos=FRAMES[:1])) == "<frame 1>[4]"
    both = {"video_metadata": {"fps": 4.0}, "videos_kwargs": {"num_frames": 2}, "do_sample_frames": None}
    assert text_of(processor, processor(text="<video>", videos=FRAMES, **both)) == "<0.0 seconds>[4]<1.2 seconds>[4]"
    with pytest.raises(ValueError, match="there are 0 tokens, but 1 videos"):
        processor(text=[5], videos=FRAMES)
    with_metadata = processor(text="<video>", videos=FRAMES, num_frames=2, return_metadata=True, return_tensors="pt")
    assert torch.equal(with_metadata["pixel_values_videos"], unknown["pixel_values_videos"])


def test_pooled_frames_repeat_the_last_one():
    processor = make_processor(video_temporal_pooling=2)
    inputs = processor(text="<video>", videos=FRAMES[:5], video_metadata={"fps": 1.0}, return_tensors="pt")
    assert text_of(processor, inputs) == "<0.0 seconds>[4]<2.0 seconds>[4]<4.0 seconds>[4]"
    pixels = inputs["pixel_values_videos"]
    assert pixels.shape == (6, 3, 16, 16)
    assert torch.equal(pixels[5], pixels[4])
    assert not torch.equal(pixels[4], pixels[3])


def test_frames_of_three_rows(processor):
    """Their height is not mistaken for channels."""
    frames = FRAMES[:2, :3]
    pixels = processor(text="<video>", videos=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
    images = processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels["pixel_values_videos"], images)


def test_padded_frames():
    frames = FRAMES[:2, :10]
    pixels = make_processor(do_pad=True)(text="<video>", videos=frames, return_tensors="pt")["pixel_values_videos"]
    images = make_processor(do_pad=True)(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
    assert torch.equal(pixels, images["pixel_values"])
    assert (pixels[:, :, 7:] == 0).all()
    of_call = make_processor()(text="<video>", videos=frames, do_pad=True, return_tensors="pt")
    assert torch.equal(of_call["pixel_values_videos"], pixels)


def test_videos_and_images_in_one_batch_and_typed_tokens(processor):
    conversation = [
        {"role": "user", "content": [
            {"type": "video", "video": FRAMES}, {"type": "image", "image": make_image()},
            {"type": "text", "text": "<video> <image>?"},
        ]}
    ]  # fmt: skip
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for sanitize in (True, False):
        inputs = processor.apply_chat_template(
            conversation, **kwargs, sanitize_control_tokens=sanitize, processor_kwargs={"num_frames": 3}
        )
        assert (inputs["input_ids"] == VIDEO).sum() == 3 * IMAGE_SEQ_LENGTH
        assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum() == IMAGE_SEQ_LENGTH
    assert inputs["pixel_values_videos"].shape == (3, 3, 16, 16)
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    without = make_processor(video_token=None)
    with pytest.raises(Exception, match="content parts must be of type 'text' or 'image', got 'video'"):
        without.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_options_are_stored_in_the_checkpoint(tmp_path):
    options = {"video_token": "<video>", "max_frames": 7, "video_fps": 0.5, "video_temporal_pooling": 2}
    make_processor(**options).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert {name: saved[name] for name in options} == options
    reloaded = SparseMoeVlmProcessor.from_pretrained(tmp_path)
    assert reloaded.video_token_id == VIDEO
    frames = np.repeat(FRAMES, 2, axis=0)
    assert (
        text_of(reloaded, reloaded(text="<video>", videos=frames))
        == "<frame 1>[4]<frame 6>[4]<frame 12>[4]<frame 18>[4]"
    )
    assert "pixel_values_videos" in reloaded.model_input_names
    assert not hasattr(make_processor(video_token=None), "video_processor")


# ------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("pooling", [1, 2])
def test_frames_are_encoded_like_images_and_averaged(pooling):
    model = make_model(video_temporal_pooling=pooling)
    pixels = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        images = torch.stack(model.get_image_features(pixels).pooler_output)
        videos = model.get_video_features(pixels).pooler_output
        nested = model.get_video_features(pixels[None]).pooler_output
    expected = images.view(4 // pooling, pooling, IMAGE_SEQ_LENGTH, -1).mean(dim=1)
    assert len(videos) == 4 // pooling
    torch.testing.assert_close(torch.stack(videos), expected)
    torch.testing.assert_close(torch.stack(nested), expected)
    assert model.get_video_features(pixels[:0]).pooler_output == []
    if pooling == 2:
        with pytest.raises(ValueError, match=r"has 3 frames, but `video_temporal_pooling` \(2\) must divide"):
            model.get_video_features(pixels[:3])


def test_hidden_states_and_attentions_of_the_tower():
    model, pixels = make_model(video_temporal_pooling=2), torch.randn(2, 3, 16, 16)
    model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = model.model.vision_tower(pixels, **wanted)
        found = [model.get_image_features(pixels, **wanted), model.get_video_features(pixels, **wanted)]
    assert [len(expected.hidden_states), len(expected.attentions)] == [2, 1]
    for outputs in found:
        for name in ("last_hidden_state", "hidden_states", "attentions"):
            torch.testing.assert_close(outputs[name], expected[name])


def test_videos_replace_their_tokens(processor):
    model = make_model()
    inputs = processor(text="a<video><image>", videos=FRAMES, images=make_image(), num_frames=2, return_tensors="pt")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    is_video = inputs["input_ids"] == VIDEO
    is_image = inputs["input_ids"] == IMAGE_TOKEN_ID
    with torch.no_grad():
        logits = model(**inputs).logits
        videos = model.get_video_features(inputs["pixel_values_videos"])
        images = model.get_image_features(inputs["pixel_values"])
        embeds[is_video] = torch.cat(videos.pooler_output)
        embeds[is_image] = torch.cat(images.pooler_output)
        merged = model(
            inputs_embeds=embeds, mm_token_type_ids=inputs["mm_token_type_ids"], attention_mask=inputs["attention_mask"]
        )
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        given = model(**tokens, mm_encoder_outputs={"image": images, "video": videos})
        blind = model(**tokens, mm_encoder_outputs={}).logits
    torch.testing.assert_close(merged.logits, logits)
    torch.testing.assert_close(given.logits, logits)
    assert not torch.allclose(blind, logits)


def test_generation_with_beams_equals_single_rows(processor):
    model = make_model()
    texts, videos = ["a<video>", "b", "<video>c<video>"], [FRAMES[:3], FRAMES[3:5], FRAMES[5:]]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 2}
    batch = processor(text=texts, videos=[[videos[0]], [], videos[1:]], padding=True, return_tensors="pt")
    together = model.generate(**batch, **options)[:, -3:]
    for row, own in enumerate(([videos[0]], None, videos[1:])):
        single = processor(text=texts[row], videos=own, return_tensors="pt")
        assert torch.equal(model.generate(**single, **options)[0, -3:], together[row])


def test_videos_have_their_own_experts(processor):
    groups = [
        {"name": "words", "num_experts": 2, "modalities": ["text"]},
        {"name": "images", "num_experts": 2, "modalities": ["image"]},
        {"name": "videos", "num_experts": 3, "modalities": ["video"]},
    ]
    model = make_model(text={"expert_groups": groups, "num_experts": None, "num_experts_per_tok": 1})
    inputs = processor(text="a<video><image>", videos=FRAMES, images=make_image(), num_frames=2, return_tensors="pt")
    with torch.no_grad():
        chosen = model(**inputs, output_router_logits=True).router_indices
    ids = inputs["mm_token_type_ids"].flatten()
    for layer in chosen:
        for modality, experts in enumerate(({0, 1}, {2, 3}, {4, 5, 6})):
            assert set(layer[ids == modality].flatten().tolist()) <= experts


def test_errors_of_the_model(processor):
    model = make_model()
    inputs = processor(text="a<video>", videos=FRAMES, num_frames=2, return_tensors="pt")
    pixels = inputs.pop("pixel_values_videos")
    with pytest.raises(
        ValueError, match=r"has video placeholders, but there are no videos: pass the `pixel_values_videos`"
    ):
        model(**inputs)
    with pytest.raises(
        ValueError, match=r"Video features and video tokens do not match: tokens: 8, features: 4. .* frame"
    ):
        model(**inputs, pixel_values_videos=pixels[:1])
    with pytest.raises(ValueError, match="cannot specify both `pixel_values_videos` and `mm_encoder_outputs`"):
        model(**inputs, pixel_values_videos=pixels, mm_encoder_outputs={})
    with pytest.raises(ValueError, match=r"`mm_encoder_outputs\['video'\]` must be what `get_video_features` returns"):
        model(**inputs, mm_encoder_outputs={"video": pixels})
    with pytest.raises(ValueError, match=r"has the key 'clip', but the only ones .* are 'image' and 'video'"):
        model(**inputs, mm_encoder_outputs={"clip": pixels})
    without = make_model(video_token_id=None)
    with pytest.raises(ValueError, match="the model reads no videos: its configuration has no `video_token_id`"):
        without(**inputs, pixel_values_videos=pixels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": {"modalities": ["text", "image"]}}, "`video_token_id` needs 'video' in `text_config.modalities`"),
        ({"video_token_id": 1000}, "`video_token_id` must be an integer from 0 to 280, got 1000"),
        ({"video_token_id": IMAGE_TOKEN_ID}, "`video_token_id` .3. is also `image_token_id`"),
        ({"video_token_id": 0}, "`video_token_id` .0. is also `text_config.pad_token_id`"),
        ({"video_temporal_pooling": 0}, "`video_temporal_pooling` must be an integer of at least 1, got 0"),
        ({"modality_encoders": {"video": {"model_type": "vit", "token_id": 5}}}, "exclude each other"),
    ],
)
def test_invalid_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


def test_the_configuration_and_the_library(tmp_path):
    config = make_config(video_temporal_pooling=2)
    assert config.placeholder_ids == {1: IMAGE_TOKEN_ID, 2: VIDEO}
    config.save_pretrained(tmp_path)
    reloaded = SparseMoeVlmConfig.from_pretrained(tmp_path)
    assert (reloaded.video_token_id, reloaded.video_temporal_pooling) == (VIDEO, 2)
    metadata = VideoMetadata(total_num_frames=10, fps=4.0, frames_indices=[0, 6])
    assert metadata.timestamps == [0.0, 1.5]
    assert default_sample_indices_fn(metadata, num_frames=4).tolist() == [0, 2, 5, 7]


# ------------------------------------------------------------------------------------------------ numbers of tokens


def test_any_length_rate_and_budget():
    """The first frame is read, the frames are in order, evenly spread, and as many as the budget and the rate say."""
    rng = random.Random(0)
    for _ in range(3000):
        total, fps = rng.randint(1, 20_000), rng.choice([None, rng.randint(1, 120)])
        rate, budget, number = rng.randint(1, 30), rng.randint(1, 256), rng.choice([None, None, rng.randint(1, 300)])
        sampling = FrameSampling(budget, float(rate), number)
        expected = number or min(budget, total if fps is None else max(1, total * rate // fps))
        expected = min(expected, total)
        indices = sampling.indices(VideoMetadata(total_num_frames=total, fps=fps)).tolist()
        assert indices == [i * total // expected for i in range(expected)]
        assert indices[0] == 0
        assert indices == sorted(set(indices))
        assert indices[-1] < total
        assert sampling.num_read(total, fps, "v") == expected


@pytest.mark.parametrize("pooling", [1, 2, 3])
def test_number_of_tokens_is_known_before(pooling):
    """It is the number of video tokens that the processor writes. The text of the times is not counted."""
    processor = make_processor(video_temporal_pooling=pooling, max_frames=5)
    lengths, rng = [1, 2, 3, 5, 6, 31], random.Random(0)
    videos = [np.full((length, 8, 8, 3), 9, dtype=np.uint8) for length in lengths]
    sizes = [video.shape[:3] for video in videos]
    for options in (
        {},
        {"num_frames": 4},
        {"do_sample_frames": False},
        {"video_metadata": [{"fps": rng.choice([1.0, 2.5, 10.0])} for _ in lengths]},
        {"video_metadata": [{"fps": rng.choice([1.0, 2.5, 10.0])} for _ in lengths], "fps": 3.0},
        {"videos_kwargs": {"num_frames": 3}},
    ):
        counted = processor._get_num_multimodal_tokens(video_sizes=sizes, **copy.deepcopy(options))
        inputs = processor(
            text=["<video>"] * 6, videos=[[v] for v in videos], padding=True, return_tensors="pt", **options
        )
        assert counted.num_video_tokens == (inputs["mm_token_type_ids"] == 2).sum(dim=1).tolist()
        assert counted.num_image_tokens is None
        assert sum(counted.num_video_tokens) * pooling == len(inputs["pixel_values_videos"]) * IMAGE_SEQ_LENGTH
    both = processor._get_num_multimodal_tokens(image_sizes=[(9, 9)], video_sizes=[(7, 8, 8)])
    assert (both.num_image_tokens, both.num_image_patches) == ([IMAGE_SEQ_LENGTH], [1])
    assert both.num_video_tokens == [-(-5 // pooling) * IMAGE_SEQ_LENGTH]
    with pytest.raises(ValueError, match=r"videos\[1\] has no frames"):
        processor._get_num_multimodal_tokens(video_sizes=[(1, 8, 8), (0, 8, 8)])
    with pytest.raises(ValueError, match=r"one entry per video \(1\), but has 2"):
        processor._get_num_multimodal_tokens(video_sizes=[(1, 8, 8)], video_metadata=[{"fps": 1}] * 2)
    with pytest.raises(ValueError, match="the processor takes no videos: it has no `video_token`"):
        make_processor(video_token=None)._get_num_multimodal_tokens(video_sizes=[(1, 8, 8)])


def test_frames_as_dicts(processor):
    """As in rows of data: with the frame rate, and keys that are `None`."""
    given = {"frames": list(FRAMES), "fps": 4.0, "path": None, "bytes": None}
    expected = processor(text="<video>", videos=FRAMES, video_metadata={"fps": 4.0}, fps=2.0, return_tensors="pt")
    for videos in (given, [given], [[given]], given | {"bytes": b"no video"}):
        actual = processor(text="<video>", videos=videos, fps=2.0, return_tensors="pt")
        assert torch.equal(actual["input_ids"], expected["input_ids"])
        assert torch.equal(actual["pixel_values_videos"], expected["pixel_values_videos"])
    with pytest.raises(
        ValueError, match=r"videos\[0\] must have `path`, `bytes` or `frames`, but its keys are \['fps'\]"
    ):
        processor(text="<video>", videos={"fps": 1.0, "path": None})
