"""The routing of mixtures of experts of Transformers, read with hooks, and the library behaviour that this needs."""

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)
from transformers.utils.output_capturing import OutputRecorder

from modeling_sparse_moe_vlm.toolbox.routing.passes import find_routers, probabilities_of, tokens_of, watch_passes
from tests.support import in_tree_models
from tests.support.in_tree_models import IMAGE, TEXT
from tests.support.in_tree_moe import make_inputs, make_model, make_qwen3_vl_moe


def make_llama4():
    """The experts module takes all tokens of all experts, not the chosen numbers. Layer 0 is dense."""
    sizes = {"intermediate_size_mlp": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_layers": [1]}
    torch.manual_seed(0)
    return Llama4ForCausalLM(Llama4TextConfig(**TEXT | sizes | {"intermediate_size": 24})).eval()


def make_deepseek():
    """The router adds a bias and chooses groups of experts, so that the chosen experts are not the largest logits."""
    sizes = {
        "moe_intermediate_size": 24, "n_routed_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": None,
        "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
        "num_key_value_heads": TEXT["num_attention_heads"],
    }  # fmt: skip
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**TEXT | sizes)).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.6, 0.6, 8))
    return model


def passes_of(model, **inputs):
    found = []
    handles = watch_passes(model, found.append)
    with torch.no_grad():
        outputs = model(**inputs)
    for handle in handles:
        handle.remove()
    return found, outputs


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_choices_are_the_largest_logits_that_the_model_returns(name):
    model = make_model(name)
    (routed,), outputs = passes_of(model, **make_inputs(model), output_router_logits=True)
    assert [layer.number for layer in routed.layout.layers] == [0, 1]
    assert routed.layout.modalities == ("text",)
    for layer, logits in zip(routed.layers, outputs.router_logits, strict=True):
        torch.testing.assert_close(layer.logits, logits.reshape(-1, 8))
        assert torch.equal(layer.chosen, logits.reshape(-1, 8).topk(2, dim=-1).indices)


def test_counts():
    model = make_model("mixtral")
    inputs = make_inputs(model)
    inputs["attention_mask"][1, -5:] = 0
    (routed,), outputs = passes_of(model, **inputs, output_router_logits=True)
    counts = routed.count()
    real = inputs["attention_mask"].flatten().bool()
    assert counts.tokens.tolist() == [23]
    for number, logits in enumerate(outputs.router_logits):
        chosen = logits[real].topk(2, dim=-1).indices
        assert counts.wanted[number, 0].tolist() == torch.bincount(chosen.flatten(), minlength=8).tolist()
        entropy = torch.distributions.Categorical(logits=logits[real].float()).entropy().sum()
        torch.testing.assert_close(counts.entropy[number, 0, 0], entropy)
    assert not counts.dropped.any()


def test_routers_that_do_not_return_their_choices():
    model = make_llama4()
    (routed,), _ = passes_of(model, **make_inputs(model))
    assert [layer.number for layer in routed.layout.layers] == [1]
    (layer,) = routed.layers
    assert torch.equal(layer.chosen, layer.logits.topk(2, dim=-1).indices)
    assert layer.logits.shape == (28, 4)
    assert len(layer.chosen.unique()) == 4


def test_choices_that_are_not_the_largest_logits():
    """They are those that the experts are called with, in the order of the logits."""
    model = make_deepseek()
    given = []
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: given.append(args[1]))
    (routed,), _ = passes_of(model, **make_inputs(model))
    (layer,) = routed.layers
    assert routed.layout.layers[0].number == 1
    assert torch.equal(layer.chosen.sort(dim=1).values, given[0].sort(dim=1).values)
    assert not torch.equal(layer.chosen, layer.logits.topk(2, dim=-1).indices)
    scores = layer.logits.gather(1, layer.chosen)
    assert bool((scores[:, 0] >= scores[:, 1]).all())
    assert bool((given[0] != layer.chosen).any())


def test_images():
    torch.manual_seed(0)
    model = make_qwen3_vl_moe().eval()
    inputs = in_tree_models.make_inputs("qwen3_vl_moe")
    (routed,), _ = passes_of(model, **inputs)
    assert routed.layout.modalities == ("text", "image", "video")
    assert routed.layout.layers[0].groups[0].modalities == ("text", "image", "video")
    assert torch.equal(routed.ids, (inputs["input_ids"] == IMAGE).long().flatten())
    assert torch.equal(routed.is_real, inputs["attention_mask"].bool().flatten())
    assert routed.count().tokens.tolist() == [16, 8, 0]
    assert routed.count().wanted.sum(dim=-1).tolist() == [[32, 16, 0]] * 2


def test_every_pass_of_generation_is_reported():
    model = make_model("mixtral")
    inputs = make_inputs(model)
    inputs["attention_mask"][1, :3] = 0
    found = []
    handles = watch_passes(model, found.append)
    model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert [len(routed.ids) for routed in found] == [28, 2, 2]
    assert [int(routed.is_real.sum()) for routed in found] == [25, 2, 2]
    for handle in handles:
        handle.remove()
    model(**inputs)
    assert len(found) == 3


def test_dense_models_have_no_routers():
    assert watch_passes(in_tree_models.make_model("llava"), print) == []


def test_separate_routers_for_text_and_images_are_refused():
    model = make_model("ernie4_5_vl_moe")
    with pytest.raises(ValueError, match=r"processes \d+ of the 28 tokens"):
        passes_of(model, **make_inputs(model))


def test_blocks_that_return_the_logits_themselves():
    model = make_model("ernie4_5_vl_moe")
    inputs = make_inputs(model) | {"moe_mm_token_type_ids": None}
    (routed,), outputs = passes_of(model, **inputs, output_router_logits=True)
    assert [layer.number for layer in routed.layout.layers] == [0, 1]
    for layer, logits in zip(routed.layers, outputs.router_logits, strict=True):
        assert torch.equal(layer.logits, logits)
        assert torch.equal(layer.chosen, logits.topk(2, dim=-1).indices)


def test_tokens_without_ids():
    config = make_qwen3_vl_moe().config
    embeddings = torch.zeros(2, 3, 8)
    ids, is_real, _ = tokens_of(config, {"inputs_embeds": embeddings})
    assert (ids.tolist(), is_real.tolist()) == ([0] * 6, [True] * 6)
    given = torch.tensor([[0, 1, 1], [2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    ids, is_real, _ = tokens_of(
        config, {"inputs_embeds": embeddings, "mm_token_type_ids": given, "attention_mask": mask}
    )
    assert ids.tolist() == [0, 1, 1, 2, 0, 0]
    assert is_real.tolist() == [True, True, False, True, True, True]


def test_probabilities():
    logits = torch.tensor([[1.0, -1.0], [3.0, 0.0]])
    torch.testing.assert_close(probabilities_of(logits), logits.softmax(dim=-1))
    already = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    assert torch.equal(probabilities_of(already), already)
    positive = torch.tensor([[0.75, 0.25], [1.5, 0.5]])
    torch.testing.assert_close(probabilities_of(positive), positive.softmax(dim=-1))


def test_classes_name_their_routers():
    """`_can_record_outputs` maps `router_logits` to recorders with `target_class` and `index`."""
    (recorded,) = (module._can_record_outputs["router_logits"] for module in [make_model("mixtral").model])
    assert isinstance(recorded, OutputRecorder)
    assert isinstance(recorded.target_class, type)
    assert recorded.index == 0
    places = find_routers(make_llama4())
    assert list(places.routers) == ["model.layers.1.feed_forward.router"]
    assert [index for _, index in places.routers.values()] == [1]
