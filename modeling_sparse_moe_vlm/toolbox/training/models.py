"""Creates a new model or loads a checkpoint, with its processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessorPil,
)

from ...checks import check
from ...configuration_sparse_moe_vlm import SparseMoeVlmConfig
from ...image_reading import read_images
from ...modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from ...native_towers import patches_per_side
from ...processing_sparse_moe_vlm import SparseMoeVlmProcessor
from ..demo.tokenizer import train_tokenizer
from ..installed_code import use_installed_code
from ..shipped_files import shipped_presets
from .examples import Examples, first_rows, images_of, texts_of
from .recipes import find_model

# About this many images are enough to estimate the mean and the standard deviation of the pixels.
NUM_IMAGES_LOOKED_AT = 1000

# Fields of the configuration of a new model whose values come from its tokenizer.
SET_BY_TOKENIZER = (
    "image_token_id",
    "video_token_id",
    "text_config.vocab_size",
    "text_config.pad_token_id",
    "text_config.eos_token_id",
)


def from_scratch(
    config_file: str,
    examples: Dataset | IterableDataset,
    vocab_size: int = 1024,
    config_fields: Mapping[str, Any] | None = None,
) -> tuple[SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor]:
    """
    Creates a new model from a preset, with a tokenizer trained on the texts of the examples, and an image processor
    that normalises with the mean and standard deviation of the pixels of their images.

    Args:
        config_file (`str`):
            Path to a model configuration (a JSON file), or the name of a preset (`"tiny"`). The tokenizer replaces its
            vocabulary size and special tokens.
        examples (`Dataset` or `IterableDataset`):
            Rows with `messages` and `images`, as [`~toolbox.data.load_rows`] returns them, or rows of the built-in data
            with the columns `question`, `answer` and `image`. Only the first 10,000 rows of a stream are read.
        vocab_size (`int`, *optional*, defaults to 1024):
            Maximum size of the vocabulary.
        config_fields (`Mapping[str, Any]`, *optional*):
            Fields of the configuration that replace those of the file. Those of sub-configurations are nested, such as
            `{"vision_config": {"image_size": 64, "patch_size": 8}}`.

    Returns:
        `tuple[SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor]`: The model, with random weights, and its
        processor.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither a JSON file nor a preset, or if a field of `config_fields` does not exist or is set
            by the tokenizer.
    """
    path = find_model(config_file)
    check(
        path.endswith(".json"),
        f"`config_file` must be a JSON file or the name of a preset ({', '.join(shipped_presets('models'))}), but got "
        f"{config_file!r}.",
    )
    rows = with_images = examples
    if isinstance(examples, IterableDataset):
        rows = first_rows(examples, NUM_IMAGES_LOOKED_AT)
        with_images = rows[:NUM_IMAGES_LOOKED_AT]
    raw = _with_fields(SparseMoeVlmConfig.from_json_file(path).to_dict(), config_fields or {})
    # Frames of videos are encoded like images, unless there is an encoder of videos.
    has_videos = "video" in raw["text_config"]["modalities"] and "video" not in (raw["modality_encoders"] or {})
    tokenizer = train_tokenizer(texts_of(rows), vocab_size, videos=has_videos)
    raw["image_token_id"] = tokenizer.convert_tokens_to_ids("<image>")
    raw["video_token_id"] = tokenizer.convert_tokens_to_ids("<video>") if has_videos else None
    raw["text_config"] |= {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = SparseMoeVlmConfig.from_dict(raw)
    model = SparseMoeVlmForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=sorted(config.placeholder_ids.values()),  # which the model does not generate
    )
    vision = config.vision_config
    size = getattr(vision, "image_size", None) or patches_per_side(vision) * vision.patch_size
    image_processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    image_processor.image_mean, image_processor.image_std = _pixel_statistics(with_images, image_processor)
    processor = SparseMoeVlmProcessor(
        image_processor,
        tokenizer,
        **config.image_arguments,
        video_token="<video>" if has_videos else None,
        video_temporal_pooling=config.video_temporal_pooling,
    )
    return model, processor


def _with_fields(config: dict[str, Any], fields: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Returns the fields of a configuration with other values. Fields of sub-configurations are nested."""
    merged = dict(config)
    for key, value in fields.items():
        name = f"{section}{key}"
        check(key in config, f"the configuration of the model has no field `{name}`: {', '.join(config)}.")
        check(name not in SET_BY_TOKENIZER, f"`{name}` of the configuration is set by the tokenizer: remove it.")
        if "model_type" in (config[key] if isinstance(config[key], dict) else ()):
            check(isinstance(value, Mapping), f"`{name}` of the configuration must be a mapping, got {value!r}.")
            value = _with_fields(config[key], value, f"{name}.")
        merged[key] = value
    return merged


