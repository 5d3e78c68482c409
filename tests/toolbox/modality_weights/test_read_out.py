"""α and β of models of Transformers: equal to those of eager attention, without changes to outputs, and steered."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers.integrations import flex_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_sparse_moe_vlm.cache_name import CACHE_NAME
from modeling_sparse_moe_vlm.distributed_attention import merge
from modeling_sparse_moe_vlm.toolbox.modality_weights import MODALITIES, ModalityWeights, Step, modality_weights
from tests.support.in_tree_models import (
    GREEDY,
    IMAGE,
    MODELS,
    TEXT,
    VIDEO,
    WINDOW,
    make_gemma3,
    make_gemma4,
    make_inputs,
    make_llava,
    make_mllama,
    make_mllama_inputs,
    make_model,
    prepare,
)


@pytest.fixture(autouse=True)
def _default_stance():
    yield
    torch.compiler.set_stance("default")


every_model = pytest.mark.parametrize("name", MODELS)


def expected_weights(attentions: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns plain and count-free weights from eager attention `(B, H, T, S)`, for keys of modality `ids (B, S)`."""
    is_of = torch.nn.functional.one_hot(ids, len(MODALITIES)).float()[:, None]
    weights = attentions @ is_of
    each = weights / ((attentions > 0).float() @ is_of).clamp(min=1)
    return weights, each / each.sum(dim=-1, keepdim=True)


def assert_close_where_real(ours, expected, attention_mask):
    real = attention_mask.bool()
    torch.testing.assert_close(ours.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=1e-4, atol=1e-5)


def assert_read_out(step, attentions, inputs):
    """Checks the weights of one forward pass against the attention matrices of the same pass."""
    ids = (inputs["input_ids"] == IMAGE).long()
    assert len(step.modality_weights) == len(attentions) == 2
    for layer, matrix in enumerate(attentions):
        weights, count_free = expected_weights(matrix, ids)
        real = weights[..., 1].transpose(1, 2)[inputs["attention_mask"].bool()]
        assert real.std() > 0.05, "attention is not uniform"
        assert_close_where_real(step.modality_weights[layer], weights, inputs["attention_mask"])
        assert_close_where_real(step.count_free_modality_weights[layer], count_free, inputs["attention_mask"])


# ---------------------------------------------------------------- read-out


@every_model
@torch.no_grad()
def test_weights_equal_those_of_eager_attention(name):
    model, inputs = make_model(name), make_inputs(name)
    plain = model(**inputs).logits
    with modality_weights(model) as weights:
        assert torch.equal(model(**inputs).logits, plain)
    model.set_attn_implementation({"text_config": "eager"})
    with modality_weights(model) as from_eager:
        outputs = model(**inputs, output_attentions=True)
    for read_out in (weights, from_eager):
        assert len(read_out.steps) == 1
        assert read_out.steps[0].modality_weights[0].shape == (2, 4, 14, 4)
        assert_read_out(read_out.steps[0], outputs.attentions, inputs)
    alpha, beta = weights.alpha, weights.beta
    assert alpha.shape == (2, 2, 4, 14)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close((alpha + beta).movedim(-1, 2)[:, real], torch.ones(2, int(real.sum()), 4))


