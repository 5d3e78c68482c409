"""Absurd sizes are refused before any loop over layers, groups or modalities. Token ids are within the vocabulary."""

import pytest
from transformers import AutoConfig

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmTextConfig
from modeling_sparse_moe_vlm.checks import shown
from tests.support.models import TEXT_CONFIG, VISION_CONFIG, make_config

pytestmark = pytest.mark.newest

HUGE = 10**9


def group(**keys) -> dict:
    return {"expert_groups": [{"name": "joint", "num_experts": 4} | keys]}


ABSURD = [
    ({"num_hidden_layers": HUGE}, r"`num_hidden_layers` is 1000000000, which is not plausible: at most 4096 is"),
    ({"num_hidden_layers": 4097}, r"`num_hidden_layers` is 4097"),
    ({"num_hidden_layers": HUGE, "decoder_sparse_step": HUGE}, r"`num_hidden_layers` is 1000000000"),
    ({"num_hidden_layers": HUGE, "expert_pool": [0, 0]}, r"`num_hidden_layers` is 1000000000"),
    ({"num_experts": HUGE}, r"`num_experts` is 1000000000, which is not plausible: at most 1000000 is"),
    (group(num_experts=1_000_001), r"`expert_groups\['joint'\].num_experts` is 1000001.*at most 1000000"),
    (group(layers=[0] * 4097), r"`expert_groups\['joint'\].layers` has 4097 entries.*at most 4096"),
    (group(modalities=["text"] * 101), r"`expert_groups\['joint'\].modalities` has 101 entries.*at most 100"),
    ({"expert_groups": [{}] * 1001}, r"`expert_groups` has 1001 entries.*at most 1000"),
    ({"mlp_only_layers": [0] * 4097}, r"`mlp_only_layers` has 4097 entries"),
    ({"modalities": ["text"] * 101}, r"`modalities` has 101 entries"),
]


@pytest.mark.parametrize(("fields", "message"), ABSURD)
def test_absurd_sizes_of_the_decoder(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseMoeVlmTextConfig(**TEXT_CONFIG | fields)
    with pytest.raises(ValueError, match=message):
        SparseMoeVlmConfig(text_config=TEXT_CONFIG | fields, vision_config=VISION_CONFIG)


@pytest.mark.parametrize(
    "fields", [{"num_hidden_layers": 4096, "decoder_sparse_step": 4096}, {"num_experts": 1_000_000}]
)
def test_the_bounds_themselves_are_allowed(fields):
    config = SparseMoeVlmTextConfig(**TEXT_CONFIG | fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"vision_config": {"num_hidden_layers": HUGE}}, r"`vision_config.num_hidden_layers` is 1000000000"),
        (
            {"modality_encoders": {"depth": {"model_type": "vit", "token_id": 4, "num_hidden_layers": HUGE}}},
            r"`modality_encoders\['depth'\].num_hidden_layers` is 1000000000.*at most 4096",
        ),
        (
            {"modality_encoders": {"depth": {"model_type": "clap", "token_id": 4, "audio_config": {"depth": 4097}}}},
            r"`modality_encoders\['depth'\].audio_config.depth` is 4097",
        ),
    ],
)
def test_absurd_sizes_of_library_models(parts, message):
    fields = make_config(modalities=["text", "image", "depth"]).to_dict()
    for name, values in parts.items():
        fields[name] = (fields[name] or {}) | values
    with pytest.raises(ValueError, match=message):
        SparseMoeVlmConfig.from_dict(fields)


def test_absurd_sizes_in_a_file(tmp_path):
    config = make_config()
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 2', f'"num_hidden_layers": {HUGE}'))
    with pytest.raises(ValueError, match="`num_hidden_layers` is 1000000000"):
        AutoConfig.from_pretrained(tmp_path)


def test_absurd_sizes_set_later():
    config = make_config()
    config.text_config.num_hidden_layers = HUGE
    for look in (
        config.validate_architecture,
        config.num_parameters,
        lambda: config.text_config.sparse_layers,
        lambda: config.text_config.layers_by_experts,
    ):
        with pytest.raises(ValueError, match="`num_hidden_layers` is 1000000000"):
            look()


@pytest.mark.parametrize(("step", "dense", "sparse"), [(1, [], [0, 1, 2, 3, 4]), (2, [], [1, 3]), (2, [3], [1])])
def test_sparse_layers(step, dense, sparse):
    fields = {"num_hidden_layers": 5, "decoder_sparse_step": step, "mlp_only_layers": dense}
    config = SparseMoeVlmTextConfig(**TEXT_CONFIG | fields)
    assert config.sparse_layers == sparse == [layer for layer in range(5) if config.is_sparse_layer(layer)]


def test_the_layer_with_other_groups_is_named():
    """Layers with the same groups are checked once, but every different list of groups is checked."""
    groups = [
        {"name": "first", "num_experts": 4, "layers": [0, 1]},
        {"name": "second", "num_experts": 1, "layers": [2]},
    ]
    with pytest.raises(ValueError, match="layer 2 has 1 routed experts"):
        SparseMoeVlmTextConfig(**TEXT_CONFIG | {"num_experts": None, "num_hidden_layers": 3, "expert_groups": groups})


def test_long_values_are_cut_in_messages():
    assert shown("a" * 498) == repr("a" * 498)
    assert shown("a" * 499) == f"'{'a' * 499}…"


# ------------------------------------------------------------------------------------------------ token ids


@pytest.mark.parametrize("field", ["pad_token_id", "bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-1, 99, True, "2", 2.0])
def test_wrong_token_ids(field, value):
    with pytest.raises(ValueError, match=rf"`{field}` must be an integer from 0 to 98, got {value!r}"):
        SparseMoeVlmTextConfig(**TEXT_CONFIG | {field: value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "`eos_token_id` is an empty list"),
        ([2, 99], r"`eos_token_id\[1\]` must be an integer from 0 to 98, got 99"),
        ([2, True], r"`eos_token_id\[1\]` must be an integer"),
        (["2"], "`eos_token_id` must be a list of int"),
    ],
)
def test_wrong_lists_of_end_tokens(value, message):
    with pytest.raises(ValueError, match=message):
        SparseMoeVlmTextConfig(**TEXT_CONFIG | {"eos_token_id": value})


@pytest.mark.parametrize("value", [None, 0, 98, [2], [2, 98]])
def test_right_end_tokens(value):
    assert SparseMoeVlmTextConfig(**TEXT_CONFIG | {"eos_token_id": value}).eos_token_id == value


@pytest.mark.parametrize("value", [True, "3", 99])
def test_wrong_placeholder_tokens(value):
    fields = make_config().to_dict()
    with pytest.raises(ValueError, match=r"`image_token_id` must be an integer from 0 to 98"):
        SparseMoeVlmConfig.from_dict(fields | {"image_token_id": value})
