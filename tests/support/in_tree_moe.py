"""Small random mixtures of experts of Transformers and of ours, and inputs for them."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.aria.configuration_aria import AriaTextConfig
from transformers.models.aria.modeling_aria import AriaTextForCausalLM

from tests.support.in_tree_models import IMAGE, QWEN, QWEN_TEXT, TEXT
from tests.support.models import make_inputs as make_our_inputs
from tests.support.models import make_model as make_ours

NUM_EXPERTS = 8
# Width of an expert.
WIDTH = 24


def make_qwen3_moe(num_experts=NUM_EXPERTS, width=WIDTH, **sizes):
    config = {"moe_intermediate_size": width, "num_experts": num_experts, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT | config | sizes))


def make_qwen3_vl_moe(num_experts=NUM_EXPERTS, width=WIDTH, **sizes):
    text = QWEN_TEXT | {"moe_intermediate_size": width, "num_experts": num_experts} | sizes
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, **QWEN))


def make_mixtral(num_experts=NUM_EXPERTS, width=WIDTH, **sizes):
    config = {"intermediate_size": width, "num_local_experts": num_experts, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**TEXT | config | sizes))


def make_olmoe(num_experts=NUM_EXPERTS, width=WIDTH, **sizes):
    config = {"intermediate_size": width, "num_experts": num_experts, "num_experts_per_tok": 2}
    return OlmoeForCausalLM(OlmoeConfig(**TEXT | config | sizes))


def make_aria(num_experts=NUM_EXPERTS, width=WIDTH, **sizes):
    """Has stacks of shape `(E, in, out)`."""
    config = {"intermediate_size": width, "moe_num_experts": num_experts, "moe_topk": 2, "moe_num_shared_experts": 1}
    return AriaTextForCausalLM(AriaTextConfig(**TEXT | config | sizes))


def make_gpt_oss(num_experts=NUM_EXPERTS, width=WIDTH, **sizes):
    """Has stacks of shape `(E, in, out)` with biases, in which gate and up rows alternate."""
    config = {"intermediate_size": width, "num_local_experts": num_experts, "num_experts_per_tok": 2}
    model = GptOssForCausalLM(GptOssConfig(**TEXT | config | {"sliding_window": 6} | sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:  # initialised to zero
                parameter.normal_(std=0.2)
    return model


def make_ernie(num_experts=NUM_EXPERTS, width=WIDTH, **sizes):
    """Has two banks of experts of different widths, one for text and one for images."""
    text = TEXT | {
        "moe_intermediate_size": [width, width - 8],
        "moe_num_experts": num_experts,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "mlp_layer_types": ["sparse", "sparse"],
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "patch_size": 4}
    config = Ernie4_5_VLMoeConfig(
        text_config=text | sizes,
        vision_config=vision | {"initializer_range": 0.2},
        image_token_id=IMAGE,
        image_start_token_id=5,
        image_end_token_id=6,
        video_token_id=4,
        video_start_token_id=7,
        video_end_token_id=8,
    )
    return Ernie4_5_VLMoeForConditionalGeneration(config)


MODELS = {
    "qwen3_vl_moe": make_qwen3_vl_moe,
    "qwen3_moe": make_qwen3_moe,
    "mixtral": make_mixtral,
    "olmoe": make_olmoe,
    "aria": make_aria,
    "gpt_oss": make_gpt_oss,
    "ernie4_5_vl_moe": make_ernie,
    "joint": lambda **sizes: make_ours(**_ours(expert_groups="joint", **sizes)),
    "isolated": lambda **sizes: make_ours(**_ours(expert_groups="isolated", **sizes)),
}


def _ours(num_experts=NUM_EXPERTS, width=WIDTH, **sizes):
    return {"num_experts": num_experts, "moe_intermediate_size": width} | sizes


def make_model(name: str, seed: int = 0, **sizes):
    """
    Args:
        name (`str`): One of [`MODELS`].
        seed (`int`): Seed of the weights.
        **sizes: `num_experts`, `width` (of an expert) and any field of the text configuration.
    """
    torch.manual_seed(seed)
    return MODELS[name](**sizes).eval()


def make_inputs(model, batch_size: int = 2, length: int = 14) -> dict[str, torch.Tensor]:
    """Returns text, with image tokens if the model has experts for them."""
    if model.config.model_type == "sparse_moe_vlm":
        return make_our_inputs(batch_size=batch_size, length=length)
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(9, 99, (batch_size, length), generator=generator)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if model.config.model_type == "ernie4_5_vl_moe":
        # The bank of each token. Images themselves would not test anything else.
        is_image = torch.rand(input_ids.shape, generator=generator) < 0.4
        inputs["moe_mm_token_type_ids"] = is_image.int()
    return inputs


def experts_of(model) -> dict[str, torch.nn.Module]:
    """Returns the modules with stacks of experts, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(type(module), "is_transposed") or "is_transposed" in module.__dict__
    }


def device_map_of(model, experts: str) -> dict[str, str]:
    """Returns a device map with the experts in one place and everything else in memory. Entries must not be nested."""
    modules, places = experts_of(model), {}
    for name, _ in model.named_modules():
        inside = [other for other in modules if f"{other}.".startswith(f"{name}." if name else "")]
        if (not inside or name in modules) and not any(f"{name}.".startswith(f"{place}.") for place in places):
            places[name] = experts if name in modules else "cpu"
    return places


def adapt(model, seed: int = 0, **config):
    """Returns the model with a PEFT LoRA adapter on its experts, with random factors."""
    defaults = {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    adapted = get_peft_model(model, LoraConfig(**defaults | config))
    randomise(adapted, seed)
    return adapted


def randomise(model, seed: int = 0, adapter: str = "default", std: float = 0.3):
    """Sets the factors of an adapter to random values that are large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and f".{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def adapter_tensors(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def logits_and_gradients(model, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the logits, and the gradients of all adapter tensors."""
    model.zero_grad()
    logits = model(**inputs).logits
    (logits.float().sin() * 3).sum().backward()
    gradients = {
        name: tensor.grad.clone() for name, tensor in adapter_tensors(model).items() if tensor.grad is not None
    }
    return logits.detach(), gradients


def assert_equal(got, expected, tolerance: float = 1e-5):
    """Compares tensors, or all tensors of dictionaries, relative to the largest element."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name in expected:
            assert expected[name].any(), name
            error = (got[name] - expected[name]).abs().max() / expected[name].abs().max()
            assert error <= tolerance, (name, error.item())
        return
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, error.item()
