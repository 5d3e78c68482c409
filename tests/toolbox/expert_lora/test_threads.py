"""If several threads call a model with adapters, each gets the result of a single call."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model

from modeling_sparse_moe_vlm.toolbox.expert_lora import factor_expert_lora
from modeling_sparse_moe_vlm.toolbox.expert_lora.decode_cache import StepMemory
from modeling_sparse_moe_vlm.toolbox.paging import page_experts
from tests.support.in_tree_moe import adapt, assert_equal, experts_of, make_inputs, make_model, randomise
from tests.toolbox.expert_lora.test_adapted_layer import expert_config, layers_of

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def make_adapted(name: str, use_dora: bool = False):
    model = make_model(name).requires_grad_(False)
    if not use_dora:
        return factor_expert_lora(adapt(model)).eval()
    adapted = randomise(get_peft_model(model, expert_config(model, use_dora=True))).eval()
    with torch.no_grad():
        for layer in layers_of(adapted):
            layer.lora_magnitude_vector["default"].weight.abs_().add_(0.5)
    return adapted


def interrupt(model, meanwhile) -> None:
    """Runs another thread from start to end within the first call of each experts module."""
    this_thread, experts = threading.get_ident(), list(experts_of(model.get_base_model()).values())
    left = set(experts)

    def hook(module, *_):
        if threading.get_ident() == this_thread and module in left:
            left.remove(module)
            thread = threading.Thread(target=meanwhile)
            thread.start()
            thread.join(60)
            assert not thread.is_alive()

    for module in experts:
        module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("paged", [False, True], ids=["resident", "paged"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["qwen3_moe", "isolated"])
@torch.no_grad()
def test_a_call_in_the_middle_of_another(name, use_dora, paged):
    adapted = make_adapted(name, use_dora)
    base = adapted.get_base_model()
    inputs, others = make_inputs(base), make_inputs(base, batch_size=3, length=9)
    expected, expected_of_others = adapted(**inputs).logits, adapted(**others).logits
    with adapted.disable_adapter():
        assert (adapted(**inputs).logits - expected).abs().max() > 0.1
    if paged:
        page_experts(adapted, 4)
    of_others = []

    def other_call():
        with torch.no_grad():
            of_others.append(adapted(**others).logits)

    interrupt(adapted, other_call)
    assert_equal(adapted(**inputs).logits, expected, 3e-5)
    assert len(of_others) == len(experts_of(base))
    for logits in of_others:
        assert_equal(logits, expected_of_others, 3e-5)


def test_training_in_the_middle_of_an_answer():
    """Both calls use the right weights, and the gradients are right."""
    adapted = make_adapted("isolated")
    inputs = make_inputs(adapted.get_base_model())
    with torch.no_grad():
        expected = adapted(**inputs).logits
    parameters = [parameter.requires_grad_() for name, parameter in adapted.named_parameters() if "lora_" in name]
    gradients = torch.autograd.grad(adapted(**inputs).logits.sin().sum(), parameters)
    seen = []

    def train():
        with torch.enable_grad():
            seen.append(torch.autograd.grad(adapted(**inputs).logits.sin().sum(), parameters))

    interrupt(adapted, train)
    with torch.no_grad():
        assert_equal(adapted(**inputs).logits, expected)
    for found in seen:
        for got, wanted in zip(found, gradients, strict=True):
            assert_equal(got, wanted)


@pytest.mark.parametrize("paged", [False, True], ids=["resident", "paged"])
def test_several_generate_at_once(paged):
    adapted = make_adapted("qwen3_moe")
    base = adapted.get_base_model()
    prompts = [make_inputs(base, length=length) for length in (4, 9, 14)]
    with torch.no_grad():
        expected = [adapted.generate(**prompt, **GREEDY) for prompt in prompts]
        with adapted.disable_adapter():
            assert not any(torch.equal(adapted.generate(**p, **GREEDY), e) for p, e in zip(prompts, expected))
    if paged:
        page_experts(adapted, 4)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(adapted.generate, **prompt, **GREEDY) for prompt in prompts * 2]
        for run, wanted in zip(runs, expected * 2):
            assert torch.equal(run.result(), wanted)


def test_every_thread_remembers_its_own_steps():
    memory, made = StepMemory(), []

    def step(num_tokens: int) -> int:
        with torch.no_grad():
            memory.begin(num_tokens, most=8)
            kept = memory.get("what", [], (), lambda: made.append(None) or len(made))
            memory.end()
        return kept

    assert [step(1), step(1)] == [1, 1]
    thread = threading.Thread(target=lambda: [step(5), step(5), memory.begin(9, most=8)])
    thread.start()
    thread.join()
    assert [step(1), len(made)] == [1, 2]
