"""Every parameter of any model belongs to exactly one part, found by the structure of the model."""

import re

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.training import model_parts
from tests import test_further_modalities
from tests.support import in_tree_models, in_tree_moe
from tests.support.models import make_model
from tests.support.retrieval import make_retrieval_model
from tests.support.upcycled import make_dense, make_upcycled
from tests.support.upcycling_census import structure

ATTENTION = {f"model.language_model.layers.N.self_attn.{name}_proj.weight" for name in "qkvo"}
QK_NORMS = {f"model.language_model.layers.N.self_attn.{name}_norm.weight" for name in "qk"}
EMBEDDINGS = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
NORMS = {
    "model.language_model.layers.N.input_layernorm.weight",
    "model.language_model.layers.N.post_attention_layernorm.weight",
    "model.language_model.norm.weight",
}
PROJECTOR = {f"model.multi_modal_projector.linear_{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}
MLP = "model.language_model.layers.N.mlp"
DENSE = {f"{MLP}.{name}_proj.weight" for name in ("gate", "up", "down")}


def stack(name: str) -> set[str]:
    return {f"{name}.gate_up_proj", f"{name}.down_proj"}


def network(name: str) -> set[str]:
    return {f"{name}.{projection}_proj.weight" for projection in ("gate", "up", "down")}


HYBRID = {
    "experts.joint": stack(f"{MLP}.experts"),
    "experts.text": network(f"{MLP}.shared_experts.text"),
    "experts.image": network(f"{MLP}.shared_experts.image"),
    "routers": {f"{MLP}.gate.weight"},
}
ISOLATED = {
    "experts.text": stack(f"{MLP}.experts.text"),
    "experts.image": stack(f"{MLP}.experts.image"),
    "routers": {f"{MLP}.gate.weight"},
}


def names_of(model) -> dict[str, set[str]]:
    """Returns the names of the parameters of each part, with `N` for numbers of layers, after a check that the parts
    contain every parameter once."""
    parts = model_parts(model)
    found = [(name, parameter) for names in parts.values() for name, parameter in names.items()]
    of_model = dict(model.named_parameters())
    assert sorted(name for name, _ in found) == sorted(of_model)
    assert all(parameter is of_model[name] for name, parameter in found)
    return {part: {re.sub(r"\.\d+(?=\.)", ".N", name) for name in names} for part, names in parts.items()}


def without_vision(parts: dict[str, set[str]], prefix: str) -> dict[str, set[str]]:
    """Returns the other parts, after a check that the vision encoder is the module with this prefix."""
    vision = parts.pop("vision_encoder")
    assert vision
    assert all(name.startswith(prefix) for name in vision)
    assert not any(name.startswith(prefix) for names in parts.values() for name in names)
    return parts


@pytest.mark.parametrize(("groups", "experts"), [("hybrid", HYBRID), ("isolated", ISOLATED)])
def test_parts_of_our_architecture(groups, experts):
    parts = names_of(make_model(expert_groups=groups))
    assert list(parts) == ["vision_encoder", "connector", "embeddings", "attention", *experts, "rest"]
    common = {"connector": PROJECTOR, "embeddings": EMBEDDINGS, "attention": ATTENTION | QK_NORMS, "rest": NORMS}
    assert without_vision(parts, "model.vision_tower.") == common | experts


def test_parts_of_an_upcycled_llava():
    parts = names_of(make_upcycled("llava", "hybrid"))
    common = {"connector": PROJECTOR, "embeddings": EMBEDDINGS, "attention": ATTENTION, "rest": NORMS}
    assert without_vision(parts, "model.vision_tower.") == common | HYBRID


def test_parts_of_an_upcycled_qwen3_vl_whose_connector_is_in_its_vision_encoder():
    parts = names_of(make_upcycled("qwen3_vl"))
    connector = parts.pop("connector")
    assert {name.rpartition(".")[0] for name in connector} == {
        f"model.visual.{merger}.{layer}"
        for merger in ("merger", "deepstack_merger_list.N")
        for layer in ("norm", "linear_fc1", "linear_fc2")
    }
    common = {"embeddings": EMBEDDINGS, "attention": ATTENTION | QK_NORMS, "rest": NORMS}
    assert without_vision(parts, "model.visual.") == common | ISOLATED


def test_parts_of_a_dense_model():
    parts = names_of(make_dense("llava"))
    common = {"connector": PROJECTOR, "embeddings": EMBEDDINGS, "attention": ATTENTION, "rest": NORMS | DENSE}
    assert without_vision(parts, "model.vision_tower.") == common


def test_layers_that_stay_dense_and_pools():
    dense_first = names_of(make_upcycled("llava", "hybrid", layers=[1]))
    assert dense_first["rest"] == NORMS | DENSE
    pooled = names_of(make_model(expert_groups="joint", expert_pool=[0, 0]))
    assert pooled["experts.joint"] == stack("model.language_model.expert_pools.N")
    assert pooled["routers"] == {f"{MLP}.gate.weight"}


def test_shards_of_experts_belong_to_their_group():
    parts = names_of(make_model(expert_groups="isolated", num_expert_shards=2))
    assert parts["experts.image"] == stack(f"{MLP}.experts.image.shards.N")


def test_encoders_of_further_modalities_are_the_rest_and_their_projectors_connectors():
    parts = names_of(SparseMoeVlmForConditionalGeneration(test_further_modalities.make_config()))
    sensor = "model.modality_encoders.sensor"
    projector = {f"{sensor}.linear_{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}
    assert parts["connector"] == PROJECTOR | projector
    assert parts["rest"] == NORMS | {f"{sensor}.encoder.embed.weight", f"{sensor}.encoder.embed.bias"}
    assert parts["experts.sensor_only"] == stack(f"{MLP}.experts.sensor_only")


def test_scale_and_bias_of_a_retrieval_model_are_the_rest():
    parts = names_of(make_retrieval_model(contrastive_loss="sigmoid"))
    assert parts["rest"] == NORMS | {"logit_scale", "logit_bias"}
    assert parts["connector"] == PROJECTOR


def test_language_models_have_no_connector():
    parts = names_of(in_tree_moe.make_mixtral())
    layer = "model.layers.N"
    assert parts == {
        "embeddings": {"model.embed_tokens.weight", "lm_head.weight"},
        "attention": {f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo"},
        "experts": stack(f"{layer}.mlp.experts"),
        "routers": {f"{layer}.mlp.gate.weight"},
        "rest": {f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight", "model.norm.weight"},
    }


def test_shared_experts_of_other_models_are_experts():
    parts = names_of(in_tree_moe.make_aria())
    block = "model.layers.N.mlp"
    stacks = {f"{block}.experts.fc1.weight", f"{block}.experts.fc2.weight"}
    assert parts["routers"] == {f"{block}.router.weight"}
    assert parts["experts"] - network(f"{block}.shared_experts") <= stacks | stack(f"{block}.experts")
    assert parts["experts"] >= network(f"{block}.shared_experts")


def test_router_biases_of_other_models_are_routers():
    parts = names_of(in_tree_moe.make_gpt_oss())
    assert parts["routers"] == {"model.layers.N.mlp.router.weight", "model.layers.N.mlp.router.bias"}


@pytest.mark.parametrize("kind", sorted(set(in_tree_models.MODELS) | {"qwen3_vl_moe"}))
def test_other_in_tree_models_have_the_parts_of_a_vision_language_model(kind):
    parts = names_of(in_tree_models.make_model(kind))
    decoder = {name for part in ("attention", "embeddings", "rest") for name in parts[part]}
    assert all(name.startswith(("model.language_model.", "model.text_model.", "lm_head.")) for name in decoder)
    assert parts["vision_encoder"]
    assert parts["connector"]
    assert all(".self_attn." in name or ".cross_attn." in name for name in parts["attention"])
    assert ("routers" in parts) == (kind == "qwen3_vl_moe")


def test_all_encoders_of_images_and_videos_are_the_vision_encoder():
    parts = names_of(structure("video_llava", AutoModelForImageTextToText))
    towers = {".".join(name.split(".")[:2]) for name in parts["vision_encoder"]}
    assert towers == {"model.image_tower", "model.video_tower"}
    assert parts["connector"] == PROJECTOR


def test_text_encoders_have_the_parts_of_decoders():
    parts = names_of(structure("t5gemma2", AutoModelForImageTextToText))
    assert {name.split(".")[2] for name in parts["vision_encoder"]} == {"vision_tower"}
    assert {name.split(".")[2] for name in parts["connector"]} == {"multi_modal_projector"}
    for part in ("attention", "embeddings", "rest"):
        assert {"encoder", "decoder"} <= {name.split(".")[1] for name in parts[part]}, part
    assert all(".self_attn." in name for name in parts["attention"])


def test_vision_encoders_can_consist_of_several_encoders():
    parts = names_of(structure("deepseek_ocr2", AutoModelForImageTextToText))
    assert {".".join(name.split(".")[:2]) for name in parts["vision_encoder"]} == {"model.vision_tower"}
    assert not any(name.startswith("model.vision_tower.") for name in parts["connector"])


def test_experts_that_do_not_run_through_the_experts_interface():
    parts = names_of(structure("llama4", AutoModelForImageTextToText))
    block = "language_model.model.layers.N.feed_forward"
    assert parts["experts"] == stack(f"{block}.experts") | network(f"{block}.shared_expert")
    assert parts["routers"] == {f"{block}.router.weight"}


def test_routers_with_statistics():
    parts = names_of(in_tree_moe.make_ernie())
    gates = {name for name in parts["routers"] if name.endswith(".gate.weight")}
    statistics = {name.replace(".weight", ".moe_statics.e_score_correction_bias") for name in gates}
    assert len(gates) == 2
    assert parts["routers"] == gates | statistics
    assert parts["experts"] == set.union(*(stack(name.replace(".gate.weight", ".experts")) for name in gates))


def test_adapters_belong_to_the_part_that_they_adapt():
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    parts = model_parts(model)
    adapters = {part: sum("lora" in name for name in names) for part, names in parts.items()}
    assert {part: number for part, number in adapters.items() if number} == {"vision_encoder": 2, "attention": 4}
    assert sum(map(len, parts.values())) == len(list(model.parameters()))


def test_tied_embeddings_are_one_parameter():
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert names_of(model)["embeddings"] == {"model.language_model.embed_tokens.weight"}


@pytest.mark.parametrize("method", ["get_input_embeddings", "get_output_embeddings"])
def test_a_class_that_does_not_name_its_embeddings_has_parts(method, monkeypatch):
    def unknown(self):
        raise NotImplementedError

    model = make_dense("llava")
    expected = model_parts(model)
    monkeypatch.setattr(type(model), method, unknown)
    parts = model_parts(model)
    # The embedding of tokens is still found by its class, but the head is not.
    assert set(parts["embeddings"]) == EMBEDDINGS - ({"lm_head.weight"} if method == "get_output_embeddings" else set())
    assert sum(map(len, parts.values())) == sum(map(len, expected.values()))
