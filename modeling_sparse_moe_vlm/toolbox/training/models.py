"""The model that training starts from, with its processor: from scratch, or a checkpoint."""

from __future__ import annotations

from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    SiglipImageProcessorPil,
)

from ...checks import check
from ...configuration_sparse_moe_vlm import SparseMoeVlmConfig
from ...image_reading import read_images
from ...modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from ...processing_sparse_moe_vlm import SparseMoeVlmProcessor
from ..demo.tokenizer import train_tokenizer
from ..expert_modules import our_experts_config
from ..installed_code import use_installed_code
from ..shipped_files import shipped_presets
from .recipes import find_model

# About as many images tell the mean and the spread of their pixels.
NUM_IMAGES_LOOKED_AT = 1000


def from_scratch(
    config_file: str, examples: Dataset, vocab_size: int = 1024
) -> tuple[SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor]:
    """
    A new model from a preset, with a tokenizer trained on the texts at hand, and an image processor that normalises by
    the pixels of the images at hand.

    Args:
        config_file (`str`):
            Path to a model configuration (a JSON file), or the name of a preset (`"tiny"`). Vocabulary size and special
            tokens are those of the tokenizer.
        examples (`datasets.Dataset`):
            Rows with `question`, `answer` and `image`.
        vocab_size (`int`, defaults to 1024):
            Largest size of the vocabulary.

    Returns:
        `tuple[SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor]`

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither a JSON file nor a preset.
    """
    path = find_model(config_file)
    check(
        path.endswith(".json"),
        f"`config_file` must be a JSON file or the name of a preset ({', '.join(shipped_presets('models'))}), but got "
        f"{config_file!r}.",
    )
    texts = zip(examples["question"], examples["answer"], strict=True)
    tokenizer = train_tokenizer((f"{question}\n{answer}" for question, answer in texts), vocab_size)
    raw = SparseMoeVlmConfig.from_json_file(path).to_dict()
    raw["image_token_id"] = tokenizer.convert_tokens_to_ids("<image>")
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
        suppress_tokens=[config.image_token_id],  # stands for images, which the model does not make
    )
    size = config.vision_config.image_size
    image_processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    image_processor.image_mean, image_processor.image_std = _pixel_statistics(examples, image_processor)
    return model, SparseMoeVlmProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)


def _pixel_statistics(examples: Dataset, image_processor: SiglipImageProcessorPil) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the pixels of some images, by channel, as the processor reads them."""
    step = max(len(examples) // NUM_IMAGES_LOOKED_AT, 1)
    images = read_images([examples[i]["image"] for i in range(0, len(examples), step)])
    pixels = image_processor(images, do_normalize=False, return_tensors="pt")["pixel_values"]
    by_channel = pixels.transpose(0, 1).flatten(1)
    return by_channel.mean(dim=1).tolist(), by_channel.std(dim=1).clamp(min=1e-3).tolist()


def from_checkpoint(path: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    A trained model of any image-text-to-text class, with its processor.

    Args:
        path (`str`):
            Folder of the checkpoint, or its name on the Hub.
        trust_remote_code (`bool`, defaults to `False`):
            Whether to run the code that comes with the checkpoint.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`
    """
    use_installed_code(path)
    model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=trust_remote_code)
    return model, AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)


def from_checkpoint_with_experts(path: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    A trained model of this package or an upcycled one, ready to answer, with its processor.

    Args:
        path (`str`):
            Folder of the checkpoint, or its name on the Hub.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`

    Raises:
        ValueError: If the model has no experts of this package.
    """
    config = load_config(path)
    check(
        our_experts_config(config) is not None,
        f"{path} is a model of type {config.model_type!r}; this needs {SparseMoeVlmConfig.model_type!r}, or an "
        "upcycled model.",
    )
    model, processor = from_checkpoint(path)
    return model.eval(), processor


def from_our_checkpoint(path: str) -> tuple[SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor]:
    """
    A trained model of our class, ready to answer, with its processor.

    Args:
        path (`str`):
            Folder of the checkpoint, or its name on the Hub.

    Returns:
        `tuple[SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor]`

    Raises:
        ValueError: If it is a model of another class.
    """
    model_type = AutoConfig.from_pretrained(path).model_type
    if model_type != SparseMoeVlmConfig.model_type:
        raise ValueError(f"{path} is a model of type {model_type!r}; this needs {SparseMoeVlmConfig.model_type!r}.")
    model = SparseMoeVlmForConditionalGeneration.from_pretrained(path).eval()
    return model, AutoProcessor.from_pretrained(path)


def load_config(name: str) -> PreTrainedConfig:
    """
    The configuration of a model.

    Args:
        name (`str`):
            Short name of a preset, configuration file, folder of a checkpoint, or name on the Hub.

    Returns:
        `PreTrainedConfig`

    Raises:
        FileNotFoundError: If there is no such path, and it cannot be a name on the Hub.
        ValueError: If a file does not say what type of model it is of.
    """
    path = find_model(name)
    use_installed_code(path)
    return AutoConfig.from_pretrained(path)
