"""
Models called as the Transformers backends of vLLM 0.33 and SGLang 0.5.23 call them, which need a GPU.

Both put the tokens of several requests into one row, with an attention function that separates them, and replace the
modules `experts` by fused ones. vLLM merges image features into the embeddings and passes no `mm_token_type_ids`.
SGLang passes token ids, pixel values and `mm_token_type_ids`.
"""

import ast
import inspect
import textwrap

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel
from transformers.models.llama.modeling_llama import LlamaAttention, repeat_kv

from modeling_sparse_moe_vlm import input_checks, modeling_upcycled
from modeling_sparse_moe_vlm.attention import SparseMoeVlmAttention
from tests.support import upcycled
from tests.support.models import make_inputs, make_model
from tests.support.processors import make_image, make_processor, make_speaking_model

WARNING = "`inputs_embeds` came without `mm_token_type_ids`"
IMAGE_TOKEN_ID = 3
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
    """Has the signature of the engines' fused experts, and computes what the replaced experts do."""

    def __init__(self, experts: nn.Module, num_experts: int):
        super().__init__()
        self.replaced = [experts]  # not a submodule
        self.num_experts = num_experts
        self.calls = 0

    def forward(self, hidden_states, topk_ids, topk_weights, **kwargs):
        assert not kwargs
        self.calls += 1
        assert topk_ids.max() < self.num_experts, "kernels read the weights of this expert"
        return self.replaced[0](hidden_states, topk_ids.to(torch.int32).long(), topk_weights.to(torch.float32))


