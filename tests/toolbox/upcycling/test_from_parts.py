"""Our architecture from a language model of any class and a vision encoder, with the outputs of the language model."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    GenerationConfig,
    LlamaModel,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
)

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.upcycling import from_parts
from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from modeling_sparse_moe_vlm.toolbox.upcycling.from_parts import upcycle_from_parts
from tests.support.in_tree_models import make_llava
from tests.support.models import IMAGE_TOKEN_ID, TINY_DECODER, TINY_TOWER
from tests.support.processors import make_tokenizer

DECODER = TINY_DECODER | {"num_hidden_layers": 3, "head_dim": 8}
# By family: its type, its fields, and the attention fields that our configuration must have.
PLAIN = {"attention_bias": False, "attention_out_bias": False, "use_qk_norm": False, "nope_layers": []}
FAMILIES = {
    "llama": ("llama", {}, PLAIN),
    "llama with biases": (
        "llama",
        {"attention_bias": True},
        PLAIN | {"attention_bias": True, "attention_out_bias": True},
    ),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, PLAIN),
    "llama, scaled rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e3,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        PLAIN,
    ),
    "mistral": ("mistral", {"sliding_window": None}, PLAIN),
    "qwen2": ("qwen2", {}, PLAIN | {"attention_bias": True}),
    "qwen3": ("qwen3", {"head_dim": 12}, PLAIN | {"use_qk_norm": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}, PLAIN | {"nope_layers": [1]}),
    "phi3, fused": ("phi3", {}, PLAIN),
    "granite, scaled": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 5.0,
            "tie_word_embeddings": True,
        },
        PLAIN,
    ),
    "gemma": ("gemma", {}, PLAIN),
    "olmo": ("olmo", {}, PLAIN),
    "olmo, tied": ("olmo", {"tie_word_embeddings": True}, PLAIN),
}
TOWERS = {
    "clip": (AutoModel.from_config, CLIPVisionConfig),
    "siglip": (AutoModel.from_config, SiglipVisionConfig),
    "dinov2": (AutoModel.from_config, Dinov2WithRegistersConfig),
    "vit with a classifier": (ViTForImageClassification, ViTConfig),
}


def make_dense(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **fields):
    model_type, own, _ = FAMILIES.get(name, (name, {}, None))
    config = AutoConfig.for_model(model_type, **DECODER | own | fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases start at 0, and all norms start with the same values
            torch.nn.init.normal_(parameter, mean=0.6, std=0.3)
    model.generation_config.eos_token_id = None
    return model


def make_tower(name: str = "clip"):
    make, config_class = TOWERS[name]
    torch.manual_seed(1)
    return make(config_class(**TINY_TOWER)).eval()


def make_text(rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Returns two rows. The second is padded on the left."""
    input_ids = torch.randint(4, 99, (rows, length), generator=torch.Generator().manual_seed(2))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def assert_same_logits(model, dense, tolerance: float = 1e-5):
    text = make_text()
    real = text["attention_mask"].bool()
    with torch.no_grad():
        expected, actual = dense(**text).logits[real], model(**text).logits[real]
    actual = actual[:, : expected.shape[1]]
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    assert expected.std() > 0.05


def assert_same_answers(model, dense):
    expected, actual = (each.generate(**make_text(), max_new_tokens=8, do_sample=False) for each in (dense, model))
    assert torch.equal(actual, expected)
    assert len(set(expected[0].tolist())) > 3


# ---------------------------------------------------------------- language models


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_model_computes_the_same_as_the_language_model(family):
    dense = make_dense(family)
    model = upcycle_from_parts(dense)
    assert type(model) is SparseMoeVlmForCausalLM
    assert not model.training
    config = model.config
    assert {name: getattr(config, name) for name in PLAIN} == FAMILIES[family][2]
    assert config.sparse_layers == [0, 1, 2]
    assert config.modalities == ["text"]
    for field in ("vocab_size", "hidden_size", "max_position_embeddings", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(config, field) == getattr(dense.config, field), field
    assert config.rope_parameters | {"partial_rotary_factor": 1.0} == {
        **dense.config.rope_parameters,
        "partial_rotary_factor": 1.0,
    }
    assert_same_logits(model, dense)
    assert_same_answers(model, dense)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "request_",
    [
        {"expert_groups": "joint", "start": "copy"},
        {"expert_groups": "joint", "start": "split", "granularity": 2},
        {"expert_groups": "hybrid", "start": "residual", "layers": [0, 2]},
    ],
    ids=["copy", "split", "residual, a dense layer"],
)
def test_every_exact_start_keeps_the_outputs_of_every_family(family, request_):
    dense = make_dense(family)
    model = upcycle_from_parts(dense, num_experts=4, **request_)
    assert model.config.sparse_layers == request_.get("layers", [0, 1, 2])
    assert_same_logits(model, dense)


