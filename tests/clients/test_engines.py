"""
Models called as the Transformers backends of vLLM and SGLang call them, which need a GPU: merged embeddings and
positions without `mm_token_type_ids`, an attention function of the engine, and a fused module in place of `experts`.
"""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_sparse_moe_vlm import input_checks, modeling_upcycled
from tests.support import upcycled
from tests.support.models import make_inputs, make_model
from tests.support.processors import make_image, make_processor, make_speaking_model

WARNING = "`inputs_embeds` came without `mm_token_type_ids`"
RIGHT = {
    "joint": {"expert_groups": "joint"},
    "joint, the same top-k": {"expert_groups": "joint", "num_experts_per_tok_by_modality": {"image": 2}},
}
WRONG = {
    "isolated": {"expert_groups": "isolated"},
    "hybrid": {"expert_groups": "hybrid"},
    "another top-k": {"expert_groups": "joint", "num_experts_per_tok_by_modality": {"image": 1}},
    "priors": {"expert_groups": "joint", "alpha_init": 0.9},
}


class FusedExperts(nn.Module):
    """Has the signature of vLLM's fused experts, and computes what the replaced experts do."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.replaced = [experts]  # not a submodule
        self.calls = 0

    def forward(self, hidden_states, topk_ids, topk_weights, **kwargs):
        self.calls += 1
        return self.replaced[0](hidden_states, topk_ids.to(torch.int32).long(), topk_weights)


def engine_attention(module, query, key, value, attention_mask, attention_instances=None, **kwargs):
    """Looks up the layer as vLLM does. The engine keeps the keys itself, so it does not read the mask."""
    attention_instances[module.layer_idx] += 1
    kwargs.pop("is_causal", None)
    return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)


AttentionInterface.register("engine", engine_attention)


def engine_logits(model, input_ids, image_token_id: int, pixel_values) -> torch.Tensor:
    """Returns the logits of one row, from the calls that an engine makes."""
    base = model.model
    embeds = base.get_input_embeddings()(input_ids)
    features = base.get_image_features(pixel_values, return_dict=True).pooler_output
    merged = embeds.masked_scatter((input_ids == image_token_id)[..., None], torch.cat(list(features)))
    text_config = model.config.get_text_config()
    text_config._attn_implementation = "engine"
    instances = dict.fromkeys(range(text_config.num_hidden_layers), 0)
    output = base(
        input_ids=None,
        inputs_embeds=merged,
        position_ids=torch.arange(input_ids.shape[1])[None],
        use_cache=False,
        return_dict=False,
        attention_instances=instances,
    )
    assert set(instances.values()) == {1}, "every layer calls the engine's attention once"
    return model.lm_head(output[0])


def replace_experts(model) -> list[FusedExperts]:
    """Replaces every module named `experts`, as vLLM does."""
    made = []
    for module in list(model.modules()):
        if isinstance(getattr(module, "experts", None), nn.Module):
            made.append(FusedExperts(module.experts))
            module.experts = made[-1]
    return made


def make_case(kind: str, fields: dict):
    """Returns a model, one row with an image, and its logits."""
    if kind == "ours":
        model, inputs, logger = make_model(**fields), make_inputs(batch_size=1), input_checks.logger
    else:
        model, inputs = upcycled.make_few_experts("llava", **fields), upcycled.make_inputs("llava", padded=False)
        inputs, logger = {name: value[:1] for name, value in inputs.items()}, modeling_upcycled.logger
    with torch.no_grad():
        expected = model(**inputs).logits
    logger.warning_once.cache_clear()
    return model, inputs, expected


def cases(fields: dict) -> pytest.MarkDecorator:
    made = [("ours", value, f"ours, {name}") for name, value in fields.items()]
    made += [("upcycled", value, f"upcycled, {name}") for name, value in fields.items() if name != "priors"]
    return pytest.mark.parametrize(("kind", "fields"), [pytest.param(*case[:2], id=case[2]) for case in made])


@cases(RIGHT)
@pytest.mark.parametrize("is_fused", [False, True])
def test_arrangements_that_are_right(kind, fields, is_fused, caplog):
    model, inputs, expected = make_case(kind, fields)
    fused = replace_experts(model) if is_fused else []
    assert len(fused) == (2 if is_fused else 0)
    with torch.no_grad():
        logits = engine_logits(model, inputs["input_ids"], 3, inputs["pixel_values"])
    torch.testing.assert_close(logits, expected)
    assert all(experts.calls == 1 for experts in fused)
    assert WARNING not in caplog.text


@cases(WRONG)
def test_arrangements_that_are_wrong_cause_a_warning(kind, fields, caplog):
    model, inputs, expected = make_case(kind, fields)
    with torch.no_grad():
        logits = engine_logits(model, inputs["input_ids"], 3, inputs["pixel_values"])
    assert not torch.allclose(logits, expected, atol=1e-3)
    assert caplog.text.count(WARNING) == 1


@pytest.mark.parametrize("kind", ["ours", "upcycled"])
@pytest.mark.parametrize("groups", ["joint", "isolated", "hybrid"])
def test_isolated_experts_are_not_one_stack_as_engines_need(kind, groups):
    """An engine fuses one stack per layer, with as many experts as the configuration says."""
    model, _, _ = make_case(kind, {"expert_groups": groups})
    stacks = [experts.replaced[0] for experts in replace_experts(model)]
    for stack in stacks:
        shapes = {name: list(parameter.shape) for name, parameter in stack.named_parameters()}
        if groups != "isolated":
            assert {name: shape[0] for name, shape in shapes.items()} == {"gate_up_proj": 4, "down_proj": 4}
            assert {len(shape) for shape in shapes.values()} == {3}
        else:
            assert {name.rpartition(".")[2] for name in shapes} == {"gate_up_proj", "down_proj"}
            assert "gate_up_proj" not in shapes, "the stacks are those of the groups"


def test_numbers_of_tokens_and_of_rows_of_pixels():
    """An engine plans with the numbers for sizes, and cuts `pixel_values` and features into images with them."""
    processor, model = make_processor(), make_speaking_model(expert_groups="joint")
    images = [make_image(0), make_image(1, 40, 12)]
    known = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
    inputs = processor(text="<image>a<image>", images=images, return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == sum(known["num_image_tokens"])
    assert len(inputs["pixel_values"]) == sum(known["num_image_patches"])
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    assert [len(feature) for feature in features] == known["num_image_tokens"]
