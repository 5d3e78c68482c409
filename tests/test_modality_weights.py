"""α and β in the whole model: read-out, steering, learning, and plain attention if they are not used."""

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmTextConfig
from modeling_sparse_moe_vlm.attention import SparseMoeVlmAttention
from modeling_sparse_moe_vlm.attention_parts import AttentionParts
from tests.support.models import TEXT_CONFIG, make_inputs, make_model
from tests.support.threads import in_step, run_at_once
from tests.test_generation import split_rows
from tests.test_modeling import make_mixed_inputs, shift_left, use_attention

UNEQUAL = {"alpha_init": 0.8, "beta_init": 0.3}
LEARNED = UNEQUAL | {"learned_modality_priors": True}
READ = {"output_modality_weights": True}


@pytest.fixture(autouse=True)
def _default_stance():
    yield
    torch.compiler.set_stance("default")


def make_unequal_model(**kwargs):
    """Returns a model whose heads and layers have different priors, as if learned."""
    model = make_model(**LEARNED | kwargs)
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.language_model.layers:
        torch.nn.init.normal_(layer.self_attn.modality_log_priors, generator=generator)
    return model


def count_parts(monkeypatch) -> list:
    """Records every call of a layer that does not run plain attention."""
    calls: list = []
    attend = AttentionParts.attend
    monkeypatch.setattr(AttentionParts, "attend", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
    return calls


# ---------------------------------------------------------------- plain attention


@pytest.mark.parametrize("settings", [{}, {"learned_modality_priors": True}, {"alpha_init": 0.1, "beta_init": 0.1}])
@torch.no_grad()
def test_equal_priors_are_a_plain_decoder_to_the_bit(settings, monkeypatch):
    plain, inputs = make_model(), make_inputs()
    model = make_model(**settings)
    model.load_state_dict(plain.state_dict(), strict=False)
    calls = count_parts(monkeypatch)
    expected = plain(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    steering = {"modality_priors": {"image": 1.0, "text": 1.0}, "modality_guidance": 0.0}
    assert torch.equal(model(**inputs, **steering).logits, expected)
    # Equal priors of a call change nothing, whatever their value.
    assert torch.equal(model(**inputs, modality_priors={"image": 3.0, "text": 3.0}).logits, expected)
    assert not calls
    # Text by itself is a single part, so its prior has no effect.
    text = make_inputs(images_per_row=0)
    assert torch.equal(make_unequal_model()(**text).logits, make_model()(**text).logits)
    assert not calls


def test_learned_priors_are_compared_again_when_they_change(monkeypatch):
    model, inputs = make_model(learned_modality_priors=True), make_inputs()
    calls = count_parts(monkeypatch)
    with torch.no_grad():
        equal = model(**inputs).logits
        assert not calls
        model.model.language_model.layers[1].self_attn.modality_log_priors[2, 1] = 2.0
        changed = model(**inputs).logits
        assert calls
        assert not torch.allclose(changed, equal)
        calls.clear()
        model.model.language_model.layers[1].self_attn.modality_log_priors[2, 1] = 0.0
        model.model.language_model.layers[1].self_attn.modality_log_priors.fill_(0.0)
        torch.testing.assert_close(model(**inputs).logits, equal)
        assert not calls
    model(**inputs)
    assert calls, "they learn"


# ---------------------------------------------------------------- read-out


@pytest.mark.parametrize("make", [make_model, make_unequal_model], ids=["equal", "unequal"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
@torch.no_grad()
def test_weights_are_those_of_eager_attention(make, padding_side):
    model = make()
    inputs = make_mixed_inputs()
    if padding_side == "right":
        inputs = shift_left(inputs)
    model.set_attn_implementation("eager")
    outputs = model(**inputs, **READ, output_attentions=True)
    is_image = (inputs["mm_token_type_ids"] == 1)[:, None, None]
    real = inputs["attention_mask"].bool()
    for attentions, weights in zip(outputs.attentions, outputs.modality_weights, strict=True):
        assert weights.shape == (*attentions.shape[:3], 2)
        alpha = (attentions * is_image).sum(dim=-1)
        torch.testing.assert_close(weights[..., 1].transpose(1, 2)[real], alpha.transpose(1, 2)[real])
        torch.testing.assert_close(
            weights.sum(dim=-1).transpose(1, 2)[real], torch.ones_like(alpha.transpose(1, 2)[real])
        )
    # Count-free: by the mean instead of the sum of exp(logit) over a part's keys.
    counts = torch.stack([(is_image[:, 0] == m).float() * real[:, None] for m in (0, 1)], dim=-1).cumsum(dim=2)[:, 0]
    for weights, free in zip(outputs.modality_weights, outputs.count_free_modality_weights, strict=True):
        each = weights / counts.clamp(min=1)[:, None]
        expected = each / each.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(free.transpose(1, 2)[real], expected.transpose(1, 2)[real])


@pytest.mark.parametrize("make", [make_model, make_unequal_model], ids=["equal", "unequal"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_read_out_is_the_same_in_every_backend_and_changes_nothing(make, attention):
    model, inputs = make(), shift_left(make_mixed_inputs())
    model.set_attn_implementation("eager")
    expected = model(**inputs, **READ)
    use_attention(model, attention)
    outputs = model(**inputs, **READ)
    torch.testing.assert_close(outputs.logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    real = inputs["attention_mask"].bool()
    for name in ("modality_weights", "count_free_modality_weights"):
        for ours, theirs in zip(outputs[name], expected[name], strict=True):
            torch.testing.assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_rows_do_not_depend_on_their_batch():
    model, inputs = make_unequal_model(), shift_left(make_mixed_inputs())
    together = model(**inputs, **READ)
    for row, alone in enumerate(split_rows(inputs)):
        expected = model(**alone, **READ)
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(together.logits[row, :length], expected.logits[0], rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(together.modality_weights, expected.modality_weights, strict=True):
            torch.testing.assert_close(ours[row, :, :length], theirs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_rows_equal_separate_rows(attention):
    model, inputs = make_unequal_model(), make_inputs()
    model.set_attn_implementation(attention)
    separate = model(**inputs, **READ, use_cache=False)
    packed = {
        "input_ids": inputs["input_ids"].reshape(1, -1),
        "mm_token_type_ids": inputs["mm_token_type_ids"].reshape(1, -1),
        "pixel_values": inputs["pixel_values"],
        "position_ids": torch.arange(14).repeat(2)[None],
    }
    together = model(**packed, **READ, use_cache=False)
    for name in ("modality_weights", "count_free_modality_weights"):
        for ours, theirs in zip(together[name], separate[name], strict=True):
            torch.testing.assert_close(
                ours, theirs.movedim(0, 1).flatten(1, 2)[None], rtol=1e-4, atol=1e-5, msg=f"{name} differ"
            )


@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache])
@torch.no_grad()
def test_cached_steps_give_the_weights_of_one_pass(make_cache):
    model, inputs = make_unequal_model(), make_inputs()
    whole = model(**inputs, **READ, use_cache=False)
    config = model.config.text_config
    cache = DynamicCache(config=config) if make_cache is DynamicCache else StaticCache(config=config, max_cache_len=20)
    steps = []
    for start, stop in ((0, 9), (9, 10), (10, 13), (13, 14)):
        rest = {name: inputs[name][:, start:stop] for name in ("input_ids", "mm_token_type_ids")}
        if start == 0:
            rest["pixel_values"] = inputs["pixel_values"]
        mask = inputs["attention_mask"][:, :stop]
        steps.append(model(**rest, attention_mask=mask, past_key_values=cache, **READ))
    torch.testing.assert_close(torch.cat([step.logits for step in steps], dim=1), whole.logits, rtol=1e-4, atol=1e-4)
    for name in ("modality_weights", "count_free_modality_weights"):
        for layer, expected in enumerate(whole[name]):
            ours = torch.cat([step[name][layer] for step in steps], dim=2)
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cache_without_modality_ids():
    model, inputs = make_model(), make_inputs()
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, past_key_values=cache)
    token = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache}
    model(**copy.deepcopy(token))
    with pytest.raises(ValueError, match="filled without the modality ids"):
        model(**token, **READ)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"do_sample": True}])
def test_generate_returns_the_weights_of_every_step(options):
    model, inputs = make_unequal_model(), make_mixed_inputs()
    given = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True} | options
    torch.manual_seed(0)
    plain = model.generate(**inputs, **given)
    torch.manual_seed(0)
    outputs = model.generate(**inputs, **given, **READ)
    assert torch.equal(outputs.sequences, plain.sequences)
    assert "modality_weights" not in plain
    beams, length = options.get("num_beams", 1), inputs["input_ids"].shape[1]
    assert len(outputs.modality_weights) == len(outputs.count_free_modality_weights) == 5
    for step, layers in enumerate(outputs.modality_weights):
        assert [weights.shape for weights in layers] == [(4 * beams, 4, length if step == 0 else 1, 2)] * 2
    if beams > 1:
        return
    # The weights of one pass over the finished sequences.
    extra = outputs.sequences.shape[1] - length
    whole = {
        "input_ids": outputs.sequences,
        "pixel_values": inputs["pixel_values"],
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, extra)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, extra), value=1),
    }
    with torch.no_grad():
        expected = model(**whole, **READ).modality_weights
    for layer in range(2):
        ours = torch.cat([step[layer] for step in outputs.modality_weights], dim=2)
        real = whole["attention_mask"][:, :-1].bool()
        torch.testing.assert_close(
            ours.transpose(1, 2)[real], expected[layer][:, :, :-1].transpose(1, 2)[real], rtol=1e-3, atol=1e-4
        )