def test_weights_are_copied_to_the_right_place():
    dense = make_dense("qwen3", intermediate_size=40)
    before = copy.deepcopy(dense.state_dict())
    model = upcycle_from_parts(dense, layers=[1])
    ours, theirs = model.state_dict(), dense.state_dict()
    same = [name for name in theirs if ".1.mlp." not in name]
    assert set(ours) - set(same) == {name for name in ours if ".1.mlp." in name}
    for name in same:
        assert torch.equal(ours[name], theirs[name]), name
        assert ours[name].data_ptr() != theirs[name].data_ptr(), name
    for part in ("gate", "up", "down"):
        always_on = ours[f"model.layers.1.mlp.shared_experts.text.{part}_proj.weight"]
        assert torch.equal(always_on, theirs[f"model.layers.1.mlp.{part}_proj.weight"])
    assert model.config.intermediate_size == 40
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())


def test_the_language_model_stays_in_its_mode():
    dense = make_dense()
    dense.train()
    dense.model.layers[0].eval()
    upcycle_from_parts(dense)
    assert [dense.training, dense.model.layers[0].training, dense.model.layers[1].training] == [True, False, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())


def test_dropout_of_a_model_in_training_does_not_matter():
    dense = make_dense("smollm3", attention_dropout=0.5)
    model = upcycle_from_parts(dense.train())
    assert model.config.nope_layers == [1]
    assert model.config.attention_dropout == 0.5
    assert_same_logits(model, dense.eval())


@pytest.mark.parametrize("arrangement", ["joint", "isolated", "hybrid"])
def test_experts_of_every_modality_start_as_the_dense_block(arrangement):
    dense = make_dense("smollm3")
    model = upcycle_from_parts(dense, expert_groups=arrangement, num_experts=4, modalities=["text", "image"])
    text = make_text()
    with torch.no_grad():
        expected = dense(**text).logits
        for modality in (0, 1):
            actual = model(**text, mm_token_type_ids=torch.full_like(text["input_ids"], modality)).logits
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_experts_that_do_not_start_exactly_leave_the_rest_exact():
    dense = make_dense("granite, scaled")
    model = upcycle_from_parts(dense, expert_groups="joint", start="drop", drop_ratio=0.5, seed=3)
    text = make_text()
    with torch.no_grad():
        expected, actual = dense(**text).logits, model(**text).logits
    assert 0.01 < ((actual - expected).abs().max() / expected.abs().max()) < 2
    attention = model.model.layers[1].self_attn.o_proj.weight
    torch.testing.assert_close(attention, 0.4 * dense.model.layers[1].self_attn.o_proj.weight)
    assert_same_logits(upcycle_from_parts(dense, expert_groups="joint", start="drop", drop_ratio=0.0), dense)


def test_layers_that_share_a_pool_start_from_the_block_of_the_first():
    dense = make_dense()
    with torch.no_grad():
        dense.model.layers[2].mlp.load_state_dict(dense.model.layers[1].mlp.state_dict())
    model = upcycle_from_parts(
        dense, expert_groups="joint", start="copy", expert_pool=[None, 7, 7], pool_start="first", num_experts=4
    )
    assert list(model.model.expert_pools) == ["7"]
    assert_same_logits(model, dense)


