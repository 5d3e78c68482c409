"""Training: from a recipe to a model, with Transformers' `Trainer`."""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
    SiglipImageProcessorPil,
    Trainer,
)

from ..configuration_sparse_moe_vlm import SparseMoeVlmConfig
from ..modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from ..processing_sparse_moe_vlm import SparseMoeVlmProcessor
from .routing_monitor import RoutingMonitor
from .scenes import to_messages
from .tokenizer import train_tokenizer


class SparseMoeTrainer(Trainer):
    """
    `Trainer` that also watches the routers of our models. Since the last log it logs

    - means of the router losses: `aux_loss`, `z_loss`, and the balancing loss of each modality (`aux_loss_text`, …);
    - how each modality spreads over each group of experts: `routing/<group>/<modality>/<figure>`, over all layers (see
      [`~toolbox.routing_statistics.RoutingStatistics`]; `trainer.routing.statistics` has the layers one by one), with a
      warning where one has collapsed.

    With `config.router_bias_update_rate` it moves the routers' biases after every step. For any of these the model must
    return its router logits (`config.output_router_logits`).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._router_losses: dict[str, list[torch.Tensor]] = {}
        self.routing = RoutingMonitor()
        self.add_callback(self.routing)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            unwrapped = self.accelerator.unwrap_model(model)
            losses = {name: outputs.get(name) for name in ("aux_loss", "z_loss")}
            by_modality = outputs.get("aux_loss_by_modality")
            if by_modality is not None:
                modalities = unwrapped.config.get_text_config().modalities
                losses |= {f"aux_loss_{name}": value for name, value in zip(modalities, by_modality, strict=True)}
            for name, value in losses.items():
                if value is not None:
                    self._router_losses.setdefault(name, []).append(value.detach())
            self.routing.add(unwrapped, inputs, outputs.get("router_logits"))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name, values in self._router_losses.items():
                mean = torch.stack(values).nanmean().item()
                if not math.isnan(mean):  # a modality of which there was no token
                    logs[name] = round(mean, 4)
            self._router_losses.clear()
            logs |= {f"routing/{name}": round(value, 4) for name, value in self.routing.report().items()}
        super().log(logs, *args, **kwargs)


def conversations(dataset: Dataset) -> Dataset:
    """
    Rows of the built-in data as conversations, made when they are read.

    Args:
        dataset (`datasets.Dataset`):
            Rows of [`~toolbox.scenes.scenes`] or [`~toolbox.emoji.emoji_questions`].

    Returns:
        `datasets.Dataset`: rows with `messages` and `images`.
    """
    return dataset.with_transform(_to_conversations)


def _to_conversations(batch: dict[str, list]) -> dict[str, list]:
    rows = [to_messages(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    return {"messages": [row["messages"] for row in rows], "images": [row["images"] for row in rows]}


def from_scratch(
    config_file: str, examples: Dataset, vocab_size: int = 1024
) -> tuple[SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor]:
    """
    A new model from a preset, with a tokenizer trained on the texts at hand, and an image processor that normalises
    pictures as those at hand ask for.

    Args:
        config_file (`str`):
            Model configuration, a JSON file. Vocabulary size and special tokens are those of the tokenizer.
        examples (`datasets.Dataset`):
            Rows with `question`, `answer` and `image`.
        vocab_size (`int`, defaults to 1024):
            Largest size of the vocabulary.

    Returns:
        `tuple[SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor]`
    """
    texts = zip(examples["question"], examples["answer"], strict=True)
    tokenizer = train_tokenizer((f"{question}\n{answer}" for question, answer in texts), vocab_size)
    raw = SparseMoeVlmConfig.from_json_file(config_file).to_dict()
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
        suppress_tokens=[config.image_token_id],  # stands for pictures, which the model does not make
        max_new_tokens=32,
    )
    size = config.vision_config.image_size
    image_processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    image_processor.image_mean, image_processor.image_std = _pixel_statistics(examples, image_processor)
    return model, SparseMoeVlmProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)


def _pixel_statistics(examples: Dataset, image_processor: SiglipImageProcessorPil) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the pixels of some pictures, by channel."""
    step = max(len(examples) // 1000, 1)
    pictures = [examples[i]["image"] for i in range(0, len(examples), step)]
    pixels = image_processor(pictures, do_normalize=False, return_tensors="pt")["pixel_values"]
    by_channel = pixels.transpose(0, 1).flatten(1)
    return by_channel.mean(dim=1).tolist(), by_channel.std(dim=1).clamp(min=1e-3).tolist()


def from_checkpoint(path: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    A trained model of any image-text-to-text class, with its processor.

    Args:
        path (`str`):
            Folder of the checkpoint, or its name on the Hub.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`
    """
    return AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
