"""Values computed from weights are reused between decoding steps, and in no other call."""

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.expert_lora.decode_cache import StepMemory


class Maker:
    """Counts how often a value is computed."""

    def __init__(self):
        self.memory, self.weight, self.made = StepMemory(), torch.zeros(2), 0

    def ask(self, num_tokens: int, settings=(1.0,), grad: bool = False) -> int:
        """Makes one call. Returns how often a value was computed so far."""
        with torch.set_grad_enabled(grad):
            self.memory.begin(num_tokens, most=8)
            self.get(settings)
            self.memory.end()
        return self.made

    def get(self, settings=(1.0,)):
        def make():
            self.made += 1
            return self.made

        return self.memory.get("what", [self.weight], settings, make)


@pytest.fixture
def maker():
    return Maker()


def test_it_is_made_once_for_steps(maker):
    assert [maker.ask(num_tokens) for num_tokens in (5, 1, 1, 1)] == [1, 2, 2, 2]


def test_it_is_computed_again_when_the_number_of_tokens_changes(maker):
    assert [maker.ask(num_tokens) for num_tokens in (1, 2, 1, 1)] == [1, 2, 3, 3]


def test_it_is_computed_again_for_many_tokens_and_for_gradients(maker):
    assert [maker.ask(8), maker.ask(8)] == [1, 2]
    assert [maker.ask(1, grad=True), maker.ask(1, grad=True), maker.ask(1), maker.ask(1)] == [3, 4, 5, 5]


def test_it_is_computed_again_outside_of_calls(maker):
    maker.ask(1)
    maker.get()
    assert maker.made == 2


@pytest.mark.parametrize("change", ["in place", "other storage", "other dtype", "settings"])
def test_it_is_computed_again_when_something_changed(maker, change):
    maker.ask(1)
    if change == "in place":
        maker.weight.add_(1)
    elif change == "other storage":
        maker.weight.data = torch.ones(2)
    elif change == "other dtype":
        maker.weight.data = maker.weight.data.double()
    assert maker.ask(1, settings=(2.0,) if change == "settings" else (1.0,)) == 2


def test_nothing_is_kept_for_inference_tensors(maker):
    """Inference tensors have no version counter."""
    with torch.inference_mode():
        maker.weight = torch.zeros(2)
    assert [maker.ask(1), maker.ask(1)] == [1, 2]
