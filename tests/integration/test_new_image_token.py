"""The tokenizer of a language model has no image token. The error messages show code that adds one."""

import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor
from tests.support.models import TEXT_CONFIG, VISION_CONFIG, make_config
from tests.support.processors import IMAGE_SEQ_LENGTH, make_image, make_image_processor


def make_text_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a language model: special tokens and bytes."""
    alphabet = ["<pad>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"pad_token": "<pad>", "eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_processor(tokenizer) -> SparseMoeVlmProcessor:
    return SparseMoeVlmProcessor(make_image_processor(), tokenizer, image_seq_length=IMAGE_SEQ_LENGTH)


def config_with_image_token(vocab_size: int) -> SparseMoeVlmConfig:
    text_config = TEXT_CONFIG | {"vocab_size": vocab_size}
    return SparseMoeVlmConfig(text_config=text_config, vision_config=VISION_CONFIG, image_token_id=259)


def lines_of(error: pytest.ExceptionInfo) -> str:
    return "\n".join(line[4:] for line in str(error.value).splitlines() if line.startswith("    "))


def check_model(model, processor, folder) -> None:
    """Checks that the image changes the logits, and that a reloaded model has the same logits."""
    inputs = processor(text="<image>?", images=make_image(), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == IMAGE_SEQ_LENGTH
    logits = model(**inputs).logits
    other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert (logits - other).abs().max() > 1e-3
    model.save_pretrained(folder)
    reloaded = SparseMoeVlmForConditionalGeneration.from_pretrained(folder).eval()
    torch.testing.assert_close(reloaded(**inputs).logits, logits)


@pytest.mark.parametrize("spare", [0, 1, 61])
def test_code_in_the_error_of_the_processor_works(tmp_path, spare):
    """Also if the vocabulary is padded: spare embeddings are used, and none are removed."""
    tokenizer = make_text_tokenizer()
    torch.manual_seed(0)
    model = SparseMoeVlmForConditionalGeneration(make_config(vocab_size=len(tokenizer) + spare)).eval()
    with pytest.raises(ValueError, match="lacks the image token '<image>'") as error:
        make_processor(tokenizer)
    exec(re.search(r"`(tokenizer\.add.*?\))`", str(error.value)).group(1), {"tokenizer": tokenizer})
    exec(lines_of(error), {"tokenizer": tokenizer, "model": model})
    assert tokenizer.all_special_tokens == ["<|im_end|>", "<pad>", "<|im_start|>", "<image>"]
    assert model.config.image_token_id == 259
    assert model.config.text_config.vocab_size == 259 + max(spare, 1)
    assert model.get_output_embeddings().weight.shape[0] == 259 + max(spare, 1)
    check_model(model, make_processor(tokenizer), tmp_path)


@pytest.mark.parametrize("multiple", [None, 64])
def test_code_in_the_error_of_the_configuration_works(tmp_path, multiple):
    tokenizer = make_text_tokenizer()
    tokenizer.add_tokens("<image>", special_tokens=True)
    with pytest.raises(ValueError, match=r"from 0 to 258, got 259\. .*`len\(tokenizer\)`") as error:
        config_with_image_token(vocab_size=259)
    torch.manual_seed(0)
    model = SparseMoeVlmForConditionalGeneration(make_config(vocab_size=259)).eval()
    lines = lines_of(error)
    if multiple:
        lines = lines.replace("len(tokenizer))", f"len(tokenizer), pad_to_multiple_of={multiple})")
    exec(lines, {"tokenizer": tokenizer, "model": model})
    assert model.config.text_config.vocab_size == (320 if multiple else 260)
    check_model(model, make_processor(tokenizer), tmp_path / "resized")

    torch.manual_seed(0)
    whole = SparseMoeVlmForConditionalGeneration(config_with_image_token(vocab_size=len(tokenizer))).eval()
    check_model(whole, make_processor(tokenizer), tmp_path / "whole")