def test_assisted_generation_returns_the_weights_of_accepted_tokens():
    model, inputs = make_unequal_model(), make_inputs(batch_size=1)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight += 0.02 * torch.randn_like(assistant.lm_head.weight)
    given = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True} | READ
    plain, assisted = model.generate(**inputs, **given), model.generate(**inputs, **given, assistant_model=assistant)
    assert torch.equal(plain.sequences, assisted.sequences)
    assert len(assisted.modality_weights) < len(plain.modality_weights)
    for layer in range(2):
        ours, theirs = (torch.cat([step[layer] for step in each.modality_weights], dim=2) for each in (assisted, plain))
        length = min(ours.shape[2], theirs.shape[2])
        torch.testing.assert_close(ours[:, :, :length], theirs[:, :, :length], rtol=1e-3, atol=1e-5)


def test_threads_that_generate_at_once_with_one_model():
    """Each call returns weights only if it asks for them, and only its own priors steer it."""
    model, inputs = make_model(learned_modality_priors=True), make_inputs()
    given = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    calls = [
        lambda: model.generate(**inputs, **given, **READ),
        lambda: model.generate(**inputs, **given, modality_priors={"image": 50.0}),
        lambda: model.generate(**inputs, **given, **READ, modality_guidance=4.0),
    ]
    expected = [call() for call in calls]
    assert not torch.equal(expected[0].sequences, expected[1].sequences)
    with in_step(list(model.model.language_model.layers), num_threads=3):
        results = run_at_once(*calls)
    for outputs, alone in zip(results, expected, strict=True):
        assert torch.equal(outputs.sequences, alone.sequences)
        assert outputs.keys() == alone.keys()
    for number in (0, 2):
        for ours, theirs in zip(results[number].modality_weights, expected[number].modality_weights, strict=True):
            torch.testing.assert_close(torch.stack(ours), torch.stack(theirs))