def test_only_the_seed_determines_random_weights():
    dense, tower = make_dense(), make_tower()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = upcycle_from_parts(dense, tower, image_token_id=3, seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, other = (upcycle_from_parts(dense, tower, image_token_id=3, seed=seed) for seed in (1, 2))
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    differ = {name.split(".")[-2] for name in states[0] if not torch.equal(states[0][name], states[2][name])}
    assert differ == {"linear_1", "linear_2", "gate"}


@pytest.mark.parametrize("family", ["llama", "gemma", "olmo"])
@pytest.mark.parametrize("start", ["copy", "split"])
def test_bfloat16_stays_within_its_rounding(family, start):
    dense = make_dense(family, torch.bfloat16)
    model = upcycle_from_parts(dense, expert_groups="joint", num_experts=4, start=start)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}
    if family == "llama" and start == "copy":
        assert_same_logits(model.float(), dense.float())
    else:
        assert_same_logits(model.float(), dense.float(), 2e-2)


def test_router_rows_come_from_data():
    dense = make_dense()
    batch = [make_text(), make_text(3)]
    model = upcycle_from_parts(dense, router_init="data", batch=batch)
    other = upcycle_from_parts(dense)
    rows, random = (each.model.layers[1].mlp.gate.weight for each in (model, other))
    assert rows.shape == random.shape == (8, 32)
    assert (rows - random).abs().max() > 0.01
    assert_same_logits(model, dense)
    one = upcycle_from_parts(dense, router_init="data", batch=batch, layers=[1], modalities=["text", "image"])
    assert torch.equal(one.model.layers[1].mlp.gate.weight, rows)
    with pytest.raises(UpcyclingError, match=r"`batch` has no tokens of \['image'\]"):
        upcycle_from_parts(
            dense, make_tower(), image_token_id=3, router_init="data", batch=batch, expert_groups="isolated"
        )


def test_generation_settings_and_token_ids_are_carried_over():
    dense = make_dense(eos_token_id=[2, 5], pad_token_id=-1)
    dense.generation_config = GenerationConfig(
        eos_token_id=[2, 5], temperature=0.3, do_sample=True, suppress_tokens=[9]
    )
    text = upcycle_from_parts(dense)
    assert text.config.eos_token_id == [2, 5]
    assert text.config.bos_token_id == 1
    assert text.config.pad_token_id is None
    assert text.generation_config.to_dict() == dense.generation_config.to_dict()
    assert text.generation_config is not dense.generation_config
    model = upcycle_from_parts(dense, make_tower(), image_token_id=3)
    assert model.generation_config.suppress_tokens == [9, 3]
    assert model.generation_config.temperature == 0.3
    assert dense.generation_config.suppress_tokens == [9]


def test_the_configuration_has_the_receipt(tmp_path):
    dense, tower = make_dense(), make_tower()
    dense.name_or_path, tower.name_or_path = "some/language-model", "some/encoder"
    exact = upcycle_from_parts(dense, tower, image_token_id=3, expert_groups="joint", start="split", seed=4)
    start = exact.config.text_config.start
    parity = start.pop("parity")
    assert start == {
        "name": "split",
        "granularity": 2,
        "seed": 4,
        "router_init": "random",
        "base_model": "some/language-model",
        "vision_encoder": "some/encoder",
    }
    assert parity["relative_difference"] < 1e-6
    assert (parity["bound"], parity["same_tokens"], parity["num_tokens"]) == (1e-5, 1.0, 32)
    start["parity"] = parity
    exact.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).text_config.start == start
    drop = upcycle_from_parts(dense, expert_groups="joint", start="drop").config.start
    assert (drop["name"], drop["drop_ratio"], drop["parity"]["bound"]) == ("drop", 0.5, None)
    assert drop["parity"]["relative_difference"] > 1e-2
    assert drop["parity"]["num_tokens"] == 16
    assert "vision_encoder" not in drop


# ---------------------------------------------------------------- vision encoders


@pytest.mark.parametrize("tower", TOWERS)
def test_the_outputs_of_the_vision_encoder_and_of_text_do_not_change(tower):
    dense, encoder = make_dense("qwen2"), make_tower(tower)
    model = upcycle_from_parts(dense, encoder, image_token_id=IMAGE_TOKEN_ID)
    assert type(model) is SparseMoeVlmForConditionalGeneration
    assert model.config.text_config.modalities == ["text", "image"]
    assert_same_logits(model, dense)
    assert_same_answers(model, dense)
    pixel_values = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = encoder.base_model(pixel_values).last_hidden_state
        actual = model.model.vision_tower(pixel_values).last_hidden_state
    assert torch.equal(actual, expected)
    input_ids = torch.tensor([[5, 3, 3, 3, 3, 7], [8, 3, 3, 3, 3, 9]])
    with torch.no_grad():
        logits = model(input_ids=input_ids, pixel_values=pixel_values).logits
        blank = model(input_ids=input_ids, pixel_values=torch.zeros_like(pixel_values)).logits
    assert logits.isfinite().all()
    assert (logits - blank)[:, -1].abs().max() > 1e-3
    assert torch.equal(logits[:, 0], blank[:, 0])


