"""The processor: combines the chat template, the tokenizer and the image processor, and adds modality ids."""

from __future__ import annotations

from .versions import SUPPORTED_TRANSFORMERS  # noqa: F401

# isort: split

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import AddedToken, BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .chat_template import DEFAULT_CHAT_TEMPLATE
from .checks import MAX_WIDTH, check, check_choice, check_integer
from .control_tokens import ControlTokens, as_schemas, check_encodable, control_tokens
from .conversation_checks import check_conversation, check_numbers, messages_of
from .image_reading import CHANNELS_LAST, read_images
from .image_tiles import TILE_OPTIONS, Tiling, cut_into_tiles, num_tiles, size_of, tile_size_of
from .native_sizes import NATIVE_OPTIONS, NativeSizing, native_sizing
from .processor_arguments import SparseMoeVlmProcessorKwargs
from .video_reading import FrameSampling, Video, metadata_of, numbers_of_videos, read_video, split_videos

if TYPE_CHECKING:
    # Never executed. Older releases of Transformers only copy the files that this file imports, see `versions`.
    from .image_patches import to_patches  # noqa: F401
    from .video_decoding import Decoded  # noqa: F401


class SparseMoeVlmProcessor(ProcessorMixin):
    r"""
    Converts text, images and conversations to model inputs.

    A text contains one image token per image, which the processor expands to `image_seq_length` tokens per tile. By
    default, an image is one tile: it is resized to the size that the vision tower takes. With `max_tiles` > 1, it is
    resized to a grid of tiles instead, whose aspect ratio is close to that of the image, and a thumbnail of the whole
    image follows. With `image_sizing="native"`, it keeps its size, up to the limits on its number of tokens, and is
    only rounded to whole tokens. The number of tokens depends only on the size of the image.

    In conversations (see [`SparseMoeVlmProcessor.apply_chat_template`]), only content parts of type `"image"` are
    images, and only the chat template can add control tokens: special tokens typed inside a text are tokenized as plain
    text.

    Images can be PIL images, paths, URLs, base64 strings, bytes, arrays or tensors, in any mode. They are converted to
    RGB PIL images that look the way an image viewer shows them: rotated according to their EXIF orientation, with
    transparent areas on a white background, and with 16-bit and float values scaled to 8 bits.

    Args:
        image_processor (`BaseImageProcessor`):
            The image processor of the vision tower.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of the decoder. Its vocabulary must contain the image token.
        image_seq_length (`int`, *optional*, defaults to 49):
            Number of tokens per tile. Set it to `config.image_seq_length`. With `image_sizing="native"`, the default
            of `max_image_tokens`, and the number of tokens of a frame of a video.
        chat_template (`str`, *optional*):
            Jinja template for conversations. Defaults to a ChatML template.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            Placeholder token of an image in the text.
        min_tiles (`int`, *optional*, defaults to 1):
            Smallest number of tiles of an image, the thumbnail excluded.
        max_tiles (`int`, *optional*, defaults to 1):
            Largest number of tiles of an image, the thumbnail excluded.
        max_image_tokens (`int`, *optional*):
            Largest number of tokens of one image, the thumbnail and the separators included. Images get fewer tiles
            or become smaller if necessary.
        do_pad (`bool`, *optional*, defaults to `False`):
            Whether images keep their aspect ratio when they are resized. The remaining area, at the bottom or on the
            right, has the mean colour of the image processor (zeros). Otherwise, images are stretched.
        row_separator (`str`, *optional*):
            A token of the vocabulary that follows every row of tiles, or with `image_sizing="native"` every row of
            image tokens. The thumbnail has none.
        video_token (`str`, *optional*):
            Placeholder token of a video in the text, with the id `config.video_token_id`. Without it, there are no
            videos.
        max_frames (`int`, *optional*, defaults to 32):
            Largest number of frames of a video. Longer videos are sampled evenly.
        video_fps (`float`, *optional*, defaults to 1.0):
            Number of frames per second of video, if its frame rate is known.
        video_temporal_pooling (`int`, *optional*, defaults to 1):
            Number of consecutive frames whose tokens the model averages. Set it to `config.video_temporal_pooling`.
        image_sizing (`str`, *optional*, defaults to `"fixed"`):
            `"fixed"` for tiles of one size, or `"native"` for images of different sizes. Set it to
            `config.image_sizing`.
        patch_size (`int`, *optional*):
            Side of a patch in pixels, for `image_sizing="native"`.
        merge_size (`int`, *optional*):
            Number of patches along the side of a token, for `image_sizing="native"`.
        min_image_tokens (`int`, *optional*, defaults to 1):
            Smallest number of tokens of one image, for `image_sizing="native"`. Smaller images are enlarged, as far as
            `max_image_tokens` allows.

    `min_tiles`, `max_tiles`, `min_image_tokens`, `max_image_tokens` and `do_pad` can also be passed per call.

    Raises:
        ValueError: If the vocabulary does not contain the image token or the separator, or if an option for the size of
            images is invalid.

    ```python
    >>> processor = SparseMoeVlmProcessor(image_processor, tokenizer, **config.image_arguments)
    >>> inputs = processor(text="<image> What is this?", images=image, return_tensors="pt")
    >>> sorted(inputs)
    ['attention_mask', 'input_ids', 'mm_token_type_ids', 'pixel_values']
    ```
    """

    valid_processor_kwargs = SparseMoeVlmProcessorKwargs
    return_mm_token_type_ids = True

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 49,
        chat_template: str | None = None,
        image_token: str = "<image>",
        min_tiles: int = 1,
        max_tiles: int = 1,
        max_image_tokens: int | None = None,
        do_pad: bool = False,
        row_separator: str | None = None,
        video_token: str | None = None,
        max_frames: int = 32,
        video_fps: float = 1.0,
        video_temporal_pooling: int = 1,
        image_sizing: str = "fixed",
        patch_size: int | None = None,
        merge_size: int | None = None,
        min_image_tokens: int = 1,
    ):
        tokens = {"image_token": image_token, "row_separator": row_separator, "video_token": video_token}
        for field, token in tokens.items():
            check(isinstance(token, str | None), f"`{field}` must be a token, got {token!r}.")
        if image_token not in tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizer's vocabulary lacks the image token {image_token!r}: add it with "
                f"`tokenizer.add_special_tokens({{'extra_special_tokens': [{image_token!r}]}}, "
                "replace_extra_special_tokens=False)`, or choose an existing token with `image_token`. After you add a "
                "token, set its id in the model's configuration and resize the embeddings if they are too few:\n"
                f"    model.config.image_token_id = tokenizer.convert_tokens_to_ids({image_token!r})\n"
                "    if len(tokenizer) > model.get_input_embeddings().num_embeddings:\n"
                "        model.resize_token_embeddings(len(tokenizer))"
            )
        check_integer("image_seq_length", image_seq_length, at_most=MAX_WIDTH)
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = _make_special(tokenizer, image_token)
        self.min_tiles = min_tiles
        self.max_tiles = max_tiles
        self.max_image_tokens = max_image_tokens
        self.do_pad = do_pad
        check_choice("image_sizing", image_sizing, ("fixed", "native"))
        self.image_sizing = image_sizing
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.min_image_tokens = min_image_tokens
        self.row_separator = row_separator
        if row_separator is not None:
            check(
                row_separator in tokenizer.get_vocab() and row_separator != image_token,
                f"`row_separator` must be a token of the vocabulary other than the image token, got {row_separator!r}: "
                f"add it with `tokenizer.add_special_tokens({{'extra_special_tokens': [{row_separator!r}]}}, "
                "replace_extra_special_tokens=False)`.",
            )
            _make_special(tokenizer, row_separator)
        self.max_frames = max_frames
        self.video_fps = video_fps
        self.video_temporal_pooling = video_temporal_pooling
        FrameSampling(max_frames, video_fps)  # checks the options
        check_integer("video_temporal_pooling", video_temporal_pooling)
        self.video_token = video_token
        if video_token is not None:
            check(
                video_token in tokenizer.get_vocab() and video_token not in (image_token, row_separator),
                f"`video_token` must be a token of the vocabulary other than the image token and the separator, got "
                f"{video_token!r}: add it with `tokenizer.add_special_tokens({{'extra_special_tokens': "
                f"[{video_token!r}]}}, replace_extra_special_tokens=False)`.",
            )
            self.video_token_id = _make_special(tokenizer, video_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or DEFAULT_CHAT_TEMPLATE)
        self._layout({})  # checks the options
        self._last_control_tokens: tuple[Any, ControlTokens] | None = None
        self._control_tokens(self._template(None) or "")  # prepares the tokenizer

    @property
    def video_processor(self) -> Any:
        """The image processor, which also processes the frames of videos. Missing if the processor takes no videos."""
        if self.video_token is None:
            raise AttributeError("the processor takes no videos: it has no `video_token`.")
        return self.image_processor

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs that the processor can return."""
        names = [*super().model_input_names, "mm_token_type_ids"]
        if self.image_sizing == "native":
            # Those of image processors that cut images into patches themselves have other names.
            names = [name for name in names if name not in ("pixel_attention_mask", "spatial_shapes")]
            names.append("image_grid_thw")
        if self.video_token is not None:
            names.append("pixel_values_videos")
        return [*dict.fromkeys(names)]

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """
        Converts texts with images and videos to model inputs. See the class for the forms of images.

        Args:
            images (`Any`, *optional*):
                The images: see [`SparseMoeVlmProcessor.prepare_inputs_layout`].
            text (`str` or `list[str]`, *optional*):
                The texts, with one image token per image and one video token per video.
            videos (`Any`, *optional*):
                A video, a list of videos, or a list of lists of videos, one per text: see
                [`~video_reading.split_videos`]. Long videos are sampled to at most `max_frames` frames.
            audio (`Any`, *optional*):
                Not supported.
            kwargs (`Any`):
                Arguments of the tokenizer and the image processor, options for tiles and, for videos, `num_frames`,
                `fps`, `do_sample_frames` and `video_metadata` (a dict with `fps` for every video that is given as
                frames).

        Returns:
            `BatchFeature`: The model inputs.

        Raises:
            ValueError: As [`SparseMoeVlmProcessor.prepare_inputs_layout`] does, if a video cannot be read, or if the
                number of videos differs from the number of video tokens, in total or in a text.
        """
        if videos is not None and self.video_token is not None:
            options = _pop_video_options(kwargs)
            read = self._read_videos(videos, options)
            if text is not None:
                texts = [text] if isinstance(text, str) else list(text)
                num_tokens = [row.count(self.video_token) if isinstance(row, str) else 0 for row in texts]
                check_numbers(numbers_of_videos(videos), num_tokens, self.video_token, "videos")
            videos = [video.frames for video in read] or None
            kwargs["videos_kwargs"] = options | {"video_metadata": [video.metadata for video in read]}
        return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _read_videos(self, videos: Any, options: dict[str, Any]) -> list[Video]:
        """Returns the frames of videos. Removes the options of sampling from `options`."""
        sampling = self._pop_sampling(options)
        sources = split_videos(videos)
        metadata = metadata_of(options.pop("video_metadata", None), len(sources))
        return [
            read_video(source, f"videos[{number}]", sampling, own)
            for number, (source, own) in enumerate(zip(sources, metadata, strict=True))
        ]

    def _pop_sampling(self, options: dict[str, Any]) -> FrameSampling:
        """Returns which frames are read, according to the options of the call, and removes them from these."""
        fps = options.pop("fps", None)
        return FrameSampling(
            self.max_frames,
            self.video_fps if fps is None else fps,
            options.pop("num_frames", None),
            options.pop("do_sample_frames", None) is not False,
        )

    @property
    def unused_input_names(self) -> list[str]:
        """Names of outputs that the model does not use and the processor therefore drops."""
        return ["token_type_ids", "tile_grids", "video_metadata"]

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """
        Reads and checks the images (see `image_reading.read_images`), and converts single inputs to lists.

        Args:
            images (`Any`, *optional*):
                An image, a list of images in the order of the image tokens, or a list with one entry per text: an
                image, a list of images, or `None`.
            text (`str` or `list[str]`, *optional*):
                The texts.
            videos (`Any`, *optional*):
                The frames of the videos.
            audio (`Any`, *optional*):
                Not supported.
            kwargs (`Any`):
                Other arguments of the call, such as `images_kwargs`.

        Returns:
            `tuple`: The inputs in the format of [`~transformers.ProcessorMixin.prepare_inputs_layout`].

        Raises:
            ValueError: If there are videos or audio, if a text is empty or contains lone surrogates, if an image cannot
                be read or is absurdly large, or if the number of images differs from the number of image tokens. The
                message names the text or the image.
        """
        if audio is not None or (videos is not None and self.video_token is None):
            raise ValueError(
                "the processor accepts images and text, but neither `videos` nor `audio`. For videos, set its "
                "`video_token`, and `video_token_id` of the model's configuration."
            )
        rows = None
        if text is not None:
            rows = list(text) if isinstance(text, Sequence) and not isinstance(text, str) else [text]
            for position, row in enumerate(rows):
                if not isinstance(row, str) or not row:
                    raise ValueError(f"`text` must be non-empty strings, but text[{position}] is {row!r}.")
                check_encodable(row, f"text[{position}]")
            if not rows:
                raise ValueError("`text` is empty: pass at least one string.")
        if images is not None:
            options = kwargs | (kwargs.get("images_kwargs") or {})
            do_rescale = options.get("do_rescale")
            if do_rescale is None:
                do_rescale = getattr(self.image_processor, "do_rescale", True)
            images = read_images(images, options.get("input_data_format"), do_rescale)
        if rows is not None:
            check_numbers(images or [], [row.count(self.image_token) for row in rows], self.image_token)
        if images is not None:
            flat = [image for row in images for image in (row if isinstance(row, list) else [row])]
            if rows is None and any(image is None for image in flat):
                raise ValueError(
                    "`images` contains None, which stands for a text without images, but there is no `text`: pass "
                    "`text`, or remove None."
                )
            images = [image for image in flat if image is not None] or None
        return super().prepare_inputs_layout(images=images, text=rows, videos=videos, **kwargs)

    def _process_images(self, images, **kwargs):
        # The images that were read have the channels last, regardless of the format of the user's arrays.
        kwargs.pop("input_data_format", None)
        if any(not hasattr(image, "mode") for image in images):
            kwargs["input_data_format"] = CHANNELS_LAST
        tiling = self._layout(kwargs)
        if isinstance(tiling, NativeSizing):
            processed = tiling.cut_into_patches(images, self.image_processor, kwargs)
            return processed, [self.replace_image_token(processed, i) for i in range(len(images))]
        if tiling.tile_size is None:
            options = {name: value for name, value in kwargs.items() if name not in TILE_OPTIONS}
            return super()._process_images(images, **options)
        # The size of tiles is an option of the image processor.
        options = {name: value for name, value in kwargs.items() if name not in (*TILE_OPTIONS, "size", "crop_size")}
        return_tensors = options.pop("return_tensors", None)
        grids = [tiling.grid_of(*size_of(image)) for image in images]
        tiles = torch.cat(
            [
                cut_into_tiles(image, grid, tiling, self.image_processor, options)
                for image, grid in zip(images, grids, strict=True)
            ]
        )
        pixels: Any = tiles
        if return_tensors != "pt":
            pixels = list(tiles.cpu().numpy())
        processed = BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)
        processed["tile_grids"] = grids
        return processed, [self.replace_image_token(processed, i) for i in range(len(images))]

    def _process_videos(self, videos, video_metadata, **kwargs):
        options = {name: value for name, value in kwargs.items() if name not in ("do_pad", "return_metadata")}
        options |= {"return_tensors": "pt", "input_data_format": CHANNELS_LAST}
        tiling = self._layout({"max_tiles": 1, "do_pad": kwargs.get("do_pad")})
        pixels = []
        for frames in videos:
            frames = [*frames, *[frames[-1]] * (-len(frames) % self.video_temporal_pooling)]
            if isinstance(tiling, NativeSizing):
                side = math.isqrt(self.image_seq_length)
                grid = (side, side)
                pixels += [tiling.resize(frame, grid, self.image_processor, options)[None] for frame in frames]
            elif tiling.tile_size is None:
                pixels.append(self.image_processor(frames, **options)["pixel_values"])
            else:
                pixels += [cut_into_tiles(frame, (1, 1), tiling, self.image_processor, options) for frame in frames]
        processed = BatchFeature({"pixel_values_videos": list(torch.cat(pixels).cpu().numpy())})
        processed = BatchFeature(processed.data, tensor_type=kwargs.get("return_tensors"))
        processed["video_metadata"] = video_metadata
        return processed, [self.replace_video_token(processed, i) for i in range(len(videos))]

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        """
        Returns the text that replaces one video token: for every frame, or for every group of frames that the model
        averages, the time of its first frame and the video token, repeated `image_seq_length` times.
        """
        metadata = video_inputs["video_metadata"][video_idx]
        if metadata.fps is None:
            names = [f"<frame {index + 1}>" for index in metadata.frames_indices]
        else:
            names = [f"<{seconds:.1f} seconds>" for seconds in metadata.timestamps]
        names = names[:: self.video_temporal_pooling]
        return "".join(f"{name}{str(self.video_token) * self.image_seq_length}" for name in names)

    def _layout(self, kwargs: dict[str, Any]) -> Tiling | NativeSizing:
        """Returns how images become tokens, according to the options of the call and of the processor."""
        given = {name: kwargs[name] for name in (*TILE_OPTIONS, *NATIVE_OPTIONS) if kwargs.get(name) is not None}
        if self.image_sizing == "native":
            return native_sizing(self, given, kwargs)
        check(
            self.min_image_tokens == 1 and "min_image_tokens" not in given,
            '`min_image_tokens` needs `image_sizing="native"`: images of a fixed size have `image_seq_length` tokens '
            "per tile.",
        )
        options: dict[str, Any] = {name: getattr(self, name) for name in TILE_OPTIONS}
        options["do_pad"] = options["do_pad"] or bool(getattr(self.image_processor, "do_pad", False))
        options |= given
        if "min_tiles" not in given and "max_tiles" in given and isinstance(given["max_tiles"], int):
            # A call with fewer tiles than usual.
            options["min_tiles"] = max(1, min(options["min_tiles"], given["max_tiles"]))
        has_one_size = options["max_tiles"] != 1 or options["do_pad"]
        return Tiling(
            tile_size=tile_size_of(self.image_processor, kwargs) if has_one_size else None,
            tokens_per_tile=self.image_seq_length,
            has_separators=self.row_separator is not None,
            **options,
        )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """
        Returns the text that replaces one image token: the image token, repeated `image_seq_length` times for every
        tile, with the separators of the rows of tiles. With `image_sizing="native"`, it is repeated as often as the
        size of the image needs, with the separators of the rows of image tokens.
        """
        if self.merge_size is not None and "image_grid_thw" in image_inputs:
            _, height, width = (int(side) for side in image_inputs["image_grid_thw"][image_idx])
            rows, columns = height // self.merge_size, width // self.merge_size
            return (self.image_token * columns + (self.row_separator or "")) * rows
        tile = self.image_token * self.image_seq_length
        rows, columns = image_inputs["tile_grids"][image_idx] if "tile_grids" in image_inputs else (1, 1)
        if (rows, columns) == (1, 1):
            return tile
        return (tile * columns + (self.row_separator or "")) * rows + tile

    def tile_grid(self, height: int, width: int, **kwargs) -> tuple[int, int]:
        """
        Returns the grid of tiles of an image. If there are several tiles, the thumbnail of the image follows them.

        Args:
            height (`int`):
                Height of the image, rotated upright.
            width (`int`):
                Width of the image.
            kwargs (`Any`):
                Arguments of the call that can change the grid, such as `max_tiles`.

        Returns:
            `tuple[int, int]`: Number of rows and of columns of tiles. Images of native sizes have one tile.

        Raises:
            ValueError: If an option is invalid, or if the image cannot have as few tokens as `max_image_tokens`.
        """
        layout = self._layout_of_call(kwargs)
        return (1, 1) if isinstance(layout, NativeSizing) else layout.grid_of(height, width)

    def token_grid(self, height: int, width: int, **kwargs) -> tuple[int, int]:
        """
        Returns the grid of image tokens of an image with a native size, or of one tile.

        Args:
            height (`int`):
                Height of the image, rotated upright.
            width (`int`):
                Width of the image.
            kwargs (`Any`):
                Arguments of the call that can change the grid, such as `max_image_tokens`.

        Returns:
            `tuple[int, int]`: Number of rows and of columns of tokens.

        Raises:
            ValueError: If an option is invalid.
        """
        layout = self._layout_of_call(kwargs)
        side = math.isqrt(self.image_seq_length)
        return layout.grid_of(height, width) if isinstance(layout, NativeSizing) else (side, side)

    def _layout_of_call(self, kwargs: dict[str, Any]) -> Tiling | NativeSizing:
        return self._layout(self._merge_kwargs(self.valid_processor_kwargs, **kwargs)["images_kwargs"])

    def _get_num_multimodal_tokens(
        self, image_sizes: list[list[int]] | None = None, video_sizes: list[list[int]] | None = None, **kwargs
    ) -> MultiModalData:
        """
        Returns the number of tokens that replace the image tokens of images of the given sizes (separators of rows
        included), and their numbers of rows of `pixel_values` (tiles or patches). They depend only on the size of each
        image. Also returns the number of video tokens of videos, without the times of their frames.

        Args:
            image_sizes (`list[list[int]]`, *optional*):
                Height and width of each image.
            video_sizes (`list[list[int]]`, *optional*):
                Number of frames, height and width of each video.
            kwargs (`Any`):
                Other arguments of the call, such as `max_tiles` or `video_metadata`, the frame rates of the videos.

        Returns:
            `MultiModalData`: The number of tokens and of tiles or patches of each image, and the number of tokens of
            each video.

        Raises:
            ValueError: If an option is invalid, if an image cannot have as few tokens as `max_image_tokens`, or if the
                processor takes no videos or a video has no frames.
        """
        options = _pop_video_options(kwargs)
        data: dict[str, Any] = {}
        if video_sizes is not None:
            check(self.video_token is not None, "the processor takes no videos: it has no `video_token`.")
            sampling = self._pop_sampling(options)
            metadata = metadata_of(options.get("video_metadata"), len(video_sizes))
            groups = [
                -(-sampling.num_read(size[0], (own or {}).get("fps"), f"videos[{i}]") // self.video_temporal_pooling)
                for i, (size, own) in enumerate(zip(video_sizes, metadata, strict=True))
            ]
            data["num_video_tokens"] = [number * self.image_seq_length for number in groups]
        if image_sizes is None:
            return MultiModalData(**data)
        layout = self._layout_of_call(kwargs)
        grids = [layout.grid_of(*size) for size in image_sizes]
        num_rows = layout.num_patches if isinstance(layout, NativeSizing) else num_tiles
        return MultiModalData(
            num_image_tokens=[layout.num_tokens(grid) for grid in grids],
            num_image_patches=[num_rows(grid) for grid in grids],
            **data,
        )

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """
        Applies a chat template to a conversation: see [`~transformers.ProcessorMixin.apply_chat_template`].

        Control tokens typed in messages (of any role), in roles, in `tools` and in `documents` are kept as plain text,
        with and without `tokenize`. Control tokens are the special tokens and, except in messages of the assistant, the
        added tokens that look like control tokens: those in `tokenizer.chat_control_tokens` if it is set, otherwise
        those in the template and those in brackets (`<think>`). Other template variables are rendered unchanged.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                The messages of one conversation or of several conversations.
            chat_template (`str`, *optional*):
                A template or the name of one of the processor's templates. Defaults to the processor's template.
            kwargs (`Any`):
                Other arguments of [`~transformers.ProcessorMixin.apply_chat_template`], and
                `sanitize_control_tokens` (`bool`, *optional*, defaults to `True`): whether to keep typed control tokens
                as plain text. With `False`, only typed image tokens are kept as plain text.

        Returns:
            `str`, `list[str]` or `BatchFeature`: The rendered conversation, or with `tokenize=True` the
            token ids, or with `return_dict=True` all model inputs.

        Raises:
            ValueError: If the conversation is empty or does not consist of messages, or if a text contains lone
                surrogates or a control token that the tokenizer cannot encode as plain text. The message names the
                text.
        """
        conversation = messages_of(conversation)
        check_conversation(conversation, parts=bool(kwargs.get("tokenize")))
        template = self._template(chat_template) or chat_template or ""
        tokens = self._control_tokens(template, kwargs.pop("sanitize_control_tokens", True))
        if kwargs.get("tools"):
            kwargs["tools"] = tokens.as_text(as_schemas(kwargs["tools"]), "tools")
        if kwargs.get("documents"):
            kwargs["documents"] = tokens.as_text(kwargs["documents"], "documents")
        # Other templates do not use this variable. It would be passed to the tokenizer as an argument.
        if "image_token" in template:
            kwargs.setdefault("image_token", self.image_token)
        if self.video_token is not None and "video_token" in template:
            kwargs.setdefault("video_token", self.video_token)
        return super().apply_chat_template(tokens.as_text(conversation, "conversation"), chat_template, **kwargs)

    def _template(self, name: str | None) -> str | None:
        """Returns the processor's template with this name, or `None` if there is none."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        return named.get(name or "default")

    def _control_tokens(self, template: str, sanitize: bool = True) -> ControlTokens:
        placeholders = [token for token in (self.image_token, self.video_token) if token is not None]
        tokens = control_tokens(self.tokenizer, template, self.image_token) if sanitize else (placeholders, [])
        key = (id(self.tokenizer), tokens)
        if self._last_control_tokens is None or self._last_control_tokens[0] != key:
            self._last_control_tokens = (key, ControlTokens(self.tokenizer, *tokens))
        return self._last_control_tokens[1]


def _pop_video_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Removes the options for videos from the arguments of a call, and returns them."""
    names = ("num_frames", "fps", "do_sample_frames", "video_metadata")
    return dict(kwargs.pop("videos_kwargs", None) or {}) | {name: kwargs.pop(name) for name in names if name in kwargs}


def _make_special(tokenizer: Any, token: str) -> int:
    """Makes a token of the vocabulary a special token that the tokenizer finds in texts. Returns its id."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    known = tokenizer.added_tokens_decoder.get(token_id)
    if known is None or known.normalized or not known.special:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=True)], special_tokens=True)
    return token_id


SparseMoeVlmProcessor.register_for_auto_class()

__all__ = ["SparseMoeVlmProcessor"]