class EngineLayer:
    """The attention of one layer in an engine, which knows the lengths of the requests."""

    def __init__(self, lengths: list[int]):
        self.lengths, self.calls = lengths, 0

    def forward(self, module, query, key, value, scaling):
        self.calls += 1
        key, value = (repeat_kv(states, query.shape[1] // key.shape[1]) for states in (key, value))
        blocks = [torch.ones(length, length, dtype=torch.bool).tril() for length in self.lengths]
        mask = torch.block_diag(*blocks).bool()
        output = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
        return output.transpose(1, 2), None


def vllm_attention(module, query, key, value, attention_mask, **kwargs):
    # vLLM takes the scale from the size of the heads if it does not find another one.
    return module.engine_layer.forward(module, query, key, value, module.head_dim**-0.5)


def sglang_attention(module, query, key, value, attention_mask, scaling, attention_instances, forward_batch, **kwargs):
    assert forward_batch == "batch"
    return attention_instances[module.layer_idx].forward(module, query, key, value, scaling)


AttentionInterface.register("vllm", vllm_attention)
AttentionInterface.register("sglang", sglang_attention)


def run(model, lengths: list[int], engine: str, **inputs) -> torch.Tensor:
    """Returns the logits of one row that contains requests of these lengths."""
    text_config = model.config.get_text_config()
    text_config._attn_implementation = engine
    layers = [EngineLayer(lengths) for _ in range(text_config.num_hidden_layers)]
    if engine == "sglang":
        inputs |= {"attention_instances": dict(enumerate(layers)), "forward_batch": "batch"}
    for module in model.model.modules():
        if isinstance(module, SparseMoeVlmAttention | LlamaAttention):
            module.engine_layer = layers[module.layer_idx]
    hidden_states = model.model(use_cache=False, return_dict=False, **inputs)[0]
    assert {layer.calls for layer in layers} == {1}, "every layer calls the engine's attention once"
    return model.lm_head(hidden_states)


def positions_of(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def vllm_logits(model, rows: list[torch.Tensor], pixel_values) -> torch.Tensor:
    """Returns the logits of several requests, from the calls that vLLM makes."""
    base, input_ids = model.model, torch.cat(rows)[None]
    features = base.get_image_features(pixel_values, return_dict=True).pooler_output
    embeds = base.get_input_embeddings()(input_ids)
    merged = embeds.masked_scatter((input_ids == IMAGE_TOKEN_ID)[..., None], torch.cat(list(features)))
    lengths = [len(row) for row in rows]
    return run(model, lengths, "vllm", input_ids=None, inputs_embeds=merged, position_ids=positions_of(lengths))


def sglang_logits(model, rows: list[torch.Tensor], pixel_values) -> torch.Tensor:
    """Returns the logits of several requests, from the call that SGLang makes."""
    input_ids, lengths = torch.cat(rows)[None], [len(row) for row in rows]
    return run(
        model,
        lengths,
        "sglang",
        input_ids=input_ids,
        inputs_embeds=None,
        position_ids=positions_of(lengths),
        pixel_values=pixel_values,
        mm_token_type_ids=(input_ids == IMAGE_TOKEN_ID).int(),
    )


def replace_experts(model) -> list[FusedExperts]:
    """Replaces every module named `experts`, as the engines do."""
    made = []
    for module in list(model.modules()):
        if isinstance(getattr(module, "experts", None), nn.Module):
            made.append(FusedExperts(module.experts, 4))
            module.experts = made[-1]
    return made


def make_case(kind: str, fields: dict):
    """Returns a model, the token ids of two requests with an image and one without, the pixel values and the logits."""
    if kind == "ours":
        model, inputs, logger = make_model(**fields), make_inputs(batch_size=2), input_checks.logger
    else:
        model, inputs = upcycled.make_few_experts("llava", **fields), upcycled.make_inputs("llava", padded=False)
        logger = modeling_upcycled.logger
    text = torch.arange(20, 25)
    with torch.no_grad():
        expected = [*model(**inputs).logits, model(input_ids=text[None]).logits[0]]
    logger.warning_once.cache_clear()
    return model, [*inputs["input_ids"], text], inputs["pixel_values"], torch.cat(expected)[None]


def cases(fields: dict) -> pytest.MarkDecorator:
    made = [("ours", value, f"ours, {name}") for name, value in fields.items()]
    made += [("upcycled", value, f"upcycled, {name}") for name, value in fields.items() if name != "priors"]
    return pytest.mark.parametrize(("kind", "fields"), [pytest.param(*case[:2], id=case[2]) for case in made])


@cases(RIGHT)
@pytest.mark.parametrize("is_fused", [False, True])
def test_arrangements_that_are_right_in_vllm(kind, fields, is_fused, caplog):
    model, rows, pixel_values, expected = make_case(kind, fields)
    fused = replace_experts(model) if is_fused else []
    assert len(fused) == (2 if is_fused else 0)
    with torch.no_grad():
        logits = vllm_logits(model, rows, pixel_values)
    torch.testing.assert_close(logits, expected)
    assert all(experts.calls == 1 for experts in fused)
    assert WARNING not in caplog.text


@cases(WRONG)
def test_arrangements_that_are_wrong_in_vllm_cause_a_warning(kind, fields, caplog):
    model, rows, pixel_values, expected = make_case(kind, fields)
    with torch.no_grad():
        logits = vllm_logits(model, rows, pixel_values)
    assert not torch.allclose(logits, expected, atol=1e-3)
    assert caplog.text.count(WARNING) == 1


GROUPS = RIGHT | {name: fields for name, fields in WRONG.items() if name != "priors"}


@cases(GROUPS)
def test_groups_by_modality_are_right_in_sglang(kind, fields, caplog):
    model, rows, pixel_values, expected = make_case(kind, fields)
    with torch.no_grad():
        logits = sglang_logits(model, rows, pixel_values)
    torch.testing.assert_close(logits, expected)
    assert WARNING not in caplog.text


@cases(RIGHT | {"hybrid": WRONG["hybrid"]})
def test_fused_groups_are_right_in_sglang(kind, fields):
    """Hybrid groups are one stack per layer. Others are several stacks, or have slots without an expert."""
    model, rows, pixel_values, expected = make_case(kind, fields)
    fused = replace_experts(model)
    with torch.no_grad():
        logits = sglang_logits(model, rows, pixel_values)
    torch.testing.assert_close(logits, expected)
    assert [experts.calls for experts in fused] == [1, 1]


def test_unequal_priors_are_an_error_in_sglang():
    model, rows, pixel_values, _ = make_case("ours", WRONG["priors"])
    with torch.no_grad(), pytest.raises(ValueError, match=r"engine 'sglang' keeps them itself: .*`alpha_init`"):
        sglang_logits(model, rows, pixel_values)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("kind", ["ours", "upcycled"])
def test_decoding_steps(kind, engine):
    """One token of each of several requests, at any positions; also the zeros with which engines measure memory."""
    model, _, _, _ = make_case(kind, RIGHT["joint"])
    tokens, positions = torch.tensor([[30, 41, 30, 0]]), torch.tensor([[17, 3, 4, 0]])
    with torch.no_grad():
        expected = [
            model(input_ids=tokens[:, i : i + 1], position_ids=positions[:, i : i + 1]).logits for i in range(4)
        ]
        logits = run(model, [1] * 4, engine, input_ids=tokens, inputs_embeds=None, position_ids=positions)
        torch.testing.assert_close(logits, torch.cat(expected, dim=1))
        zeros = torch.zeros_like(tokens)
        logits = run(model, [4], engine, input_ids=zeros, inputs_embeds=None, position_ids=zeros)
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits))


@pytest.mark.parametrize("kind", ["ours", "upcycled"])
@pytest.mark.parametrize("groups", ["joint", "isolated", "hybrid"])
def test_isolated_experts_are_not_one_stack_as_engines_need(kind, groups):
    """An engine fuses one stack per layer, with as many experts as the configuration says."""
    model, _, _, _ = make_case(kind, {"expert_groups": groups})
    stacks = [experts.replaced[0] for experts in replace_experts(model)]
    assert len(stacks) == 2
    for stack in stacks:
        shapes = {name: list(parameter.shape) for name, parameter in stack.named_parameters()}
        assert {len(shape) for shape in shapes.values()} == {3}
        if groups != "isolated":
            assert {name: shape[0] for name, shape in shapes.items()} == {"gate_up_proj": 4, "down_proj": 4}
            assert len(inspect.signature(stack.forward).parameters) == 3
        else:
            assert {name.rpartition(".")[2] for name in shapes} == {"gate_up_proj", "down_proj"}
            assert "gate_up_proj" not in shapes, "the stacks are those of the groups"


def test_fields_that_engines_read():
    """Engines take the sizes of the experts from these fields. They do not fuse the experts of upcycled models."""
    text_config = make_model().config.get_text_config()
    names = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "hidden_act", "norm_topk_prob"]
    assert [getattr(text_config, name) for name in names] == [4, 2, 24, "silu", True]
    text_config = upcycled.make_few_experts("llava").config.get_text_config()
    assert not any(hasattr(text_config, name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


@pytest.mark.parametrize("attention_class", [SparseMoeVlmAttention, LlamaAttention])
def test_attention_calls_the_function_of_the_engine_at_one_place(attention_class):
    """vLLM finds the attention layers in the source: one call of a variable with an entry of this interface."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(attention_class.forward)))
    looked_up = [
        ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value)
    ]
    assert len(looked_up) == 1
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == looked_up[0]]
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["ours", "upcycled"])
def test_modules_that_engines_look_for(kind, checkpoints):
    config = AutoConfig.from_pretrained(checkpoints[kind], trust_remote_code=True)
    base = AutoModel.from_config(config, trust_remote_code=True)  # the engines do not load the head
    assert base.get_decoder() is base.language_model
    assert base.get_encoder(modality="image") is base.vision_tower
    assert base._supports_attention_backend


SIZES = [(16, 16), (40, 12), (70, 33)]


@pytest.mark.parametrize("options", [{}, {"max_tiles": 4}, {"max_tiles": 4, "row_separator": "<|im_start|>"}])
def test_what_vllm_reads_from_the_processor(options):
    """The text that replaces each image, and which rows of `pixel_values` and of the features belong to it."""
    processor, model = make_processor(**options), make_speaking_model(expert_groups="joint")
    images = [make_image(number, *size) for number, size in enumerate(SIZES)]
    known = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
    text = "<image>" * len(images)
    inputs = processor(text=text, images=images, return_text_replacement_offsets=True, return_tensors="pt")
    (offsets,) = inputs["text_replacement_offsets"]
    tokenizer = processor.tokenizer
    replacements = [tokenizer.encode(entry["replacement"], add_special_tokens=False) for entry in offsets]
    assert [entry["type"] for entry in offsets] == ["image"] * len(images)
    assert [token for ids in replacements for token in ids] == inputs["input_ids"][0].tolist()
    assert [len(ids) for ids in replacements] == known["num_image_tokens"]
    assert set(inputs) == {
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "pixel_values",
        "text_replacement_offsets",
    }
    # vLLM cuts the pixels of each image, and processes the images in any other batches.
    rows = torch.split(inputs["pixel_values"], known["num_image_patches"])
    with torch.no_grad():
        features = [
            torch.cat(list(model.model.get_image_features(row, return_dict=True).pooler_output)) for row in rows
        ]
        together = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    # The token that is most frequent in a replacement stands for the features.
    frequent = [max(set(ids), key=ids.count) for ids in replacements]
    assert set(frequent) == {processor.image_token_id}
    assert [ids.count(processor.image_token_id) for ids in replacements] == [len(feature) for feature in features]
    torch.testing.assert_close(torch.cat(features), torch.cat(list(together)))
    assert len({sum(known["num_image_tokens"]), len(images)}) == 2
    largest = processor._get_num_multimodal_tokens(image_sizes=[(10_000, 10_000)])["num_image_tokens"][0]
    assert largest >= max(known["num_image_tokens"])
