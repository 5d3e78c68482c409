"""Recorded calls of `generate`: the same tokens as without recording, and the attention and routing of the model."""

import threading
from types import SimpleNamespace

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.app.generation import generate_recorded
from modeling_sparse_moe_vlm.toolbox.app.loading import read_attention_matrices
from modeling_sparse_moe_vlm.toolbox.app.recording import decoder_of
from modeling_sparse_moe_vlm.toolbox.app.settings import Settings
from modeling_sparse_moe_vlm.toolbox.modality_weights import modality_weights
from modeling_sparse_moe_vlm.toolbox.routing import watch
from tests.support import in_tree_models
from tests.support.in_tree_models import IMAGE, MODELS, make_mllama, make_mllama_inputs, prepare
from tests.support.models import make_inputs as make_our_inputs
from tests.support.models import make_model as make_our_model
from tests.support.processors import make_tokenizer
from tests.support.upcycled import make_inputs as make_upcycled_inputs
from tests.support.upcycled import make_upcycled

SETTINGS = Settings(max_new_tokens=6)
STEERED = Settings(max_new_tokens=6, image_prior=3.0, guidance=0.5)
TOKENIZER = make_tokenizer()


def first_row(inputs: dict) -> dict:
    """Returns the inputs of the first of two rows, which is not padded."""
    return {name: value[: len(value) // 2] for name, value in inputs.items()}


def make_ours(**options):
    model = prepare(make_our_model(**options))
    model.generation_config.suppress_tokens = [IMAGE]
    return model, first_row(make_our_inputs())


def generate(model, inputs, settings=SETTINGS, has_images=True, **options):
    return generate_recorded(model, TOKENIZER, inputs, settings, has_images=has_images, **options)


@torch.no_grad()
def attention_of_whole(model, tokens, inputs, **steering) -> torch.Tensor:
    """Returns the attention `(layers, heads, T, T)` of one forward pass over the whole text."""
    whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], tokens[None, :-1]], dim=1)}
    for name in {"attention_mask", "token_type_ids", "mm_token_type_ids"} & set(inputs):
        value = 1 if name == "attention_mask" else 0
        whole[name] = torch.nn.functional.pad(inputs[name], (0, len(tokens) - 1), value=value)
    return torch.stack(model(**whole, output_attentions=True, **steering).attentions)[:, 0]


@pytest.mark.parametrize("settings", [SETTINGS, STEERED], ids=["plain", "steered"])
def test_our_models(settings):
    model, inputs = make_ours()
    steering = {"modality_priors": {"image": 3.0}, "modality_guidance": 0.5} if settings is STEERED else {}
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False, **steering)[0, 14:]
    read_attention_matrices(model)
    ours = generate(model, inputs, settings)
    assert torch.equal(ours.tokens, expected)
    assert ours.alpha_note == ""

    attention = attention_of_whole(model, ours.tokens, inputs, **steering)
    is_image = torch.nn.functional.pad(inputs["input_ids"][0] == IMAGE, (0, 5))
    alpha = attention[..., is_image].sum(dim=-1)[:, :, 13:].mean(dim=(0, 1))
    torch.testing.assert_close(torch.tensor(ours.alpha), alpha, rtol=1e-4, atol=1e-5)
    to_prompt = torch.from_numpy(ours.recording.attention_to_prompt(range(6), 14)).float()
    torch.testing.assert_close(to_prompt, attention[:, :, 13:, :14].mean(dim=(0, 1)), rtol=1e-4, atol=1e-5)
    assert to_prompt.std() > 0.02, "attention is not uniform"


def test_count_free_alpha_of_our_models():
    model, inputs = make_ours()
    ours = generate(model, inputs)
    output = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, output_modality_weights=True, return_dict_in_generate=True
    )
    for values, steps in (
        (ours.alpha, output.modality_weights),
        (ours.count_free_alpha, output.count_free_modality_weights),
    ):
        expected = [torch.stack(layers)[:, 0, :, -1, 1].mean() for layers in steps]
        torch.testing.assert_close(torch.tensor(values), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [SETTINGS, STEERED], ids=["plain", "steered"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, settings):
    """Also beyond the window of sliding layers, in which the first tokens of the prompt are no longer visible."""
    model, inputs = in_tree_models.make_model(name), first_row(in_tree_models.make_inputs(name))
    read_attention_matrices(model)
    steering = {"modality_priors": {"image": 3.0}, "modality_guidance": 0.5} if settings is STEERED else {}
    with modality_weights(model, **steering) as weights:
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, 14:]
    ours = generate(model, inputs, settings)
    assert torch.equal(ours.tokens, expected)
    for values, count_free in ((ours.alpha, False), (ours.count_free_alpha, True)):
        by_token = weights.of("image", count_free=count_free)[:, 0, :, 13:].mean(dim=(0, 1))
        torch.testing.assert_close(torch.tensor(values), by_token, rtol=1e-4, atol=1e-5)
    attention = ours.recording.attention_to_prompt(range(6), 14)
    is_image = (inputs["input_ids"][0] == IMAGE).numpy()
    assert attention.shape == (6, 14)
    torch.testing.assert_close(
        torch.from_numpy(attention[:, is_image].sum(axis=1)).float(), torch.tensor(ours.alpha), rtol=1e-3, atol=1e-4
    )
    assert ours.recording.experts == []


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_upcycled_models(kind):
    model, inputs = make_upcycled(kind, "hybrid", num_experts=5), first_row(make_upcycled_inputs(kind))
    seen = []
    handles = watch.watch_routing(model, lambda config, tokens, layers: seen.append(layers))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    ours = generate(model, inputs)
    assert ours.recording.layers == [0, 1]
    assert ours.recording.groups == [[("joint", 5)]] * 2
    for experts, layer in zip(ours.recording.experts, seen[0], strict=True):
        assert torch.equal(experts, layer.chosen[:, 0])
    assert len(ours.alpha) == 6
    assert len(torch.stack(ours.recording.experts).unique()) > 2