@every_model
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generate(name, options):
    """Greedy and beam search, beyond the sliding window: the same tokens, and the weights of one pass over all."""
    if (name, *options) == ("paligemma2", "cache_implementation"):
        pytest.skip("PaliGemma 2 has no static cache in Transformers")
    model, inputs = make_model(name), make_inputs(name)
    plain = model.generate(**inputs, **GREEDY, **options)
    with modality_weights(model) as weights:
        assert torch.equal(model.generate(**inputs, **GREEDY, **options), plain)
    rows = 2 * options.get("num_beams", 1)
    assert [step.start for step in weights.steps] == [0, *range(14, 21)]
    assert weights.alpha.shape == (2, rows, 4, 21)
    assert [step.modality_weights[1].shape[2] for step in weights.steps] == [14] + [1] * 7
    if rows > 2:
        assert torch.equal(weights.steps[0].modality_ids[::2], (inputs["input_ids"] == IMAGE).long())
        return
    whole = inputs | {"input_ids": plain[:, :-1]}
    for key in {"attention_mask", "token_type_ids", "mm_token_type_ids"} & set(inputs):
        # In PaliGemma, only generated tokens do not see later tokens.
        value = 1 if key == "attention_mask" or name == "paligemma2" else 0
        whole[key] = torch.nn.functional.pad(inputs[key], (0, 7), value=value)
    ids = torch.nn.functional.pad((inputs["input_ids"] == IMAGE).long(), (0, 7))
    with torch.no_grad(), modality_weights(model, modality_ids=ids) as at_once:
        model(**whole)
    for count_free in (False, True):
        ours, expected = (each.of("image", count_free=count_free) for each in (weights, at_once))
        for layer in range(2):
            assert_close_where_real(ours[layer], expected[layer], whole["attention_mask"])


@torch.no_grad()
def test_a_static_window_that_is_not_full():
    torch.manual_seed(0)
    model, inputs = prepare(make_gemma3(sliding_window=18)), make_inputs("gemma3")
    both = []
    for options in ({}, {"cache_implementation": "static"}):
        with modality_weights(model) as weights:
            model.generate(**inputs, **GREEDY, **options)
        both.append(weights)
    for count_free in (False, True):
        dynamic, static = (each.of("image", count_free=count_free)[..., 4:] for each in both)
        torch.testing.assert_close(static, dynamic, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "paligemma2"])
@torch.no_grad()
def test_flex_attention(name, monkeypatch):
    # Without the compiler, which takes half a minute.
    torch.compiler.set_stance("force_eager")
    monkeypatch.setattr(
        flex_attention,
        "compile_friendly_flex_attention",
        lambda query, key, value, training=False, **kwargs: flex_attention.flex_attention(query, key, value, **kwargs),
    )
    model, inputs = make_model(name), make_inputs(name)
    model.set_attn_implementation({"text_config": "eager"})
    attentions = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation({"text_config": "flex_attention"})
    plain = model(**inputs).logits
    with modality_weights(model) as weights:
        assert torch.equal(model(**inputs).logits, plain)
    assert_read_out(weights.steps[0], attentions, inputs)


def windowed_attention(
    module, query, key, value, attention_mask, *, scaling, dropout=0.0, sliding_window=None, **kwargs
):
    """Like FlashAttention, takes padding `(B, S)` and a window, and lets the last query see the last key."""
    length, num_keys = query.shape[2], key.shape[2]
    last = torch.arange(num_keys - length, num_keys)[:, None]
    visible = (torch.arange(num_keys) <= last) & (torch.arange(num_keys) > last - sliding_window)
    visible = visible.expand(len(query), 1, -1, -1)
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None].bool()
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, visible, dropout=dropout, scaling=scaling)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_backends_with_a_window_instead_of_a_mask(padded, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "windowed", windowed_attention)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "windowed", flash_attention_mask)
    torch.manual_seed(0)
    model, inputs = prepare(make_llava(MistralConfig(**TEXT | {"sliding_window": WINDOW}))), make_inputs(padded=padded)
    model.set_attn_implementation({"text_config": "eager"})
    attentions = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation({"text_config": "windowed"})
    plain = model(**inputs).logits
    with modality_weights(model) as weights:
        assert torch.equal(model(**inputs).logits, plain)
    assert_read_out(weights.steps[0], attentions, inputs)
    # Several tokens after cached ones.
    with modality_weights(model) as weights:
        cache, start = None, 0
        for stop in (11, 12, 14):
            part = {"input_ids": inputs["input_ids"][:, start:stop]}
            if start == 0:
                part["pixel_values"] = inputs["pixel_values"]
            outputs = model(**part, attention_mask=inputs["attention_mask"][:, :stop], **{CACHE_NAME: cache})
            cache, start = outputs[CACHE_NAME], stop
    ids = (inputs["input_ids"] == IMAGE).long()
    for count_free in (False, True):
        alpha = weights.of("image", count_free=count_free)
        for layer, matrix in enumerate(attentions):
            expected = expected_weights(matrix, ids)[count_free][..., 1]
            assert_close_where_real(alpha[layer], expected, inputs["attention_mask"])


