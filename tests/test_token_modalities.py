"""The record of the tokens of a forward pass: its sources, that it is made only once, and its errors."""

import pytest
import torch

from modeling_sparse_moe_vlm import (
    SparseMoeVlmForCausalLM,
    SparseMoeVlmTextConfig,
    input_checks,
    token_modalities,
)
from modeling_sparse_moe_vlm.routing import RoutingPlanner
from modeling_sparse_moe_vlm.token_modalities import TokenModalities, padding_mask
from tests.support.models import IMAGE_TOKEN_ID, TEXT_CONFIG, make_inputs, make_model

pytestmark = pytest.mark.newest

NAMES = ["text", "image"]


@pytest.fixture
def made(monkeypatch) -> list[TokenModalities]:
    """Collects the records that are made."""
    records = []
    original = TokenModalities.of.__func__

    def of(cls, *args):
        records.append(original(cls, *args))
        return records[-1]

    monkeypatch.setattr(TokenModalities, "of", classmethod(of))
    return records


def planned(monkeypatch) -> list[TokenModalities]:
    """Returns a list of the records that planners receive."""
    given = []
    original = RoutingPlanner.plan

    def plan(self, tokens, *args):
        given.append(tokens)
        return original(self, tokens, *args)

    monkeypatch.setattr(RoutingPlanner, "plan", plan)
    return given


def test_padding_of_packed_sequences():
    """Has negative positions. With several axes, the first one counts."""
    positions = torch.tensor([[0, 1, -1], [0, 0, -1]])
    expected = [[True, True, False], [True, True, False]]
    axes = torch.stack([positions, torch.zeros_like(positions)])
    for position_ids in (positions, axes):
        assert TokenModalities.of((2, 3), None, None, NAMES, position_ids).is_real.tolist() == expected
    assert padding_mask(None, positions[:1], (2, 3)).tolist() == [expected[0]] * 2
    mask = torch.ones(2, 3)
    assert padding_mask(mask, positions, (2, 3)) is mask
    assert padding_mask(None, None, (2, 3)) is None
    assert padding_mask(None, torch.tensor([[-1], [3]]), (2, 1)) is None, "a decoded token is not padding"
    for other in (positions[:, :2], positions.expand(3, 2, 3)[:, 0], positions[0]):
        assert padding_mask(None, other, (2, 3)) is None, "the decoder raises an error"


@pytest.mark.parametrize("part", ["", "model", "model.language_model", "language model"])
def test_every_model_recognises_the_padding_of_packed_sequences(part, monkeypatch):
    model = make_model() if part != "language model" else SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG))
    given = planned(monkeypatch)
    model = model if part == "language model" else model.get_submodule(part)
    model(input_ids=torch.tensor([[5, 6, 7, 8]]), position_ids=torch.tensor([[0, 0, 1, -1]]))
    assert [tokens.is_real.tolist() for tokens in given] == [[[True, True, True, False]]]


def test_ids_and_padding():
    ids, mask = torch.tensor([[0, 1, 0]], dtype=torch.int32), torch.tensor([[1, 1, 0, 1, 1]])
    tokens = TokenModalities.of((1, 3), ids, mask, NAMES)
    assert tokens.ids.dtype == torch.long
    assert tokens.ids.tolist() == [[0, 1, 0]]
    assert tokens.is_real.tolist() == [[False, True, True]], "the last positions of the mask; the first ones are cached"
    assert TokenModalities.of((1, 3), None, None, NAMES) == (None, None)
    assert TokenModalities.of((1, 3), None, mask[None, None], NAMES) == (None, None), "a 4-D mask does not show padding"


@pytest.mark.parametrize("wrong", [[[0, 2, 0]], [[0, -1, 0]]])
def test_ids_out_of_range(wrong, arrangement):
    with pytest.raises(ValueError, match=r"between 0 and 1, the positions .* \('text', 'image'\), got \[.*\]"):
        TokenModalities.of((1, 3), torch.tensor(wrong), None, NAMES)
    inputs = make_inputs()
    inputs["mm_token_type_ids"][1, 0] = wrong[0][1]
    with pytest.raises(ValueError, match="between 0 and 1"):
        make_model(expert_groups=arrangement)(**inputs)


@pytest.mark.parametrize("shape", [(2, 13), (1, 14), (3, 14), (14,), (28,), (2, 1)])
def test_ids_with_another_shape_than_the_tokens(shape):
    """With and without images, for the whole model and its parts, and for ids and embeddings."""
    model = make_model()
    wrong = {"mm_token_type_ids": torch.zeros(shape, dtype=torch.long)}
    with_images = make_inputs() | wrong
    text = make_inputs(images_per_row=0) | wrong
    embeds = {"inputs_embeds": torch.zeros(2, 14, 32)} | wrong
    for call in (model, model.model):
        for inputs in (with_images, text, embeds):
            with pytest.raises(ValueError, match=r"`mm_token_type_ids` has shape .* tokens of shape \(2, 14\)"):
                call(**inputs)
    decoder = SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG))
    for call in (decoder, decoder.model):
        with pytest.raises(ValueError, match=r"`mm_token_type_ids` has shape .* tokens of shape \(2, 14\)"):
            call(**text)