def _pixel_statistics(examples: Examples, image_processor: SiglipImageProcessorPil) -> tuple[list[float], list[float]]:
    """Returns the mean and standard deviation of the pixels of some resized images, by channel."""
    images = images_of(examples, NUM_IMAGES_LOOKED_AT)
    if not images:  # only texts: as for the values from -1 to 1 of most models
        return [0.5] * 3, [0.5] * 3
    pixels = image_processor(read_images(images), do_normalize=False, return_tensors="pt")["pixel_values"]
    by_channel = pixels.transpose(0, 1).flatten(1)
    return by_channel.mean(dim=1).tolist(), by_channel.std(dim=1).clamp(min=1e-3).tolist()


def from_checkpoint(
    path: str, trust_remote_code: bool = False, language_models: bool = False, dtype: str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """
    Loads a trained vision-language model of any class, with its processor. Checkpoints of this package run the
    installed code.

    Args:
        path (`str`):
            Folder of the checkpoint, or its name on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code from the checkpoint.
        language_models (`bool`, *optional*, defaults to `False`):
            Whether to accept language models, which have a tokenizer instead of a processor.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights, such as `"float32"`. By default, that of the checkpoint.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`: The model, in evaluation mode, and its processor. For a language
        model, the second element is a `PreTrainedTokenizerBase`.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If the checkpoint requires its own code and `trust_remote_code` is `False`, if the model is a
            language model and `language_models` is `False`, or if it is a retrieval model.
    """
    use_installed_code(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    check(
        not is_retrieval_model(config),
        f"{path} is a retrieval model (of type {config.model_type!r}), which embeds texts and images and gives no "
        "answers: a model that generates text is needed here.",
    )
    if not is_language_model(config):
        model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=trust_remote_code, dtype=dtype)
        return model, AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    check(
        language_models,
        f"{path} is a language model (of type {config.model_type!r}), which reads no images: a vision-language model "
        "is needed here.",
    )
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code, dtype=dtype)
    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def retrieval_from_checkpoint(
    path: str, trust_remote_code: bool = False, dtype: str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """
    Loads a retrieval model of this package, with its processor. It runs the installed code.

    Args:
        path (`str`):
            Folder of the checkpoint, or its name on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code from the checkpoint.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights, such as `"float32"`. By default, that of the checkpoint.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`: The model, in evaluation mode, and its processor.

    Raises:
        OSError: If there is no such checkpoint.
    """
    use_installed_code(path)
    model = AutoModel.from_pretrained(path, trust_remote_code=trust_remote_code, dtype=dtype)
    return model, AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)


def is_retrieval_model(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a retrieval model of this package."""
    return hasattr(config, "tower_model_type")


def is_language_model(config: PreTrainedConfig) -> bool:
    """
    Whether a model is loaded by `AutoModelForCausalLM`, but not by `AutoModelForImageTextToText`.

    Args:
        config (`PreTrainedConfig`):
            Configuration of the model.

    Returns:
        `bool`: `True` for a language model, `False` for all others.
    """
    of_code = getattr(config, "auto_map", None) or {}
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if auto_class.__name__ in of_code or type(config) in auto_class._model_mapping:
            return auto_class is AutoModelForCausalLM
    return False


def from_our_checkpoint(path: str) -> tuple[SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor]:
    """
    Loads a trained model of the class `SparseMoeVlmForConditionalGeneration`, with its processor.

    Args:
        path (`str`):
            Folder of the checkpoint, or its name on the Hub.

    Returns:
        `tuple[SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor]`: The model, in evaluation mode, and its
        processor.

    Raises:
        ValueError: If it is a model of another class.
    """
    model_type = load_config(path).model_type
    if model_type != SparseMoeVlmConfig.model_type:
        raise ValueError(f"{path} is a model of type {model_type!r}; this needs {SparseMoeVlmConfig.model_type!r}.")
    model = SparseMoeVlmForConditionalGeneration.from_pretrained(path).eval()
    return model, AutoProcessor.from_pretrained(path)


def load_config(name: str) -> PreTrainedConfig:
    """
    Loads the configuration of a model.

    Args:
        name (`str`):
            Short name of a preset, path to a configuration file, folder of a checkpoint, or name on the Hub.

    Returns:
        `PreTrainedConfig`: The configuration.

    Raises:
        FileNotFoundError: If there is no such path, and the name cannot be a name on the Hub.
        ValueError: If the configuration does not name its model type.
    """
    path = find_model(name)
    use_installed_code(path)
    return AutoConfig.from_pretrained(path)
