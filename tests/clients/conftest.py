"""Marks the tests of clients, which need the extra `clients` and start servers, as extensive."""

from pathlib import Path

import pytest
import torch

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmTextConfig
from tests.support.models import TEXT_CONFIG
from tests.support.processors import VOCAB_SIZE, make_processor, make_speaking_model, make_tokenizer, speak_printably
from tests.support.upcycled import make_speaking
from tests.toolbox.upcycling.test_processors import make_llava_processor

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    # This hook gets the tests of all folders.
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.extensive)


def make_text_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    return tokenizer


def make_text_model() -> SparseMoeVlmForCausalLM:
    torch.manual_seed(0)
    return SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG | {"vocab_size": VOCAB_SIZE})).eval()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The folders of models that answer in printable text: ours and an upcycled LLaVA, and both without images."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {
        "ours": (make_speaking_model(), make_processor()),
        "upcycled": (make_speaking("llava"), make_llava_processor()),
        "our_text": (make_text_model(), make_text_tokenizer()),
        "upcycled_text": (make_speaking("llama"), make_text_tokenizer()),
    }
    for name, (model, processor) in made.items():
        speak_printably(model).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return {name: folder / name for name in made}