@torch.no_grad()
def test_attention_that_is_not_causal():
    """Without a mask, SDPA uses `is_causal` of the layer."""
    model, inputs = make_model(), make_inputs(padded=False)
    for layer in model.get_decoder().layers:
        layer.self_attn.is_causal = False
    with modality_weights(model) as weights:
        model(**inputs)
    alpha, beta = weights.alpha, weights.beta
    assert alpha[..., 0].min() > 0, "the first token sees the image after it"
    torch.testing.assert_close(weights.of("image", count_free=True), (alpha / 4) / (alpha / 4 + beta / 10))


@torch.no_grad()
def test_videos():
    model, inputs = make_model("qwen3_vl"), make_inputs("qwen3_vl")
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = VIDEO
    inputs["mm_token_type_ids"] *= 2
    inputs |= {"pixel_values_videos": inputs.pop("pixel_values"), "video_grid_thw": inputs.pop("image_grid_thw")}
    with modality_weights(model) as weights:
        model(**inputs)
    model.set_attn_implementation({"text_config": "eager"})
    attentions = model(**inputs, output_attentions=True).attentions
    for layer, matrix in enumerate(attentions):
        expected = expected_weights(matrix, inputs["mm_token_type_ids"])[0][..., 2]
        assert_close_where_real(weights.of("video")[layer], expected, inputs["attention_mask"])
    assert weights.alpha.eq(0).all()