def test_generate_needs_a_dict_to_return_weights_in():
    with pytest.raises(ValueError, match="return_dict_in_generate=True"):
        make_model().generate(**make_inputs(), max_new_tokens=1, **READ)


# ---------------------------------------------------------------- steering


@torch.no_grad()
def test_priors_of_a_call_move_the_weights():
    model, inputs = make_model(), make_inputs()
    alphas = []
    for prior in (0.1, 1.0, 10.0):
        outputs = model(**inputs, modality_priors={"image": prior}, **READ)
        alphas.append(outputs.modality_weights[0][:, :, 8:, 1])
    assert (alphas[0] < alphas[1]).all()
    assert (alphas[1] < alphas[2]).all()
    odds = [alpha / (1 - alpha) for alpha in alphas]
    torch.testing.assert_close(odds[2], 10 * odds[1], rtol=1e-3, atol=1e-4)
    # They are multiplied with the learned priors.
    model = make_model(alpha_init=0.4, beta_init=0.1)
    same = make_model(alpha_init=0.1, beta_init=0.1)
    torch.testing.assert_close(
        model(**inputs).logits, same(**inputs, modality_priors={"image": 4.0}).logits, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_steering_while_generating():
    model, inputs = make_model(), make_inputs()
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**inputs, **given)
    assert torch.equal(model.generate(**inputs, **given, modality_priors={"image": 1.0}, modality_guidance=0.0), plain)
    for steering in ({"modality_priors": {"image": 50.0}}, {"modality_guidance": 4.0}):
        steered = model.generate(**inputs, **given, **steering)
        assert not torch.equal(steered, plain)
        ids = inputs["input_ids"]
        for _ in range(6):  # without a cache
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False, **steering).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        assert torch.equal(steered, ids)


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({"modality_priors": {"sound": 2.0}}, r"unknown modalities \['sound'\]: the model has \['text', 'image'\]"),
        ({"modality_priors": {"image": 0.0}}, r"`modality_priors\['image'\]` must be more than 0"),
        ({"modality_priors": {"image": "much"}}, r"`modality_priors\['image'\]` must be a number"),
        ({"modality_priors": 2.0}, r"`modality_priors` must be a dict of factors by modality"),
        ({"modality_guidance": -1.0}, r"`modality_guidance` must be a number"),
    ],
)
def test_wrong_steering(steering, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**make_inputs(), **steering)