def test_the_vision_encoder_of_another_model():
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(vision_config=TINY_TOWER, text_config=text))
    model = upcycle_from_parts(make_dense(), clip, image_token_id=3)
    assert type(model.model.vision_tower).__name__ == "CLIPVisionModel"
    expected = clip.vision_model.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.model.vision_tower.state_dict().items())


@pytest.mark.parametrize(("patch_size", "factor"), [(4, 2), (5, 3), (3, 1)])
def test_the_connector_merges_as_many_patches_as_possible(patch_size, factor):
    encoder = AutoModel.from_config(CLIPVisionConfig(**TINY_TOWER | {"patch_size": patch_size}))
    model = upcycle_from_parts(make_dense(), encoder, image_token_id=3)
    assert model.config.pixel_shuffle_factor == factor
    chosen = upcycle_from_parts(make_dense(), encoder, image_token_id=3, pixel_shuffle_factor=1)
    assert chosen.config.pixel_shuffle_factor == 1


def test_fields_reach_every_part():
    model = upcycle_from_parts(
        make_dense(),
        make_tower(),
        image_token_id=3,
        projector_hidden_act="relu",
        multimodal_projector_bias=False,
        learned_modality_priors=True,
        alpha_init=0.7,
        max_position_embeddings=128,
        router="sigmoid",
        num_experts=6,
        num_experts_per_tok=3,
        router_aux_loss_coef=0.05,
    )
    config = model.config
    assert (config.projector_hidden_act, config.multimodal_projector_bias) == ("relu", False)
    text = config.text_config
    assert (text.learned_modality_priors, text.alpha_init, text.max_position_embeddings) == (True, 0.7, 128)
    assert (text.router, text.num_experts, text.num_experts_per_tok, text.router_aux_loss_coef) == (
        "sigmoid",
        6,
        3,
        0.05,
    )
    priors = model.model.language_model.layers[2].self_attn.modality_log_priors
    expected = torch.tensor([0.5, 0.7]).log()
    torch.testing.assert_close(priors[0] - priors[0].mean(), expected - expected.mean())


def test_a_model_from_parts_trains_in_every_part():
    model = upcycle_from_parts(make_dense("qwen2"), make_tower(), image_token_id=3, output_router_logits=True).train()
    input_ids = torch.tensor([[5, 3, 3, 3, 3, 7, 11, 12], [8, 3, 3, 3, 3, 9, 13, 14]])
    pixel_values = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    model(input_ids=input_ids, pixel_values=pixel_values, labels=input_ids).loss.backward()
    # The pooled output is not used. Routed experts start with zero outputs, so their inputs have no gradients yet.
    without = {
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    }
    assert {name for name in without if ".post_layernorm." not in name} == {
        f"model.language_model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(3)
    }


# ---------------------------------------------------------------- the image token


def test_a_new_image_token_gets_its_own_row():
    tokenizer = make_tokenizer(image_token="<picture>")
    dense = make_dense(vocab_size=len(tokenizer))
    model = upcycle_from_parts(dense, make_tower(), tokenizer=tokenizer)
    assert tokenizer.convert_tokens_to_ids("<image>") == len(tokenizer) - 1 == dense.config.vocab_size
    assert model.config.image_token_id == len(tokenizer) - 1
    assert model.config.text_config.vocab_size == len(tokenizer)
    assert tokenizer.added_tokens_decoder[len(tokenizer) - 1].special
    assert not tokenizer.added_tokens_decoder[len(tokenizer) - 1].normalized
    for ours, theirs in (
        (model.get_input_embeddings(), dense.get_input_embeddings()),
        (model.get_output_embeddings(), dense.get_output_embeddings()),
    ):
        assert torch.equal(ours.weight[:-1], theirs.weight)
        torch.testing.assert_close(ours.weight[-1], theirs.weight.mean(dim=0))
    assert_same_logits(model, dense)


