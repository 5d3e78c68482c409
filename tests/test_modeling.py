"""The forward pass: outputs do not depend on batches, padding, attention backends or the form of the inputs."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, DynamicCache

from modeling_sparse_moe_vlm import (
    SparseMoeVlmForCausalLM,
    SparseMoeVlmForConditionalGeneration,
    SparseMoeVlmTextConfig,
)
from modeling_sparse_moe_vlm.cache_name import CACHE_NAME
from tests.support.models import (
    IMAGE_TOKEN_ID,
    TEXT_CONFIG,
    TINY_TOWER,
    VISION_CONFIG,
    make_config,
    make_inputs,
    make_model,
)

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
TOWERS = {
    "siglip": VISION_CONFIG,
    "clip": TINY_TOWER | {"model_type": "clip_vision_model"},
    "dinov2": TINY_TOWER | {"model_type": "dinov2"},
    "dinov2_with_registers": TINY_TOWER | {"model_type": "dinov2_with_registers"},
    "dinov3": TINY_TOWER | {"model_type": "dinov3_vit"},
    "vit": TINY_TOWER | {"model_type": "vit"},
}


def use_attention(model, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    # Flex attention without its compiler, which takes half a minute.
    torch.compiler.set_stance("force_eager" if implementation == "flex_attention" else "default")


@pytest.fixture(autouse=True)
def _default_stance():
    yield
    torch.compiler.set_stance("default")


def make_text_model(**text_config) -> SparseMoeVlmForCausalLM:
    torch.manual_seed(0)
    return SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG | text_config)).eval()


def make_mixed_inputs() -> dict[str, torch.Tensor]:
    """Four rows of unequal length, padded left: one image, none, two images, none."""
    generator = torch.Generator().manual_seed(1)
    lengths, images = [9, 6, 14, 12], [1, 0, 2, 0]
    input_ids = torch.zeros(4, 14, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, (length, number) in enumerate(zip(lengths, images, strict=True)):
        tokens = torch.randint(4, 99, (length,), generator=generator)
        for image in range(number):
            tokens[1 + 5 * image : 5 + 5 * image] = IMAGE_TOKEN_ID
        input_ids[row, -length:], attention_mask[row, -length:] = tokens, 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == IMAGE_TOKEN_ID).long(),
        "pixel_values": torch.randn(3, 3, 16, 16, generator=generator),
    }


def split_rows(inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Returns every row of a batch as a batch of one without padding."""
    rows, first = [], 0
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        number = int(inputs["mm_token_type_ids"][row].sum()) // 4
        alone = {key: inputs[key][row][mask][None] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
        if number:
            alone["pixel_values"] = inputs["pixel_values"][first : first + number]
        first += number
        rows.append(alone)
    return rows


def shift_left(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the same batch, padded on the right."""
    shifted = dict(inputs)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        shifted[key] = torch.stack(
            [
                row.roll(int(mask.sum()) - len(mask))
                for row, mask in zip(inputs[key], inputs["attention_mask"], strict=True)
            ]
        )
    return shifted


def real_logits(model, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        logits = model(**inputs).logits
    return [row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"], strict=True)]


def assert_rows_close(actual, expected, **tolerance):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or TOLERANCE))


# ------------------------------------------------------------------------------------------------ guards


def test_experts_and_images_matter(arrangement):
    """Otherwise, the comparisons below could not fail."""
    model, inputs = make_model(expert_groups=arrangement), make_inputs()
    with torch.no_grad():
        logits = model(**inputs).logits
        other = model(**inputs | {"pixel_values": inputs["pixel_values"].flip(0)}).logits
        assert (logits - other).abs().amax(dim=(1, 2)).min() > 0.1
        for layer in model.model.language_model.layers:
            for parameter in layer.mlp.experts.parameters():
                parameter.zero_()
        silent = model(**inputs).logits
    assert (logits - silent).abs().amax(dim=(1, 2)).min() > 0.1


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_rows_do_not_depend_on_their_batch(arrangement, padding_side):
    model, inputs = make_model(expert_groups=arrangement), make_mixed_inputs()
    rows = split_rows(inputs)
    expected = [real_logits(model, row)[0] for row in rows]
    batch = inputs if padding_side == "left" else shift_left(inputs)
    assert_rows_close(real_logits(model, batch), expected)

    order = [2, 3, 0, 1]
    permuted = {key: batch[key][order] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
    permuted["pixel_values"] = inputs["pixel_values"][[1, 2, 0]]
    assert_rows_close(real_logits(model, permuted), [expected[row] for row in order])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_packed_rows_equal_separate_rows(arrangement, attention):
    """One row contains several sequences. Their positions start at 0, and there is no mask."""
    model = make_model(expert_groups=arrangement)
    use_attention(model, attention)
    rows = split_rows(make_mixed_inputs())
    packed = {key: torch.cat([row[key] for row in rows], dim=1) for key in ("input_ids", "mm_token_type_ids")}
    packed["position_ids"] = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None]
    packed["pixel_values"] = torch.cat([row["pixel_values"] for row in rows if "pixel_values" in row])
    with torch.no_grad():
        logits = model(**packed).logits[0]
    expected = torch.cat([real_logits(model, row)[0] for row in rows])
    torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize("padding_side", ["left", "right", "none"])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_implementations_agree(padding_side, attention, dtype):
    # Every token uses all experts. Otherwise, rounding would route some tokens to other experts.
    model = make_model(num_experts_per_tok=4).to(dtype)
    inputs = make_inputs() if padding_side == "none" else make_mixed_inputs()
    if padding_side == "right":
        inputs = shift_left(inputs)
    model.set_attn_implementation("eager")
    expected = real_logits(model, inputs)
    if padding_side == "none":
        inputs["attention_mask"] = None
    use_attention(model, attention)
    with torch.no_grad():
        logits = model(**inputs).logits
    mask = inputs["attention_mask"]
    actual = list(logits) if mask is None else [row[keep.bool()] for row, keep in zip(logits, mask, strict=True)]
    assert_rows_close(actual, expected, **({"atol": 0.15, "rtol": 0.05} if dtype is torch.bfloat16 else TOLERANCE))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_four_dimensional_masks(kind):
    model, inputs = make_model(), make_mixed_inputs()
    expected = real_logits(model, inputs)
    keep = inputs["attention_mask"].bool()
    mask = torch.tril(torch.ones(14, 14, dtype=torch.bool))[None, None] & keep[:, None, None, :]
    mask = mask | torch.eye(14, dtype=torch.bool)  # a row of padding must see something
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    position_ids = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        outputs = model(**inputs | {"attention_mask": mask, "position_ids": position_ids}, output_router_logits=True)
    assert_rows_close([row[k] for row, k in zip(outputs.logits, keep, strict=True)], expected)
    assert torch.isfinite(outputs.aux_loss)


# ------------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("images_per_row", [0, 1, 2])
def test_embeddings_equal_ids_and_derived_modalities_equal_given_ones(arrangement, images_per_row):
    model, inputs = make_model(expert_groups=arrangement), make_inputs(images_per_row=images_per_row)
    expected = real_logits(model, inputs)
    derived = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
    assert_rows_close(real_logits(model, derived), expected, atol=0, rtol=0)
    for given in (inputs, derived):
        embeds = dict(given)
        embeds["inputs_embeds"] = model.get_input_embeddings()(embeds.pop("input_ids"))
        assert_rows_close(real_logits(model, embeds), expected, atol=0, rtol=0)


@pytest.mark.parametrize("form", ["input_ids", "inputs_embeds"])
def test_router_losses_know_derived_modalities(arrangement, form):
    model, inputs = make_model(expert_groups=arrangement), make_mixed_inputs()
    flags = {"output_router_logits": True, "labels": inputs["input_ids"]}
    with torch.no_grad():
        expected = model(**inputs, **flags)
        given = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
        if form == "inputs_embeds":
            given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
        actual = model(**given, **flags)
    for key in ("loss", "aux_loss", "z_loss"):
        torch.testing.assert_close(actual[key], expected[key])


def test_images_go_where_their_tokens_are(arrangement):
    """Exchanging two images of a prompt, or images of two prompts, changes the logits."""
    model, inputs = make_model(expert_groups=arrangement), make_inputs(images_per_row=2)
    logits = real_logits(model, inputs)
    for order in ([1, 0, 2, 3], [0, 1, 3, 2], [2, 1, 0, 3]):
        other = real_logits(model, inputs | {"pixel_values": inputs["pixel_values"][order]})
        for row in range(2):
            moved = order[2 * row : 2 * row + 2] != [2 * row, 2 * row + 1]
            assert ((logits[row] - other[row]).abs().max() > 0.05) == moved
            torch.testing.assert_close(logits[row][:2], other[row][:2])  # before the first image


def test_image_features(arrangement):
    model, inputs = make_model(expert_groups=arrangement), make_inputs(batch_size=3)
    with torch.no_grad():
        outputs = model.get_image_features(inputs["pixel_values"])
        full = model(**inputs)
        given = {key: value for key, value in inputs.items() if key != "pixel_values"}
        encoded = model(**given, mm_encoder_outputs={"image": outputs})
        as_tuple = model.get_image_features(inputs["pixel_values"], return_dict=False)
    assert isinstance(outputs.pooler_output, list)
    assert [tuple(features.shape) for features in outputs.pooler_output] == [(4, 32)] * 3
    assert outputs.last_hidden_state.shape == (3, 16, 16)
    torch.testing.assert_close(full.image_hidden_states, torch.cat(outputs.pooler_output))
    torch.testing.assert_close(encoded.logits, full.logits)
    assert isinstance(as_tuple, tuple)
    alone = [model.get_image_features(image[None]).pooler_output[0] for image in inputs["pixel_values"]]
    for one, other in zip(alone, outputs.pooler_output, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_blank_images_have_the_size_of_the_tower():
    blank = make_model().model._blank_images()
    assert blank.shape == (1, 3, 16, 16)
    assert not blank.any()


@pytest.mark.parametrize("tower", TOWERS)
def test_any_vision_tower(tower):
    """Also towers with class and register tokens, which are not patches."""
    torch.manual_seed(0)
    model = SparseMoeVlmForConditionalGeneration(make_config(vision_config=TOWERS[tower])).eval()
    inputs = make_inputs()
    with torch.no_grad():
        outputs = model.get_image_features(inputs["pixel_values"])
        patches = outputs.last_hidden_state[:, -16:]
        torch.testing.assert_close(torch.stack(outputs.pooler_output), model.model.multi_modal_projector(patches))
        logits = model(**inputs).logits
        # The last patch of the image changes only the last image token.
        changed = model.model.multi_modal_projector(torch.cat([patches[:, :-1], patches[:, -1:] + 1], dim=1))
        assert (changed - torch.stack(outputs.pooler_output)).abs().amax(dim=2).gt(1e-3).tolist() == [
            [False] * 3 + [True]
        ] * 2
        half = copy.deepcopy(model).to(torch.bfloat16)(**inputs).logits  # images come in float32
    assert torch.isfinite(logits).all()
    assert half.dtype is torch.bfloat16
    labels = inputs["input_ids"].clone()
    model.train()(**inputs, labels=labels).loss.backward()
    assert (
        model.model.vision_tower.get_parameter(next(iter(dict(model.model.vision_tower.named_parameters())))).grad
        is not None
    )


@pytest.mark.parametrize("pixel_values", [torch.empty(0), torch.empty(0, 3, 16, 16), None])
def test_no_images(pixel_values):
    model, inputs = make_model(), make_inputs(images_per_row=0)
    expected = real_logits(model, inputs)
    assert_rows_close(real_logits(model, inputs | {"pixel_values": pixel_values}), expected, atol=0, rtol=0)
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert_rows_close(real_logits(model, text), expected, atol=0, rtol=0)


@pytest.mark.parametrize("change", ["too few", "too many", "no tokens", "tokens of another size"])
def test_numbers_that_do_not_match(change):
    model, inputs = make_model(), make_inputs(images_per_row=2)
    if change == "too few":
        inputs["pixel_values"] = inputs["pixel_values"][:-1]
    elif change == "too many":
        inputs["pixel_values"] = torch.cat([inputs["pixel_values"]] * 2)
    elif change == "no tokens":
        inputs |= make_inputs(images_per_row=0)
    else:
        inputs["input_ids"][0, 2] = 50
    inputs.pop("mm_token_type_ids")
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**inputs)


def test_placeholders_without_images():
    model = make_model()
    inputs = make_inputs()
    pixel_values = inputs.pop("pixel_values")
    for each in (model, model.model):
        with pytest.raises(ValueError, match="image placeholders, but there are no images: pass the `pixel_values`"):
            each(**inputs)
    with torch.no_grad():
        blind = model(**inputs, mm_encoder_outputs={}).logits
        seeing = model(**inputs, pixel_values=pixel_values).logits
    assert not torch.allclose(blind, seeing)
    # The images of cached placeholders were processed before.
    start = {key: value[:, :8] for key, value in inputs.items()}
    past_key_values = model(**start, pixel_values=pixel_values).get(CACHE_NAME)
    rest = {key: value[:, 8:] if key != "attention_mask" else value for key, value in inputs.items()}
    torch.testing.assert_close(model(**rest, past_key_values=past_key_values).logits, seeing[:, 8:])


def test_placeholders_of_cached_texts_are_not_looked_for(monkeypatch):
    model, input_ids = make_model().model, torch.tensor([[5, IMAGE_TOKEN_ID]])
    assert model.has_placeholders(input_ids)
    assert not model.has_placeholders(input_ids[:, :1])
    assert not model.has_placeholders(None)
    for length, expected in ((0, True), (1, False)):
        cache = SimpleNamespace(get_seq_length=lambda length=length: length)
        assert model.has_placeholders(input_ids, cache) is expected
    assert not model.has_placeholders(input_ids, SimpleNamespace())  # a paged cache
    assert [model.has_placeholders(input_ids, token_id=token_id) for token_id in (4, 5)] == [False, True]
    monkeypatch.setattr("modeling_sparse_moe_vlm.visual_features.is_tracing", lambda tensor: tensor is input_ids)
    assert not model.has_placeholders(input_ids)  # unknown ids


@pytest.mark.parametrize("shape", [(2, 13), (1, 14), (28,)])
def test_modality_ids_of_another_shape(shape):
    model, inputs = make_text_model(), make_inputs(images_per_row=0)
    inputs["mm_token_type_ids"] = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`mm_token_type_ids` has shape .* tokens of shape \(2, 14\)"):
        model(**inputs)


@torch.no_grad()
def test_cache_by_the_librarys_name():
    model, inputs = make_text_model(), make_inputs(images_per_row=0)
    whole = model(**inputs).logits
    first = model(input_ids=inputs["input_ids"][:, :9])
    cache = {CACHE_NAME: copy.deepcopy(first.get(CACHE_NAME))}
    torch.testing.assert_close(model(input_ids=inputs["input_ids"][:, 9:], **cache).logits, whole[:, 9:])
    cache = {"past_key_values": first.get(CACHE_NAME)}
    torch.testing.assert_close(model(input_ids=inputs["input_ids"][:, 9:], **cache).logits, whole[:, 9:])
    if CACHE_NAME != "past_key_values":
        with pytest.raises(ValueError, match="are the same argument"):
            model(input_ids=inputs["input_ids"], **cache, **{CACHE_NAME: first.get(CACHE_NAME)})


def test_exclusive_arguments():
    model, inputs = make_model(), make_inputs()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for owner in (model, model.model, model.model.language_model):
        for given in ({}, {"input_ids": inputs["input_ids"], "inputs_embeds": embeds}):
            with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
                owner(**given)
    with pytest.raises(ValueError, match="both `pixel_values` and `mm_encoder_outputs`"):
        model(**inputs, mm_encoder_outputs={"image": model.get_image_features(inputs["pixel_values"])})


# ------------------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5, 13])], ids=["one", "three", "positions"])
def test_logits_to_keep(keep):
    model, inputs = make_model(), make_inputs()
    with torch.no_grad():
        full, kept = model(**inputs).logits, model(**inputs, logits_to_keep=keep).logits
    expected = full[:, -keep:] if isinstance(keep, int) else full[:, keep]
    torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("make", [make_model, make_text_model], ids=["vlm", "text"])
def test_recorded_outputs_from_call_and_config(make):
    model = make(num_hidden_layers=3, mlp_only_layers=[1])
    inputs = make_inputs(images_per_row=int(make is make_model))
    flags = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        from_call = model(**inputs, **flags)
        plain = model(**inputs)
        config = model.config.get_text_config()
        for flag in flags:
            setattr(config, flag, True)
        from_config = model(**inputs)
        assert (
            from_config.aux_loss is from_config.z_loss is None
        )  # a training setting, and the call does not ask for it
        from_config = model.train()(**inputs)
    for outputs in (from_call, from_config):
        assert [tuple(logits.shape) for logits in outputs.router_logits] == [(28, 4)] * 2
        assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 14, 32)] * 4
        assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 14, 14)] * 3
        torch.testing.assert_close(outputs.logits, plain.logits)
        torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1]), plain.logits)
        assert outputs.aux_loss.ndim == outputs.z_loss.ndim == 0
        assert outputs.loss is None
    assert plain.router_logits is plain.hidden_states is plain.attentions is plain.aux_loss is None
    torch.testing.assert_close(from_call.aux_loss, from_config.aux_loss)
    # The router and the recorded hidden states belong to the first layer.
    layer, states = (
        model.model.get_decoder().layers[0] if make is make_model else model.model.layers[0],
        from_call.hidden_states,
    )
    first = layer.gate if hasattr(layer, "gate") else layer.mlp.gate
    assert first.weight.shape == (4, 32)
    assert torch.isfinite(states[0]).all()


def test_base_models_return_router_logits():
    model, inputs = make_model(), make_inputs()
    with torch.no_grad():
        outputs = model.model(**inputs, output_router_logits=True)
        expected = model(**inputs, output_router_logits=True)
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(28, 4)] * 2
    torch.testing.assert_close(outputs.router_logits, expected.router_logits)
    torch.testing.assert_close(model.lm_head(outputs.last_hidden_state), expected.logits)


def test_return_dict():
    model, inputs = make_model(), make_inputs()
    with torch.no_grad():
        expected = model(**inputs, labels=inputs["input_ids"], use_cache=False)
        as_tuple = model(**inputs, labels=inputs["input_ids"], use_cache=False, return_dict=False)
        torch.testing.assert_close(as_tuple[:2], (expected.loss, expected.logits))
        for owner in (model, model.model, model.model.language_model):
            given = inputs if owner is not model.model.language_model else {"input_ids": inputs["input_ids"]}
            assert isinstance(owner(**given, return_dict=False), tuple)
        model.config.return_dict = model.config.text_config.return_dict = False
        from_config = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    assert isinstance(from_config, tuple)
    torch.testing.assert_close(from_config[:2], (expected.loss, expected.logits))


@pytest.mark.parametrize("use_cache", [True, False])
def test_cache_from_call_and_config(use_cache):
    model, inputs = make_model(), make_inputs()
    with torch.no_grad():
        assert isinstance(model(**inputs, use_cache=use_cache).past_key_values, DynamicCache) == use_cache
        model.config.text_config.use_cache = use_cache
        assert isinstance(model(**inputs).past_key_values, DynamicCache) == use_cache


# ------------------------------------------------------------------------------------------------ losses, training


def test_language_loss_is_the_librarys(arrangement):
    model, inputs = make_model(expert_groups=arrangement), make_mixed_inputs()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        outputs = model(**inputs, labels=labels)
    targets = labels[:, 1:].reshape(-1)
    logits = outputs.logits[:, :-1].reshape(-1, 99)
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100)
    torch.testing.assert_close(outputs.loss, expected)


def test_loss_arguments_reach_the_loss():
    model, inputs = make_model(router_aux_loss_coef=0.1), make_inputs()
    labels = inputs["input_ids"]
    num_targets = labels.shape[0] * (labels.shape[1] - 1)
    with torch.no_grad():
        mean = model(**inputs, labels=labels).loss
        summed = model(**inputs, labels=labels, num_items_in_batch=1).loss
        torch.testing.assert_close(summed, mean * num_targets)
        half = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(2 * num_targets)).loss
        torch.testing.assert_close(half, mean / 2)
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        shifted = model(**inputs, labels=labels, shift_labels=shift_labels)
        torch.testing.assert_close(shifted.loss, mean)
        # The router losses are scaled in the same way.
        routed = model(**inputs, labels=labels, output_router_logits=True)
        torch.testing.assert_close(routed.loss, mean + 0.1 * routed.aux_loss)
        routed = model(**inputs, labels=labels, output_router_logits=True, num_items_in_batch=2 * num_targets)
        torch.testing.assert_close(routed.loss, (mean + 0.1 * routed.aux_loss) / 2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(arrangement, use_reentrant):
    model, inputs = make_model(expert_groups=arrangement, router_aux_loss_coef=0.1).train(), make_mixed_inputs()
    losses, gradients = [], []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        outputs = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
        assert len(outputs.router_logits) == 2
        outputs.loss.backward()
        losses.append(outputs.loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1])
    assert gradients[0].keys() == gradients[1].keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("images_per_row", [0, 1])
def test_every_parameter_of_the_decoder_is_in_the_graph(arrangement, images_per_row):
    """Otherwise, data-parallel ranks would wait for the gradient of a group without tokens."""
    model, inputs = make_model(expert_groups=arrangement).train(), make_inputs(images_per_row=images_per_row)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert not [name for name, p in model.model.language_model.named_parameters() if p.grad is None]


def test_overfitting_one_batch(arrangement):
    model, inputs = make_model(expert_groups=arrangement, initializer_range=0.05).train(), make_mixed_inputs()
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] == 1, -100)
    # Nothing comes before the first token of a row.
    labels = labels.masked_fill(inputs["attention_mask"].cumsum(dim=1) < 2, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = model(**inputs, labels=labels, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4
    assert losses[-1] < 0.1
    predicted = model(**inputs).logits.argmax(dim=-1)[:, :-1]
    targets = labels[:, 1:]
    assert (predicted == targets)[targets != -100].all()


def test_autocast_trains():
    model, inputs = make_model().train(), make_mixed_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_embeddings(tied, tmp_path):
    model, inputs = make_model(tie_word_embeddings=tied), make_inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
    model.resize_token_embeddings(110)
    assert model.config.text_config.vocab_size == 110
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (110, 32)
    assert (model.get_input_embeddings().weight is model.lm_head.weight) == tied
    with torch.no_grad():
        outputs = model(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(outputs.logits[..., :99], expected)
    model.save_pretrained(tmp_path)
    reloaded = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(**inputs).logits, outputs.logits)
    new = torch.nn.Embedding(120, 32)
    reloaded.set_input_embeddings(new)
    assert reloaded.get_input_embeddings() is new is reloaded.model.language_model.embed_tokens


# ------------------------------------------------------------------------------------------------ experts


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_implementations_agree_in_the_whole_model(arrangement, implementation):
    model, inputs = make_model(expert_groups=arrangement), make_mixed_inputs()
    model.set_experts_implementation("eager")
    expected = real_logits(model, inputs)
    model.set_experts_implementation(implementation)
    assert model.config.text_config._experts_implementation == implementation
    assert_rows_close(real_logits(model, inputs), expected)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("tower", ["siglip", "clip", "dinov2"])
def test_experts_implementation_as_a_plain_string(tower, implementation, tmp_path):
    config = make_config(vision_config=TOWERS[tower])
    model = SparseMoeVlmForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    for made in (
        SparseMoeVlmForConditionalGeneration._from_config(config, experts_implementation=implementation),
        AutoModel.from_config(config, experts_implementation=implementation),
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, experts_implementation=implementation),
        AutoModel.from_pretrained(tmp_path, experts_implementation=implementation),
    ):
        assert made.config.text_config._experts_implementation == implementation
        language_model = made.get_decoder()
        assert language_model.layers[0].mlp.experts.config._experts_implementation == implementation
    model.set_experts_implementation(implementation)
    assert model.config.text_config._experts_implementation == implementation
    assert torch.isfinite(model(**make_inputs()).logits).all()