def test_layers_that_skip_a_prompt():
    """Gemma 4 runs its last layers only on the last token, if the name of the backend and the mask allow it."""
    torch.manual_seed(0)
    model = prepare(make_gemma4())
    inputs = {name: make_inputs(padded=False)[name] for name in ("input_ids", "attention_mask")}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    for options in ({}, {"cache_implementation": "static"}):
        plain = model.generate(**inputs, **GREEDY, **options)
        with modality_weights(model) as weights:
            assert torch.equal(model.generate(**inputs, **GREEDY, **options), plain)
        ids = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 7))
        with torch.no_grad(), modality_weights(model, modality_ids=ids) as at_once:
            model(input_ids=plain[:, :-1], attention_mask=torch.ones_like(ids), mm_token_type_ids=ids)
        passes_over = weights.steps[0].modality_weights[2].shape[2] == 1  # not in every release
        assert weights.alpha[2:, ..., :13].isnan().all() == passes_over
        torch.testing.assert_close(weights.alpha[:2], at_once.alpha[:2], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(weights.alpha[..., 13:], at_once.alpha[..., 13:], rtol=1e-3, atol=1e-5)


def test_assisted_generation_leaves_out_rejected_tokens():
    model, inputs = make_model("gemma3"), {key: value[:1] for key, value in make_inputs("gemma3").items()}
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.05 * torch.randn(99, 32))
    with modality_weights(model) as one_by_one:
        plain = model.generate(**inputs, **GREEDY)
    with modality_weights(model) as weights:
        assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=assistant), plain)
    assert len(weights.steps) < len(one_by_one.steps)
    assert sum(step.modality_ids.shape[1] for step in weights.steps) > 21, "something was refused"
    torch.testing.assert_close(weights.alpha[..., :21], one_by_one.alpha, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sequences_one_after_the_other():
    model, inputs = make_model(), make_inputs(padded=False)
    first = inputs | {"input_ids": inputs["input_ids"][:, :11], "attention_mask": inputs["attention_mask"][:, :11]}
    with modality_weights(model) as weights:
        model.generate(**{name: value[:1] for name, value in inputs.items()}, **GREEDY)
        # A cache that the model creates, a copy of it, positional arguments, and a chat that continues.
        cache = model(**first)[CACHE_NAME]
        branch = copy.deepcopy(cache)
        model(inputs["input_ids"][:, 11:], past_key_values=cache)
        # A generated placeholder has no image.
        model(torch.full((2, 1), IMAGE), past_key_values=cache)
    with modality_weights(model) as other:  # in another context
        model(inputs["input_ids"][:, 11:], past_key_values=branch)
    with modality_weights(model) as at_once:
        model(**inputs)
    assert len(weights.steps) == 11
    assert weights.alpha.shape == (2, 2, 4, 15), "those of the last sequence"
    assert weights.steps[-1].modality_ids.eq(0).all()
    torch.testing.assert_close(weights.alpha[..., :14], at_once.alpha)
    torch.testing.assert_close(other.alpha, at_once.alpha[..., 11:])


@torch.no_grad()
def test_a_placeholder_is_an_image_unless_it_was_generated():
    model = make_model()
    token = torch.full((1, 1), IMAGE)
    with modality_weights(model) as weights:
        cache = model(token)[CACHE_NAME]
        model(token, past_key_values=cache)
        model(torch.full((1, 2), IMAGE), past_key_values=cache)
    assert [step.modality_ids.tolist() for step in weights.steps] == [[[1]], [[0]], [[1, 1]]]
    assert [step.start for step in weights.steps] == [0, 1, 2]


@torch.no_grad()
def test_only_text(monkeypatch):
    """There is nothing to steer, so the model's own call runs."""
    monkeypatch.setattr("modeling_sparse_moe_vlm.toolbox.modality_weights.read_out.attend_by_channels", None)
    model = make_model()
    inputs = {"input_ids": torch.randint(7, 99, (2, 9), generator=torch.Generator().manual_seed(0))}
    plain = model(**inputs).logits
    with modality_weights(model, modality_priors={"image": 3.0}, modality_guidance=1.0) as weights:
        assert torch.equal(model(**inputs).logits, plain)
    assert weights.alpha.eq(0).all()
    torch.testing.assert_close(weights.beta, torch.ones(2, 2, 4, 9))


@torch.no_grad()
def test_given_modality_ids():
    """Embeddings have no placeholders. A text-only model can also receive parts of any modality."""
    model, inputs = make_model(), make_inputs(padded=False)
    ids = (inputs["input_ids"] == IMAGE).long()
    with modality_weights(model) as expected:
        model(**inputs)
    inputs_embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds = {"inputs_embeds": inputs_embeds, "pixel_values": inputs["pixel_values"]}
    with modality_weights(model) as by_call:
        model(**embeds, mm_token_type_ids=ids)
    with modality_weights(model, modality_ids=ids) as by_context:
        model.generate(**embeds, **GREEDY, num_beams=2)
    torch.testing.assert_close(by_call.alpha, expected.alpha)
    with modality_weights(model) as step_by_step:  # with the ids of the cached tokens as well
        first = embeds | {"inputs_embeds": inputs_embeds[:, :11]}
        cache = model(**first, mm_token_type_ids=ids[:, :11])[CACHE_NAME]
        model(inputs_embeds=inputs_embeds[:, 11:], mm_token_type_ids=ids, past_key_values=cache)
    torch.testing.assert_close(step_by_step.alpha, expected.alpha)
    torch.testing.assert_close(by_context.alpha[..., :14], expected.alpha.repeat_interleave(2, dim=1))
    assert by_context.steps[1].modality_ids.eq(0).all()

    text_model = prepare(LlamaForCausalLM(LlamaConfig(**TEXT)))
    with modality_weights(text_model, modality_ids=torch.full((1, 5), 3)) as weights:
        text_model.generate(torch.arange(7, 12)[None], **GREEDY)
    assert weights.of("audio")[..., :5].min() > 0.99
    assert weights.of("audio")[..., 5:].max() < 1


@torch.no_grad()
def test_bfloat16():
    model, inputs = make_model().bfloat16(), make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    plain = model(**inputs).logits
    with modality_weights(model) as weights:
        assert torch.equal(model(**inputs).logits, plain)
    model.set_attn_implementation({"text_config": "eager"})
    matrix = model(**inputs, output_attentions=True).attentions[0].float()
    expected = expected_weights(matrix, (inputs["input_ids"] == IMAGE).long())[0][..., 1]
    real = inputs["attention_mask"].bool()
    ours = weights.alpha[0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(
        ours.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=0.02, atol=0.02, check_dtype=False
    )


# ---------------------------------------------------------------- steering


def make_reference(ids: torch.Tensor, log_priors: torch.Tensor, guidance: float):
    """Returns attention computed part by part with the mask of eager attention, and merged by logsumexps and priors."""

    def attention(module, query, key, value, attention_mask, *, scaling, dropout=0.0, softcap=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.mT * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        parts = []
        for modality in (0, 1):
            visible = (attention_mask == 0) & (ids == modality)[:, None, None]
            part = scores.masked_fill(~visible, -torch.inf)
            parts.append((torch.softmax(part, dim=-1).nan_to_num() @ value, torch.logsumexp(part, dim=-1)))
        outputs, logsumexps = (torch.stack(each) for each in zip(*parts, strict=True))
        merged, _ = merge(outputs, logsumexps, log_priors[:, None, None, None])
        sees_both = logsumexps.isfinite().all(dim=0)[..., None]
        guided = merged + guidance * (merged - outputs[0])
        return torch.where(sees_both, guided, merged).transpose(1, 2), None

    return attention


@every_model
@pytest.mark.parametrize(
    ("steering", "prior", "guidance"),
    [
        ({"modality_priors": {"image": 5.0}}, 5.0, 0.0),
        ({"modality_priors": {"text": 2.0}, "modality_guidance": 0.7}, 0.5, 0.7),
    ],
    ids=["priors", "guidance"],
)
@torch.no_grad()
def test_steered_models_attend_in_parts(name, steering, prior, guidance, monkeypatch):
    model, inputs = make_model(name), make_inputs(name)
    plain = model(**inputs).logits
    with modality_weights(model) as before:
        model(**inputs)
    with modality_weights(model, **steering) as after:
        steered = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (steered - plain)[real].abs().max() > 0.1
    # The logits of the first layer do not change, so the odds of the image are multiplied exactly by its prior.
    alphas = [each.alpha[0].transpose(1, 2)[real] for each in (before, after)]
    odds = [alpha / (1 - alpha) for alpha in alphas]
    both = (alphas[0] > 1e-3) & (alphas[0] < 1 - 1e-3)
    assert both.sum() > 40
    torch.testing.assert_close(odds[1][both], prior * odds[0][both], rtol=2e-3, atol=1e-5)

    reference = make_reference((inputs["input_ids"] == IMAGE).long(), torch.tensor([1.0, prior]).log(), guidance)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "parts", reference)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "parts", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation({"text_config": "parts"})
    torch.testing.assert_close(steered[real], model(**inputs).logits[real], rtol=1e-3, atol=1e-3)


@every_model
@torch.no_grad()
def test_steering_while_generating(name):
    model, inputs = make_model(name), make_inputs(name)
    plain = model.generate(**inputs, **GREEDY)
    for nothing in ({"modality_priors": {"image": 1.0}, "modality_guidance": 0.0}, {"modality_priors": {}}):
        with modality_weights(model, **nothing):
            assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    for steering in ({"modality_priors": {"image": 30.0}}, {"modality_guidance": 3.0}):
        with modality_weights(model, **steering):
            steered = model.generate(**inputs, **GREEDY)
            assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), steered)
        assert not torch.equal(steered, plain)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)