# ---------------------------------------------------------------- learning


def test_priors_start_where_the_configuration_says():
    attention = make_model(**LEARNED).model.language_model.layers[0].self_attn
    assert isinstance(attention, SparseMoeVlmAttention)
    assert attention.modality_log_priors.shape == (4, 2)
    expected = torch.tensor([0.3, 0.8]).log().expand(4, 2)
    torch.testing.assert_close(attention.modality_log_priors.detach(), expected)
    torch.testing.assert_close(
        make_model(**LEARNED)(**make_inputs()).logits, make_model(**UNEQUAL)(**make_inputs()).logits
    )


@pytest.mark.parametrize("padded", [False, True], ids=["runs", "channels"])
def test_gradients_of_the_model_are_those_of_eager_attention(padded):
    inputs = shift_left(make_mixed_inputs()) if padded else make_inputs()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    gradients = []
    for attention in ("eager", "sdpa"):
        model = make_unequal_model()
        model.set_attn_implementation(attention)
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-5, msg=f"gradient of {name}")
    priors = [grad for name, grad in gradients[0].items() if name.endswith("modality_log_priors")]
    assert len(priors) == 2
    assert all(grad.abs().max() > 1e-4 for grad in priors)
    # Only the ratio of priors counts.
    assert all(grad.sum(dim=1).abs().max() < 1e-5 for grad in priors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [False, True], ids=["runs", "channels"])