def test_experts_of_groups():
    """Always-on experts are not listed, and those of images come after those of text."""
    model, inputs = make_ours(expert_groups="isolated")
    record = generate(model, inputs).recording
    assert record.groups == [[("text", 2), ("image", 2)]] * 2
    is_image = inputs["input_ids"][0] == IMAGE
    for experts in record.experts:
        assert experts.shape == (14,)
        assert ((experts >= 2) == is_image).all()
    model, inputs = make_ours()
    assert generate(model, inputs).recording.groups == [[("joint", 4)]] * 2


def test_without_images():
    model, inputs = make_ours()
    inputs = {"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 50)}
    ours = generate(model, inputs, STEERED, has_images=False)
    assert torch.equal(ours.tokens, model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, 14:])
    assert ours.alpha == ours.count_free_alpha == []
    assert ours.alpha_note == "There is no image in the conversation: all attention is on the text."


def test_a_model_whose_attention_cannot_be_read_still_answers():
    torch.manual_seed(0)
    model = prepare(make_mllama())
    inputs = make_mllama_inputs()
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, 4:]
    pieces: list[str] = []
    ours = generate(model, inputs, STEERED, on_text=pieces.append)
    assert torch.equal(ours.tokens, expected)
    assert ours.alpha == []
    assert len(ours.recording.attention) == len(ours.tokens), "the failed pass is not recorded"
    assert ours.alpha_note.startswith("The attention of this model can be neither read nor steered: layer 1")
    assert "".join(pieces) == TOKENIZER.decode(ours.tokens, skip_special_tokens=True)


@pytest.mark.parametrize("sequences", [[5, 6], [*range(7, 21), 5, 6]], ids=["without the prompt", "with the prompt"])
def test_passes_that_are_not_those_of_the_tokens(sequences, monkeypatch):
    """Some models generate in another way than with one forward pass for each token."""
    model, inputs = in_tree_models.make_model("llava"), first_row(in_tree_models.make_inputs("llava"))
    inputs["input_ids"] = torch.arange(7, 21)[None]
    output = SimpleNamespace(sequences=torch.tensor([sequences]))
    monkeypatch.setattr(model, "generate", lambda **kwargs: output)
    ours = generate(model, inputs)
    assert ours.tokens.tolist() == [5, 6]
    assert ours.alpha == ours.recording.attention == []
    message = "α of the words is not known: there were 2 new tokens, but 0 forward passes with weights."
    assert ours.alpha_note == message


def test_models_without_a_known_decoder():
    module = torch.nn.Linear(1, 1)
    assert decoder_of(module) is module
    module.get_decoder = lambda: None
    assert decoder_of(module) is module
    read_attention_matrices(module)


def test_other_mistakes_are_raised():
    model, inputs = make_ours()
    with pytest.raises(ValueError, match="temperature"):
        generate(model, inputs, Settings(max_new_tokens=2, temperature=-1.0))


def test_attention_that_is_not_eager_is_not_known():
    model, inputs = in_tree_models.make_model("llava"), first_row(in_tree_models.make_inputs("llava"))
    ours = generate(model, inputs)
    assert len(ours.alpha) == 6
    assert ours.recording.attention_to_prompt(range(6), 14) is None


def test_text_arrives_piece_by_piece_and_can_be_stopped():
    model, inputs = make_ours()
    pieces: list[str] = []
    stop = threading.Event()

    def on_text(piece: str) -> None:
        pieces.append(piece)
        stop.set()

    ours = generate(model, inputs, Settings(max_new_tokens=60), on_text=on_text, stop=stop)
    assert len(ours.tokens) < 60
    assert "".join(pieces) == TOKENIZER.decode(ours.tokens, skip_special_tokens=True)
    assert len(ours.alpha) == len(ours.tokens)


def test_the_model_is_not_changed():
    model, inputs = make_ours()
    read_attention_matrices(model)
    model.train()
    model.lm_head.eval()

    def num_hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    generate(model, inputs)  # Transformers installs its own hooks once
    before = num_hooks()
    generate(model, inputs)
    assert num_hooks() == before
    assert model.training
    assert not model.lm_head.training


def test_a_model_in_training_answers_without_dropout():
    model, inputs = make_ours(attention_dropout=0.5)
    expected = generate(model, inputs).alpha
    model.train()
    assert generate(model, inputs).alpha == expected


def test_matrices_are_not_kept(monkeypatch):
    model, inputs = make_ours()
    read_attention_matrices(model)
    outputs = []
    own = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: outputs.append(own(**kwargs)) or outputs[-1])
    generate(model, inputs)
    assert {matrix.shape[2] for step in outputs[0].attentions for matrix in step} == {1}