# ---------------------------------------------------------------- the calls that are recorded


@torch.no_grad()
def test_the_base_model_and_adapters():
    model, inputs = make_model(), make_inputs()
    with modality_weights(model) as weights:
        model.model(**inputs)
        model(**inputs)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()
    with modality_weights(adapted) as with_adapters:
        adapted(**inputs)
        adapted.generate(**inputs, max_new_tokens=1)
    steps = weights.steps + with_adapters.steps
    assert len(steps) == 4
    for step in steps:
        torch.testing.assert_close(step.modality_weights[1], steps[0].modality_weights[1])


@torch.no_grad()
def test_a_failed_pass_leaves_no_state():
    model, inputs = make_model(), make_inputs()
    with modality_weights(model, modality_guidance=1.0) as weights:
        model(**inputs)
        with pytest.raises(ValueError, match="features and image tokens do not match"):
            model(**inputs | {"pixel_values": inputs["pixel_values"][:1]})
        with pytest.raises(ValueError, match="only calls of the model"):
            model.model.language_model(input_ids=inputs["input_ids"])
        model(**inputs)
    assert len(weights.steps) == 2


def test_training_is_not_affected():
    """Dropout uses the same random numbers, gradients are equal, and gradient checkpointing works."""
    inputs = make_inputs()
    gradients = []
    for reads_out in (False, True):
        torch.manual_seed(0)
        model = make_llava(LlamaConfig(**TEXT, attention_dropout=0.3)).train()
        if reads_out:
            model.gradient_checkpointing_enable()
            with modality_weights(model) as weights:
                model(**inputs, labels=inputs["input_ids"]).loss.backward()
            assert weights.alpha.shape == (2, 2, 4, 14)
            assert not weights.alpha.requires_grad
            with (
                modality_weights(model, modality_guidance=1.0),
                pytest.raises(ValueError, match="gradient_checkpointing_disable"),
            ):
                model(**inputs)
        else:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for ours, expected in zip(*gradients, strict=True):
        assert torch.equal(ours, expected)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modality_priors": {"sound": 2.0}}, r"unknown modalities \['sound'\]"),
        ({"modality_priors": {"image": 0.0}}, "must be more than 0"),
        ({"modality_guidance": -1.0}, "`modality_guidance` must be a number"),
        ({"modality_ids": torch.full((2, 3), 4)}, "`modality_ids` must be of shape"),
        ({"modality_ids": torch.zeros(3)}, "`modality_ids` must be of shape"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message), modality_weights(make_model(), **arguments):
        pass