@pytest.mark.parametrize("part", ["whole", "body", "decoder", "decoder body"])
def test_one_record_per_pass_is_passed_to_all_layers(part, made, monkeypatch):
    inputs = make_inputs() if part in ("whole", "body") else make_inputs(images_per_row=0)
    inputs["attention_mask"][0, :3] = 0
    given = planned(monkeypatch)
    model = make_model()
    decoder = SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG)).eval()
    call = {"whole": model, "body": model.model, "decoder": decoder, "decoder body": decoder.model}[part]
    call(**inputs, output_router_logits=True)
    assert len(made) == len(given) == 1
    assert given[0] is made[0]
    assert torch.equal(given[0].ids, inputs["mm_token_type_ids"])
    assert torch.equal(given[0].is_real, inputs["attention_mask"].bool())


def test_ids_are_derived_once_per_pass(monkeypatch):
    calls = []
    original = token_modalities.find_modalities
    for module in ("modeling_sparse_moe_vlm.modeling_sparse_moe_vlm.find_modalities",):
        monkeypatch.setattr(module, lambda *args: calls.append(1) or original(*args))
    inputs = make_inputs()
    inputs.pop("mm_token_type_ids")
    make_model()(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------ shifted ids


def shifted(inputs: dict[str, torch.Tensor], by: int) -> dict[str, torch.Tensor]:
    return inputs | {"mm_token_type_ids": inputs["mm_token_type_ids"].roll(by, dims=1)}


@pytest.mark.parametrize("by", [-2, 1, 5])
def test_images_go_where_their_tokens_are(by, arrangement):
    """Callers that pad tokens on the left and their modality ids on the right mark text tokens as images."""
    model, inputs = make_model(expert_groups=arrangement), make_inputs()
    with torch.no_grad():
        expected = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
        actual = model(**shifted(inputs, by), labels=inputs["input_ids"], output_router_logits=True)
        body = model.model(**shifted(inputs, by)).last_hidden_state
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(model.lm_head(body), expected.logits)
    for name in ("loss", "aux_loss", "aux_loss_by_modality"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_generation_from_ids_that_are_padded_on_the_other_side(options):
    model, inputs = make_model(alpha_init=0.8), make_inputs()
    padded = {name: torch.nn.functional.pad(value, (3, 0)) for name, value in inputs.items() if value.dim() == 2}
    padded["pixel_values"] = inputs["pixel_values"]
    options = options | {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**padded, **options)
    actual = model.generate(**shifted(padded, -3), **options)
    assert torch.equal(actual, expected)


def test_ids_are_derived_only_in_rows_with_shifted_ids():
    """The image token of the other row was generated by the model, so it counts as text."""
    model, inputs = make_model(), make_inputs()
    inputs["input_ids"][:, 12] = IMAGE_TOKEN_ID
    given = inputs["mm_token_type_ids"].clone()
    given[0] = given[0].roll(1)
    found = model.model.get_mm_token_type_ids(inputs["input_ids"], None, given)
    assert found[0].nonzero().flatten().tolist() == [2, 3, 4, 5, 12]
    assert found[1].nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert torch.equal(found[1], given[1])


def test_too_few_image_tokens_among_the_given_ids_are_an_error():
    model, inputs = make_model(), make_inputs()
    inputs["mm_token_type_ids"][0, 3] = 0
    with pytest.raises(ValueError, match="Image features and image tokens do not match: tokens: 7, features: 8"):
        model(**inputs)


def test_further_modalities_are_where_their_placeholders_are():
    ids = torch.tensor([[5, 9, 5, 9, 3]])
    given = torch.tensor([[2, 0, 0, 0, 1]])
    found = token_modalities.find_modalities(ids, None, given, {1: 3, 2: 9}, torch.nn.Embedding(10, 4))
    assert found.tolist() == [[0, 2, 0, 2, 1]]


def test_ids_of_modalities_without_a_placeholder_are_kept():
    model = make_model(modalities=["text", "image", "video"], expert_groups="isolated", num_experts=6)
    inputs = make_inputs(images_per_row=0)
    inputs["mm_token_type_ids"][:, 3:5] = 2
    found = model.model.get_mm_token_type_ids(inputs["input_ids"], None, inputs["mm_token_type_ids"])
    assert torch.equal(found, inputs["mm_token_type_ids"])
    inputs["mm_token_type_ids"][1, 8] = 1  # of a token that is not the image token
    found = model.model.get_mm_token_type_ids(inputs["input_ids"], None, inputs["mm_token_type_ids"])
    expected = torch.zeros(2, 14, dtype=torch.long)
    expected[:, 3:5] = 2
    assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_an_equal_embedding_is_that_of_a_placeholder(dtype):
    """An embedding that differs in one dimension by one rounding step belongs to another token."""
    model = make_model().to(dtype)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[50] = table[IMAGE_TOKEN_ID]
        table[50, 7] = torch.nextafter(table[50, 7], torch.tensor(torch.inf, dtype=dtype))
        table[51] = 0.0
        table[51, 7] = table[IMAGE_TOKEN_ID, 7]  # equal in only one dimension
        assert (table[50] != table[IMAGE_TOKEN_ID]).sum() == 1
        embeds = model.get_input_embeddings()(torch.tensor([[50, IMAGE_TOKEN_ID, 51, 4]]))
    assert model.model.get_mm_token_type_ids(None, embeds).tolist() == [[0, 1, 0, 0]]


def test_given_ids_of_embeddings_are_kept():
    model, ids = make_model(), torch.tensor([[0, 1, 1, 0]])
    embeds = model.get_input_embeddings()(torch.tensor([[IMAGE_TOKEN_ID, 4, 5, 6]]))
    assert torch.equal(model.model.get_mm_token_type_ids(None, embeds, ids), ids)


@pytest.mark.parametrize("by", [-2, 1, 5])
def test_images_among_embeddings_go_where_their_placeholders_are(by):
    model, inputs = make_model(), make_inputs()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, **inputs).logits
        actual = model(inputs_embeds=embeds, **shifted(inputs, by)).logits
    assert torch.equal(actual, expected)


def test_embeddings_have_shifted_ids_only_in_rows_with_as_many_placeholders():
    model, given = make_model(), torch.tensor([[0, 2, 1, 1, 0]] * 3)
    tokens = torch.tensor([[3, 4, 3, 5, 6], [3, 3, 3, 5, 6], [8, 4, 3, 5, 6]])
    found = model.model.get_mm_token_type_ids(None, model.get_input_embeddings()(tokens), given)
    assert found.tolist() == [[1, 2, 1, 0, 0], [0, 2, 1, 1, 0], [0, 2, 1, 1, 0]]


WARNING = "`inputs_embeds` came without `mm_token_type_ids`"


def warnings(caplog, call, **inputs) -> list[str]:
    input_checks.logger.warning_once.cache_clear()
    caplog.clear()
    with torch.no_grad():
        call(**inputs)
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(WARNING)]


