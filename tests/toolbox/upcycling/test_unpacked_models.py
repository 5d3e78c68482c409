"""Models whose weights are quantised in their file and unpacked when they are loaded, such as GGUF files."""

from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle, upcycle_from_parts
from tests.toolbox.upcycling.test_from_parts import assert_same_logits, make_dense


class Unpacker(HfQuantizer):
    """Like the quantiser of Transformers for GGUF files, which stays in the model and refuses to save it."""

    def __init__(self):
        self.quantization_config = SimpleNamespace(quant_method="gguf", dequantize=False)

    is_trainable = False

    def is_serializable(self):
        return False

    def _process_model_before_weight_loading(self, model, **kwargs):
        raise AssertionError

    def _process_model_after_weight_loading(self, model, **kwargs):
        raise AssertionError

    def __deepcopy__(self, memo):
        raise AssertionError("it may hold the weights of the file")


def make_unpacked():
    model = make_dense()
    model.hf_quantizer = Unpacker()
    model.is_quantized, model.quantization_method = True, "gguf"
    return model


def check(make, tmp_path):
    dense = make_unpacked()
    model = make(dense)
    assert_same_logits(model, dense)
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "quantization_method")
    assert isinstance(dense.hf_quantizer, Unpacker)
    assert (dense.is_quantized, dense.quantization_method) == (True, "gguf")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    input_ids = torch.arange(12)[None]
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_an_upcycled_model_is_not_quantised(tmp_path):
    check(upcycle, tmp_path)


def test_a_model_from_parts_is_not_quantised(tmp_path):
    check(upcycle_from_parts, tmp_path)