@torch.no_grad()
def test_errors_of_a_pass():
    model, inputs = make_model(), make_inputs(padded=False)
    token = {"input_ids": inputs["input_ids"][:, -2:]}
    cache = model(**inputs)[CACHE_NAME]
    with modality_weights(model), pytest.raises(ValueError, match="filled, or its rows were changed, outside"):
        model(**token, past_key_values=cache)
    ids = torch.zeros(3, 4, dtype=torch.long)
    with modality_weights(model, modality_ids=ids), pytest.raises(ValueError, match="has 3 rows, the call has 2"):
        model(**inputs)
    embeds = model.get_input_embeddings()(token["input_ids"])
    with modality_weights(model), pytest.raises(ValueError, match="pass `modality_ids` to `modality_weights`"):
        model(inputs_embeds=embeds)
    with modality_weights(model) as weights:
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="set the attention implementation before"):
            model(**inputs)
    assert not weights.steps
    model.set_attn_implementation("sdpa")
    with modality_weights(model, modality_guidance=1.0):
        model(**inputs)
        with pytest.raises(ValueError, match="only calls of the model"):
            model.model.language_model(inputs_embeds=embeds)
    text_model = LlamaForCausalLM(LlamaConfig(**TEXT))
    with modality_weights(text_model), pytest.raises(ValueError, match="which tokens are images is not known"):
        text_model(**token)