def test_a_spare_row_is_used():
    tokenizer = make_tokenizer(image_token="<picture>")
    dense = make_dense(vocab_size=len(tokenizer) + 7)
    model = upcycle_from_parts(dense, make_tower(), tokenizer=tokenizer)
    assert model.config.image_token_id == len(tokenizer) - 1
    assert model.config.text_config.vocab_size == len(tokenizer) + 6
    tied = upcycle_from_parts(make_dense("llama, tied"), make_tower(), image_token_id=99)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert tied.lm_head.weight.shape == (100, 32)


def test_an_existing_token_is_used():
    tokenizer = make_tokenizer(image_token="<picture>")
    dense = make_dense(vocab_size=len(tokenizer))
    model = upcycle_from_parts(dense, make_tower(), tokenizer=tokenizer, image_token="<picture>")
    assert model.config.image_token_id == 3
    assert model.config.text_config.vocab_size == len(tokenizer) == dense.config.vocab_size
    assert upcycle_from_parts(make_dense(), tokenizer=make_tokenizer()).config.vocab_size == 99  # a text model
    by_id = upcycle_from_parts(dense, make_tower(), image_token_id=dense.config.vocab_size + 1)
    assert by_id.config.text_config.vocab_size == dense.config.vocab_size + 2


# ---------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("family", ["qwen2", "smollm3", "granite, scaled"])
def test_a_text_model_is_loaded_from_its_folder(family, tmp_path):
    model = upcycle_from_parts(make_dense(family))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "SparseMoeVlmForCausalLM"
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    text = make_text()
    assert torch.equal(loaded(**text).logits, model(**text).logits)


def test_a_vision_language_model_is_loaded_from_its_folder(tmp_path):
    model = upcycle_from_parts(make_dense("qwen3"), make_tower("vit with a classifier"), image_token_id=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    expected, actual = model.state_dict(), loaded.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


# ---------------------------------------------------------------- refusals


def with_bias_in_the_head():
    model = make_dense()
    model.lm_head = torch.nn.Linear(32, 99)
    return model


def with_two_epsilons():
    model = make_dense()
    model.model.layers[1].post_attention_layernorm.variance_epsilon = 1e-3
    return model


def with_another_attention():
    model = make_dense()
    model.model.layers[2].self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(32))
    return model


