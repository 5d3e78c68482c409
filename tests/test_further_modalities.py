"""A third modality needs only a configuration and a registered encoder. It gets experts and an attention weight."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.routing import measure_routing
from tests.support.models import IMAGE_TOKEN_ID, TEXT_CONFIG, VISION_CONFIG, make_inputs

SENSOR_TOKEN_ID = 98


class SensorConfig(PreTrainedConfig):
    """The encoder of a window of sensor readings, which is split into pieces."""

    model_type = "test_sensor"
    num_channels: int = 3
    window: int = 4
    hidden_size: int = 12


class SensorModel(PreTrainedModel):
    config: SensorConfig
    main_input_name = "readings"
    base_model_prefix = "model"

    def __init__(self, config: SensorConfig):
        super().__init__(config)
        self.embed = nn.Linear(config.num_channels * config.window, config.hidden_size)
        self.post_init()

    def forward(self, readings: torch.Tensor) -> BaseModelOutput:
        pieces = readings.unflatten(1, (-1, self.config.window)).flatten(2)
        return BaseModelOutput(last_hidden_state=self.embed(pieces))


AutoConfig.register("test_sensor", SensorConfig, exist_ok=True)
AutoModel.register(SensorConfig, SensorModel, exist_ok=True)

MODALITIES = ["text", "image", "sensor"]
GROUPS = [
    {"name": "joint", "num_experts": 4},
    {"name": "sensor_only", "num_experts": 2, "modalities": ["sensor"]},
    *(
        {"name": name, "num_experts": 1, "modalities": [name], "always_on": True}
        for name in ("text", "image", "sensor")
    ),
]
SENSOR = {"model_type": "test_sensor", "window": 2, "token_id": SENSOR_TOKEN_ID}


def make_config(**fields) -> SparseMoeVlmConfig:
    text = TEXT_CONFIG | {"modalities": MODALITIES, "expert_groups": GROUPS, "num_experts": None}
    given = {"image_token_id": IMAGE_TOKEN_ID, "modality_encoders": {"sensor": SENSOR}} | fields
    return SparseMoeVlmConfig(text_config=text, vision_config=VISION_CONFIG, **given)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SparseMoeVlmForConditionalGeneration(make_config()).eval()


@pytest.fixture
def inputs():
    """Two rows with an image and three pieces of readings each."""
    inputs = make_inputs()
    inputs["input_ids"] = inputs["input_ids"].clamp(max=SENSOR_TOKEN_ID - 1)
    inputs["input_ids"][:, 8:11] = SENSOR_TOKEN_ID
    inputs["modality_values"] = {"sensor": torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))}
    return inputs


def test_the_error_about_a_new_token_shows_the_code_that_adds_it(inputs):
    """The code of the error adds an embedding for the new token, which is then the placeholder of readings."""
    torch.manual_seed(0)
    model = SparseMoeVlmForConditionalGeneration(make_config(modality_encoders={"sensor": dict(SENSOR)})).eval()
    with pytest.raises(ValueError, match=r"\['sensor'\]\['token_id'\]` .* from 0 to 98, got 99") as error:
        make_config(modality_encoders={"sensor": SENSOR | {"token_id": 99}})
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    exec("\n".join(lines), {"model": model, "tokenizer": range(100)})
    inputs["input_ids"][inputs["input_ids"] == SENSOR_TOKEN_ID] = 99
    logits = model(**inputs).logits
    assert logits.shape[-1] == 100
    inputs["modality_values"]["sensor"] = inputs["modality_values"]["sensor"] + 1
    assert (model(**inputs).logits - logits).abs().max() > 1e-3


@torch.no_grad()
def test_tokens_come_from_the_encoder(model, inputs):
    base = model.model
    embeds = base.get_input_embeddings()(inputs["input_ids"])
    ids = base.get_mm_token_type_ids(inputs["input_ids"])
    assert ids[0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 2, 0, 0, 0]
    filled = base.modality_encoders.embed(inputs["modality_values"], embeds, ids)
    encoder = base.modality_encoders["sensor"]
    pieces = inputs["modality_values"]["sensor"].reshape(2, 3, 6)
    expected = encoder.linear_2(encoder.act(encoder.linear_1(encoder.encoder.embed(pieces))))
    torch.testing.assert_close(filled[:, 8:11], expected)
    assert torch.equal(filled[:, :8], embeds[:, :8])


@torch.no_grad()
def test_it_has_its_own_experts_and_attention_weight(model, inputs):
    outputs = model(**inputs, output_router_logits=True, output_modality_weights=True)
    serves = outputs.router_logits[0].isfinite().unflatten(0, (2, 14))
    assert serves[0, 8].all()
    assert not serves[0, 0, 4:].any(), "the sensor's experts serve no text"
    weights = outputs.modality_weights[0]
    assert weights.shape == (2, 4, 14, 3)
    assert weights[:, :, :8, 2].eq(0).all()
    assert (weights[:, :, 8:, 2] > 0).all()
    steered = model(**inputs, modality_priors={"sensor": 5.0}, output_modality_weights=True).modality_weights[0]
    assert (steered[:, :, 8:, 2] > weights[:, :, 8:, 2]).all()
    changed = dict(inputs, modality_values={"sensor": inputs["modality_values"]["sensor"] + 1})
    assert not torch.allclose(model(**changed).logits[:, -1], outputs.logits[:, -1])


def test_the_ids_of_the_processor_do_not_distinguish_it(model, inputs):
    with torch.no_grad():
        known = model(**{**inputs, "mm_token_type_ids": model.model.get_mm_token_type_ids(inputs["input_ids"])})
        assert torch.equal(model(**inputs).logits, known.logits)


def test_its_tokens_are_counted_separately(model, inputs):
    counts = measure_routing(model, [inputs])
    assert counts.tokens.tolist() == [14, 8, 6], "the ids given call its tokens text"


def test_generation(model, inputs):
    new = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)[:, 14:]
    ids = inputs["input_ids"]
    rest = {name: inputs[name] for name in ("pixel_values", "modality_values")}
    for _ in range(4):
        with torch.no_grad():
            logits = model(input_ids=ids, **rest, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(new, ids[:, 14:])


@pytest.mark.parametrize("numbers", [(1, 1), (2, 1), (0, 2)])
def test_beams_have_the_values_of_their_rows(model, inputs, numbers):
    """The rows have different numbers of items, with three pieces each."""
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == SENSOR_TOKEN_ID, 50)
    for row, number in zip(ids, numbers):
        row[8 : 8 + 3 * number] = SENSOR_TOKEN_ID
    items = torch.randn(sum(numbers), 6, 3, generator=torch.Generator().manual_seed(0))
    options = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    together = model.generate(
        input_ids=ids, pixel_values=inputs["pixel_values"], modality_values={"sensor": items}, **options
    )
    for row, own in enumerate(items.split(numbers)):
        alone = model.generate(
            input_ids=ids[row : row + 1],
            pixel_values=inputs["pixel_values"][row : row + 1],
            modality_values={"sensor": own} if len(own) else {},
            **options,
        )
        assert torch.equal(together[row], alone[0])
    with pytest.raises(ValueError, match="Features and tokens of modality 'sensor' do not match"):
        model.generate(
            input_ids=ids, pixel_values=inputs["pixel_values"], modality_values={"sensor": items[:1, :4]}, **options
        )


def test_it_trains_and_reloads(model, inputs, tmp_path):
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.model.modality_encoders.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert model.config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.modality_encoders == {"sensor": SENSOR}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_wrong_numbers_and_names(model, inputs):
    short = dict(inputs, modality_values={"sensor": inputs["modality_values"]["sensor"][:, :4]})
    with pytest.raises(ValueError, match="Features and tokens of modality 'sensor' do not match"):
        model(**short)
    with pytest.raises(ValueError, match=r"`modality_values` has 'smell', but there are encoders for \['sensor'\]"):
        model(**dict(inputs, modality_values={"smell": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        ({"smell": SENSOR}, r"keys are further modalities of `text_config.modalities`, \['sensor'\]"),
        ({"image": SENSOR}, r"keys are further modalities"),
        ({"sensor": {"model_type": "test_sensor"}}, r"must be a dict with `model_type`, .* and `token_id`"),
        ({"sensor": SENSOR | {"token_id": 99}}, r"`modality_encoders\['sensor'\]\['token_id'\]` must be an integer"),
        ({"sensor": SENSOR | {"token_id": IMAGE_TOKEN_ID}}, r"placeholder tokens .* repeats a value"),
    ],
)
def test_wrong_configurations(encoders, message):
    with pytest.raises(ValueError, match=message):
        make_config(modality_encoders=encoders)


def test_an_encoder_that_is_not_registered():
    config = make_config(modality_encoders={"sensor": SENSOR | {"model_type": "unheard_of"}})
    with pytest.raises(ValueError, match=r"'unheard_of'.*Register its classes first"):
        SparseMoeVlmForConditionalGeneration(config)