def test_under_autocast(padded, dtype):
    inputs = shift_left(make_mixed_inputs()) if padded else make_inputs()
    visible = inputs["attention_mask"].bool()
    # Every token uses all experts, so rounding cannot change which experts are chosen.
    model = make_unequal_model(num_experts_per_tok=4)
    with torch.no_grad():
        exact = model(**inputs, **READ)
    with torch.autocast("cpu", dtype):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        with torch.no_grad():
            rounded = model(**inputs, **READ)
        generated = model.generate(**inputs, **READ, max_new_tokens=3, return_dict_in_generate=True)
    assert model.model.language_model.layers[0].self_attn.modality_log_priors.grad.abs().max() > 1e-4
    for weights, expected in zip(rounded.modality_weights, exact.modality_weights, strict=True):
        seen = weights.transpose(1, 2)[visible]
        torch.testing.assert_close(seen, expected.transpose(1, 2)[visible], rtol=0, atol=0.05)
    for weights in (weights for step in generated.modality_weights[1:] for weights in step):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))  # in float32


def test_the_readout_can_be_trained_on():
    model, inputs = make_model(), make_inputs()
    alpha = torch.stack([weights[:, :, -1, 1] for weights in model(**inputs, **READ).modality_weights])
    alpha.mean().backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_a_batch_of_text_keeps_the_priors_in_the_graph():
    model = make_model(learned_modality_priors=True).train()
    inputs = make_inputs(images_per_row=0)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in model.model.language_model.layers:
        assert layer.self_attn.modality_log_priors.grad.eq(0).all()


def test_priors_learn_where_to_look():
    """
    The task can only be solved by attention to the image: the answer is a class that depends on the colour of the
    image. Everything except the priors is frozen. Queries and keys are zero, so only priors determine the attention.
    """
    model = make_model(learned_modality_priors=True, num_hidden_layers=1)
    model.requires_grad_(False)
    attention = model.model.language_model.layers[0].self_attn
    attention.q_norm.weight.zero_()
    attention.modality_log_priors.requires_grad_(True)
    inputs = make_inputs()
    with torch.no_grad():  # the teacher attends to images only
        target = model(**inputs, modality_priors={"image": 1e4}).logits[:, -1].softmax(dim=-1)
    optimizer = torch.optim.Adam([attention.modality_log_priors], lr=0.2)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits[:, -1], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    ratio = attention.modality_log_priors[:, 1] - attention.modality_log_priors[:, 0]
    assert losses[-1] < losses[0]
    assert ratio.detach().mean() > 1.0, "the prior of images has become larger"


@pytest.mark.parametrize("use_reentrant", [False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    inputs = make_inputs()
    results = []
    for checkpointing in (False, True):
        model = make_unequal_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        outputs = model(**inputs, labels=inputs["input_ids"], **READ)
        outputs.loss.backward()
        results.append((outputs, {name: parameter.grad for name, parameter in model.named_parameters()}))
    for ours, expected in zip(results[1][0].modality_weights, results[0][0].modality_weights, strict=True):
        torch.testing.assert_close(ours, expected)
    for name, expected in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], expected, msg=name)


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize("settings", [{"learned_modality_priors": True}, LEARNED], ids=["equal", "unequal"])
@torch.no_grad()
def test_generation_with_a_static_cache_compiles_once(settings):
    """Also with equal priors, which need no modality ids in prefill. Prefill is not compiled."""
    model = make_model(**settings)
    graphs: list = []
    compile_config = CompileConfig(
        fullgraph=True, mode=None, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    compile_config._compile_all_devices = True
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    for inputs in (make_inputs(), make_inputs(seed=1)):
        expected = model.generate(**inputs, **given, disable_compile=True)
        assert torch.equal(model.generate(**inputs, **given, compile_config=compile_config), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("settings", [{}, LEARNED], ids=["read-out", "priors"])
@torch.no_grad()
def test_compiled(settings):
    torch.manual_seed(0)
    model = SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG | settings)).eval()
    inputs = {key: value for key, value in make_inputs().items() if key != "pixel_values"}
    expected = model(**inputs, **READ, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(**inputs, **READ, use_cache=False)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(outputs.modality_weights, expected.modality_weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
