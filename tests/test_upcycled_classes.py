"""Classes of upcycled models that two threads create at the same time: both threads get the same class."""

import threading
from dataclasses import dataclass

import pytest
import torch
from transformers import ApertusConfig, ArceeConfig, Starcoder2ForCausalLM
from transformers.utils import ModelOutput

from modeling_sparse_moe_vlm import configuration_upcycled, modeling_upcycled, modeling_upcycled_classification
from tests.support.threads import TIMEOUT, run_at_once

pytestmark = pytest.mark.newest


@dataclass
class RareOutput(ModelOutput):
    logits: torch.Tensor | None = None


# A class is made once in a process, so each case has a type that no other test uses.
@pytest.mark.parametrize(
    ("module", "create", "get"),
    [
        (
            configuration_upcycled,
            "_make_config_class",
            lambda: configuration_upcycled.upcycled_config_class(ArceeConfig),
        ),
        (
            modeling_upcycled,
            "_make_model_class",
            lambda: modeling_upcycled.upcycled_model_class(Starcoder2ForCausalLM),
        ),
        (
            modeling_upcycled_classification,
            "_make_class",
            lambda: modeling_upcycled_classification.classification_model_class(ApertusConfig),
        ),
        (modeling_upcycled, "make_dataclass", lambda: modeling_upcycled.output_class(RareOutput)),
    ],
)
def test_two_threads_get_the_same_class(module, create, get, monkeypatch):
    barrier = threading.Barrier(2, timeout=TIMEOUT)
    made = []
    function = getattr(module, create)

    def create_with_the_other(*arguments, **options):
        barrier.wait()
        new = function(*arguments, **options)
        made.append(new)
        barrier.wait()
        return new

    monkeypatch.setattr(module, create, create_with_the_other)
    one, other = run_at_once(get, get)
    assert one is other
    assert len(set(made)) == 2, "both threads created a class"
    assert one in made
    assert get() is one
    assert getattr(module, one.__name__) is one