REFUSED = {
    "a window": (
        lambda: make_dense("mistral", sliding_window=64),
        r"attends to the last 64 tokens.*set `language_model.config.sliding_window = None`",
    ),
    "layers with a window": (
        lambda: make_dense("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1),
        r"Qwen2ForCausalLM has layers with sliding_attention",
    ),
    "norms after": (
        lambda: make_dense("olmo2"),
        r"layer 0 of Olmo2ForCausalLM runs self_attn, post_attention_layernorm, mlp, post_feedforward_layernorm",
    ),
    "side by side": (lambda: make_dense("cohere"), r"CohereForCausalLM runs input_layernorm, self_attn, mlp, in this"),
    "more in attention": (
        lambda: make_dense("doge"),
        r"attention in layer 0 of DogeForCausalLM runs .*self_attn.dt_proj",
    ),
    "biases of norms": (
        lambda: make_dense("stablelm"),
        r"`model.layers.0.input_layernorm` \(LayerNorm\) has parameters .*\['bias'\]",
    ),
    "another rotation": (
        lambda: make_dense("helium"),
        r"weights of HeliumForCausalLM computes something else after layer 0, for tokens of 'text'",
    ),
    "part of each head": (
        lambda: make_dense("phi3", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        r"rotates a part of each head",
    ),
    "biases of the feed-forward block": (lambda: make_dense("llama", mlp_bias=True), r"linear layers with biases"),
    "a mixture": (lambda: make_dense("mixtral"), r"already a mixture of experts"),
    "no head": (lambda: make_dense().model, r"LlamaModel has no language head"),
    "a head with a bias": (with_bias_in_the_head, r"the language head of LlamaForCausalLM has a bias"),
    "images": (make_llava, r"LlavaForConditionalGeneration reads more than text.*`upcycle`"),
    "no weights": (lambda: make_dense().to("meta"), r"on the meta device"),
    "not a model": (lambda: torch.nn.Linear(3, 3), r"must be a model of Transformers, got Linear"),
    "two epsilons": (with_two_epsilons, r"the norms of LlamaForCausalLM have the epsilons \[1e-06, 0.001\]"),
    "two kinds of attention": (with_another_attention, r"attention in layer 2 of LlamaForCausalLM has .*in layer 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_decoders_are_refused_with_the_reason(case):
    make, message = REFUSED[case]
    with pytest.raises(UpcyclingError, match=message):
        upcycle_from_parts(make())


def test_a_window_that_covers_every_text_is_ignored():
    dense = make_dense("mistral", sliding_window=256)
    assert_same_logits(upcycle_from_parts(dense), dense)


def test_a_difference_at_late_positions_is_found():
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    dense = make_dense("ministral3", rope_parameters=rope)
    with pytest.raises(UpcyclingError, match="something else after layer 0"):
        upcycle_from_parts(dense)
    assert_same_logits(upcycle_from_parts(dense, max_position_embeddings=64), dense)


def test_the_error_for_a_wrong_start_names_the_layer(monkeypatch):
    right = from_parts.start_experts

    def wrong(model, *args):
        right(model, *args)
        with torch.no_grad():
            model.model.layers[1].mlp.shared_experts["image"].down_proj.weight[3, 4] += 0.1

    monkeypatch.setattr(from_parts, "start_experts", wrong)
    with pytest.raises(UpcyclingError, match="something else after layer 1, for tokens of 'image'"):
        upcycle_from_parts(make_dense(), modalities=["text", "image"])


WRONG = [
    ({"num_experts_per_token": 2}, r"`num_experts_per_token` is not a field.*did you mean `num_experts_per_tok"),
    ({"hidden_size": 64}, r"`hidden_size` is taken from the language model"),
    ({"rope_parameters": {}}, r"`rope_parameters` is taken from the language model"),
    ({"pixel_shuffle_factor": 2}, r"`pixel_shuffle_factor` is for images: pass a vision encoder"),
    ({"router_init": "zeros"}, r'`router_init` must be "random" or "data", got \'zeros\''),
    ({"router_init": "data"}, r"belong together"),
    ({"batch": {}}, r"belong together"),
    ({"layers": [3]}, r"`layers` must be some of the layers 0 to 2, got \[3\]"),
    ({"layers": []}, r"`layers` must be some of the layers 0 to 2, got \[\]"),
    ({"start": "copies"}, r"`start` must be one of"),
    ({"alpha_init": 0}, r"`alpha_init` must be more than 0"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_requests_are_refused(fields, message):
    with pytest.raises(UpcyclingError, match=message):
        upcycle_from_parts(make_dense(), **fields)


def test_wrong_requests_about_images_are_refused():
    dense, tower = make_dense(), make_tower()
    with pytest.raises(UpcyclingError, match="give `tokenizer`, or `image_token_id`"):
        upcycle_from_parts(dense, tower)
    with pytest.raises(UpcyclingError, match="both say which token"):
        upcycle_from_parts(dense, tower, tokenizer=make_tokenizer(), image_token_id=3)
    with pytest.raises(UpcyclingError, match=r"`image_token_id` .* is also `text_config.pad_token_id`"):
        upcycle_from_parts(dense, tower, image_token_id=0)
    swin = AutoModel.from_config(SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[1]))
    with pytest.raises(UpcyclingError, match=r"SwinModel cannot be the vision encoder: .*merges patches"):
        upcycle_from_parts(dense, swin, image_token_id=3)
    other = make_tower()
    other.config.num_hidden_layers = 2
    with pytest.raises(UpcyclingError, match=r"weights of CLIPVisionModel are not those of .*layers.1.*13 more differ"):
        upcycle_from_parts(dense, other, image_token_id=3)
    with pytest.raises(UpcyclingError, match="LlamaModel cannot be the vision encoder"):
        upcycle_from_parts(dense, dense.model, image_token_id=3)
    assert isinstance(dense.model, LlamaModel)