@torch.no_grad()
def test_cross_attention_is_refused_by_the_name_of_its_layer():
    model = prepare(make_mllama())
    inputs = make_mllama_inputs()
    with modality_weights(model), pytest.raises(ValueError, match=r"layer 1 \(MllamaTextCrossAttention\)"):
        model(**inputs)


@torch.no_grad()
def test_soft_capped_logits_are_steered_only_by_eager_attention(monkeypatch):
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "capped",
        lambda *args, softcap=None, **kwargs: ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs),
    )
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "capped", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model, inputs = make_model("paligemma2"), make_inputs("paligemma2")
    model.set_attn_implementation({"text_config": "capped"})
    with modality_weights(model, modality_guidance=1.0), pytest.raises(ValueError, match="only eager attention can"):
        model(**inputs)


def step_of(start: int, length: int, value: float, passed_over: int = 0) -> Step:
    """One row and head. In layers 3 and 10, the weight of modality m at token t is value + layer + m / 10 + t / 100."""
    plain, count_free = (
        {
            layer: torch.stack(
                [offset + value + layer + m / 10 + torch.arange(begin, length) / 100 for m in range(4)], dim=-1
            )[None, None]
            for layer, begin in ((10, passed_over), (3, 0))
        }
        for offset in (0, 500)
    )
    return Step(start, torch.zeros(1, length, dtype=torch.long), plain, count_free)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(0, 3, 100)], [100, 100.01, 100.02]),
        ([(0, 2, 100), (2, 1, 200), (3, 1, 300)], [100, 100.01, 200, 300]),
        # Two of three candidates were rejected: the next pass starts after the accepted one.
        ([(0, 1, 100), (1, 3, 200), (2, 2, 300), (4, 1, 400)], [100, 200, 300, 300.01, 400]),
        ([(0, 2, 100), (2, 1, 200), (0, 1, 300), (1, 1, 400)], [300, 400]),
        # An existing cache; another sequence from its beginning; and the same position again.
        ([(5, 2, 100), (7, 1, 200)], [100, 100.01, 200]),
        ([(5, 2, 100), (7, 1, 200), (0, 2, 300), (2, 1, 400)], [300, 300.01, 400]),
        ([(5, 2, 100), (7, 1, 200), (5, 1, 300)], [300]),
    ],
    ids=["one pass", "step by step", "assisted", "restart", "later", "restart from before", "again"],
)
def test_steps_are_concatenated(steps, expected):
    weights = ModalityWeights([step_of(*step) for step in steps])
    for column, modality in enumerate(MODALITIES):
        for count_free in (False, True):
            ours = weights.of(modality, count_free=count_free)
            assert ours.shape == (2, 1, 1, len(expected))
            base = torch.tensor(expected) + column / 10 + (500 if count_free else 0)
            torch.testing.assert_close(ours[:, 0, 0], torch.stack([base + 3, base + 10]), rtol=0, atol=1e-3)
    assert torch.equal(weights.alpha, weights.of("image"))
    assert torch.equal(weights.beta, weights.of("text"))


def test_tokens_that_a_layer_skips_are_nan():
    weights = ModalityWeights([step_of(0, 3, 100, passed_over=2), step_of(3, 1, 200)])
    alpha = weights.alpha[:, 0, 0]
    assert not alpha[0].isnan().any()
    assert alpha[1].isnan().tolist() == [True, True, False, False]
    torch.testing.assert_close(alpha[1, 2:], torch.tensor([110.12, 210.1]))


def test_results_that_are_not_there():
    weights = ModalityWeights()
    with pytest.raises(ValueError, match="nothing has been read out"):
        _ = weights.alpha
    with pytest.raises(ValueError, match="`modality` must be one of text, image, video, audio, got 'picture'"):
        weights.of("picture")