@pytest.mark.parametrize(
    ("text_config", "warns"),
    [
        ({"expert_groups": "joint"}, False),
        ({"expert_groups": "joint", "alpha_init": 0.7}, True),
        ({"expert_groups": "joint", "learned_modality_priors": True}, True),
        ({"expert_groups": "joint", "num_experts_per_tok_by_modality": {"image": 1}}, True),
        ({"expert_groups": "joint", "num_experts_per_tok_by_modality": {"image": 2}}, False),
        ({"expert_groups": "joint", "router_bias_update_rate": 0.0}, True),
        ({"expert_groups": "joint", "expert_capacity_factor": 2.0}, True),
        ({"expert_groups": "isolated"}, True),
        ({}, True),
    ],
)
def test_merged_embeddings_without_ids_cause_a_warning(text_config, warns, caplog):
    """Serving engines pass such embeddings. With the ids, the outputs equal those for tokens and images."""
    model, inputs = make_model(**text_config), make_inputs()
    ids = inputs["mm_token_type_ids"]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
        merged = embeds.masked_scatter((ids == 1)[..., None], features)
        right = model(**inputs).logits
        same = model(inputs_embeds=merged, mm_token_type_ids=ids).logits
        silent = model(inputs_embeds=merged).logits
    torch.testing.assert_close(same, right)
    if not warns:
        torch.testing.assert_close(silent, right)
    for call in (model, model.model):
        assert len(warnings(caplog, call, inputs_embeds=merged)) == warns
        assert not warnings(caplog, call, inputs_embeds=merged, mm_token_type_ids=ids)
        assert not warnings(caplog, call, inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
        assert not warnings(caplog, call, **inputs)
        text = make_inputs(images_per_row=0)["input_ids"]
        assert not warnings(caplog, call, input_ids=text)
    options = {"max_new_tokens": 2, "pad_token_id": 0}
    assert len(warnings(caplog, model.generate, inputs_embeds=merged, **options)) == warns
