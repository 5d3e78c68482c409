"""Every generation method gives the tokens of forward passes without a cache."""

import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmTextConfig
from tests.support.models import IMAGE_TOKEN_ID, TEXT_CONFIG, TINY_DECODER, make_inputs, make_model
from tests.test_modeling import make_mixed_inputs, shift_left, split_rows

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
# Kinds of routing that need different data about the modalities of cached tokens.
MODELS = {
    "hybrid": {},
    "joint": {"expert_groups": "joint"},
    "isolated": {"expert_groups": "isolated"},
    "top_p": {"router": "top_p", "num_experts_per_tok": 3},
    "by_modality": {"num_experts_per_tok_by_modality": {"text": 1, "image": 3}},
}


@pytest.fixture(params=MODELS)
def model(request):
    return make_model(**MODELS[request.param])


@pytest.fixture(scope="module")
def plain_model():
    return make_model()


def greedy_reference(model, inputs: dict[str, torch.Tensor], num_new: int = NEW) -> torch.Tensor:
    """Returns new tokens `(B, num_new)`, each from a full forward pass without padding and without a cache."""
    rows = []
    for row in split_rows(inputs):
        input_ids = row["input_ids"]
        for _ in range(num_new):
            given = {"input_ids": input_ids, "use_cache": False}
            if "pixel_values" in row:
                given["pixel_values"] = row["pixel_values"]
            with torch.no_grad():
                token = model(**given).logits[:, -1:].argmax(dim=-1)
            input_ids = torch.cat([input_ids, token], dim=1)
        rows.append(input_ids[:, -num_new:])
    return torch.cat(rows)


def new_tokens(model, inputs, **kwargs) -> torch.Tensor:
    output = model.generate(**inputs, **GREEDY | kwargs)
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    return output[:, inputs["input_ids"].shape[1] :]


def test_greedy_equals_uncached_forward_passes(model):
    """Rows with and without images, padded left. Also with text only, and with derived modality ids."""
    inputs = make_mixed_inputs()
    expected = greedy_reference(model, inputs)
    assert len(expected.unique(dim=0)) > 1
    assert torch.equal(new_tokens(model, inputs), expected)
    assert torch.equal(new_tokens(model, inputs, use_cache=False), expected)
    derived = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
    assert torch.equal(new_tokens(model, derived), expected)
    for row, alone in enumerate(split_rows(inputs)):
        assert torch.equal(new_tokens(model, alone)[0], expected[row])
    text = make_inputs(images_per_row=0)
    expected = greedy_reference(model, text)
    assert torch.equal(new_tokens(model, text), expected)
    assert torch.equal(new_tokens(model, {"input_ids": text["input_ids"]}), expected)
    assert torch.equal(new_tokens(model, text | {"pixel_values": torch.empty(0)}), expected)


def test_cached_logits_equal_full_logits_step_by_step(model):
    inputs = make_inputs()
    continuation = torch.randint(4, 99, (2, 6), generator=torch.Generator().manual_seed(3))
    whole = {
        "input_ids": torch.cat([inputs["input_ids"], continuation], dim=1),
        "pixel_values": inputs["pixel_values"],
    }
    with torch.no_grad():
        full = model(**whole).logits
        for chunk in (1, 3):
            outputs = model(**inputs, use_cache=True)
            logits = [outputs.logits]
            for tokens in continuation.split(chunk, dim=1):
                outputs = model(input_ids=tokens, past_key_values=outputs.past_key_values, use_cache=True)
                logits.append(outputs.logits)
            torch.testing.assert_close(torch.cat(logits, dim=1), full, atol=2e-5, rtol=1e-4)


def test_prompt_cut_inside_and_after_images(plain_model):
    """The cache may end anywhere: before, inside or after the second image."""
    inputs = make_inputs(images_per_row=2)
    with torch.no_grad():
        full = plain_model(**inputs).logits
        for cut in (6, 10, 12):
            cached = {key: inputs[key][:, :cut] for key in ("input_ids", "mm_token_type_ids")}
            number = int(cached["mm_token_type_ids"].sum()) // 8
            pixels = inputs["pixel_values"].view(2, 2, 3, 16, 16)
            first = plain_model(**cached, pixel_values=pixels[:, :number].flatten(0, 1), use_cache=True)
            rest = {key: inputs[key][:, cut:] for key in cached}
            second = plain_model(
                **rest, pixel_values=pixels[:, number:].flatten(0, 1), past_key_values=first.past_key_values
            )
            torch.testing.assert_close(second.logits, full[:, cut:], atol=2e-5, rtol=1e-4)


def test_embeddings_as_prompt(model):
    inputs = make_mixed_inputs()
    expected = greedy_reference(model, inputs)
    given = dict(inputs)
    given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
    assert torch.equal(model.generate(**given, **GREEDY), expected)
    given.pop("mm_token_type_ids")
    assert torch.equal(model.generate(**given, **GREEDY), expected)
    text = make_inputs(images_per_row=0)
    embeds = model.get_input_embeddings()(text["input_ids"])
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), greedy_reference(model, text))


def test_encoded_images_as_prompt(plain_model):
    inputs = make_mixed_inputs()
    expected = greedy_reference(plain_model, inputs)
    given = {key: value for key, value in inputs.items() if key != "pixel_values"}
    with torch.no_grad():
        given["mm_encoder_outputs"] = {"image": plain_model.get_image_features(inputs["pixel_values"])}
    assert torch.equal(new_tokens(plain_model, given), expected)


# ------------------------------------------------------------------------------------------------ strategies


def test_sampling(plain_model):
    inputs = make_mixed_inputs()

    def sample(seed: int, **kwargs) -> torch.Tensor:
        torch.manual_seed(seed)
        return new_tokens(plain_model, inputs, do_sample=True, temperature=2.0, **kwargs)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert torch.equal(sample(0), sample(0, use_cache=False))
    assert torch.equal(sample(0, top_k=1), greedy_reference(plain_model, inputs))
    several = plain_model.generate(**inputs, **GREEDY | {"do_sample": True, "num_return_sequences": 3})
    assert several.shape == (12, 14 + NEW)


def test_beam_search(model):
    inputs = make_mixed_inputs()
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True}
    cached = model.generate(**inputs, **GREEDY | beams)
    uncached = model.generate(**inputs, **GREEDY | beams, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, atol=1e-4, rtol=1e-4)
    for row, alone in enumerate(split_rows(inputs)):
        expected = model.generate(**alone, **GREEDY | beams).sequences[:, -NEW:]
        assert torch.equal(cached.sequences[2 * row : 2 * row + 2, -NEW:], expected)


@pytest.mark.parametrize("images_last", [False, True])
def test_assisted_decoding(model, images_last):
    """Also if the prompt ends with an image: the candidates must not get the modality of its tokens."""
    inputs = split_rows(make_mixed_inputs())[2]
    if images_last:
        inputs = {key: value[:, :10] if key != "pixel_values" else value for key, value in inputs.items()}
        assert inputs["mm_token_type_ids"][0, -4:].all()
    expected = greedy_reference(model, inputs)
    torch.manual_seed(5)
    assistant = make_model(seed=1, num_hidden_layers=1)
    assert torch.equal(new_tokens(model, inputs, assistant_model=assistant), expected)
    close = copy.deepcopy(model)  # agrees with the model often enough that candidates are accepted
    with torch.no_grad():
        close.lm_head.weight += 0.02 * torch.randn_like(close.lm_head.weight)
    assert torch.equal(new_tokens(model, inputs, assistant_model=close), expected)
    assert torch.equal(new_tokens(model, inputs, prompt_lookup_num_tokens=3), expected)


def test_draft_model_of_another_class(model):
    """It has no argument for the modality ids, which the processor returns."""
    inputs = split_rows(make_mixed_inputs())[2]
    assert "mm_token_type_ids" in inputs
    torch.manual_seed(5)
    draft = LlamaForCausalLM(LlamaConfig(**TINY_DECODER)).eval()
    assert torch.equal(new_tokens(model, inputs, assistant_model=draft), greedy_reference(model, inputs))


def test_text_model_as_assistant_and_by_itself():
    torch.manual_seed(0)
    model = SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG)).eval()
    inputs = {"input_ids": make_inputs(images_per_row=0)["input_ids"]}
    expected = inputs["input_ids"]
    for _ in range(NEW):
        with torch.no_grad():
            token = model(input_ids=expected, use_cache=False).logits[:, -1:].argmax(dim=-1)
        expected = torch.cat([expected, token], dim=1)
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    one = inputs["input_ids"][:1]
    assert torch.equal(model.generate(one, **GREEDY, assistant_model=model), expected[:1])


def test_guidance_contrast_and_constraints(plain_model):
    inputs = make_mixed_inputs()
    biased = new_tokens(plain_model, inputs, sequence_bias=[[[7], 50.0]])
    assert (biased == 7).all()
    forced = new_tokens(plain_model, inputs, bad_words_ids=[[token] for token in range(99) if token not in (8, 9)])
    assert set(forced.unique().tolist()) <= {8, 9}
    guided = new_tokens(plain_model, inputs, guidance_scale=1.5, negative_prompt_ids=torch.full((4, 3), 5))
    assert guided.shape == (4, NEW)


# ------------------------------------------------------------------------------------------------ caches


@pytest.mark.parametrize("cache", ["static", "offloaded", "offloaded_static", "dynamic"])
def test_caches(model, cache):
    if cache.startswith("offloaded") and not torch.accelerator.is_available():
        pytest.skip("offloading moves the cache between an accelerator and the CPU")
    inputs = make_mixed_inputs()
    expected = greedy_reference(model, inputs)
    assert torch.equal(new_tokens(model, inputs, cache_implementation=cache, disable_compile=True), expected)


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantised_cache(plain_model, backend, monkeypatch):
    package = {"quanto": "optimum.quanto", "hqq": "hqq"}[backend]
    if importlib.util.find_spec(package.split(".")[0]) is None:
        pytest.skip(f"{backend} is not installed")
    if backend == "quanto":  # its kernel takes a minute to compile
        from optimum.quanto.library.extensions.extension import get_extension

        def unpack(packed, bits):
            return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])

        monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=unpack))
    inputs = make_mixed_inputs()
    output = new_tokens(
        plain_model,
        inputs,
        cache_implementation="quantized",
        cache_config={"backend": backend, "nbits": 4, "q_group_size": 32},
    )
    assert output.shape == (4, NEW)


def test_compiled_decoding_with_a_static_cache(plain_model):
    """`generate` compiles the forward pass automatically on an accelerator. Here, a setting forces it to."""
    inputs = make_mixed_inputs()
    expected = greedy_reference(plain_model, inputs, num_new=4)
    compiled = copy.deepcopy(plain_model)
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")
    output = new_tokens(compiled, inputs, cache_implementation="static", max_new_tokens=4)
    assert torch.equal(output, expected)


def test_continuing_from_a_returned_cache(model):
    inputs = make_mixed_inputs()
    expected = greedy_reference(model, inputs, num_new=2 * NEW)
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, DynamicCache)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
    ids = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, NEW))
    for extra in ({}, {"mm_token_type_ids": ids}):
        second = model.generate(
            input_ids=first.sequences,
            attention_mask=mask,
            past_key_values=copy.deepcopy(first.past_key_values),
            **GREEDY,
            **extra,
        )
        assert torch.equal(second[:, -2 * NEW :], expected)


def test_new_image_in_a_second_turn(model):
    """The second turn of a conversation has a new image and uses the cache of the first turn."""
    inputs = make_inputs(images_per_row=1)
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    turn = make_inputs(seed=4, images_per_row=1)
    whole = torch.cat([first.sequences, turn["input_ids"]], dim=1)
    images = torch.stack([inputs["pixel_values"], turn["pixel_values"]], dim=1).flatten(0, 1)
    given = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    fresh = model.generate(**given, pixel_values=images, **GREEDY)
    assert (whole == IMAGE_TOKEN_ID).sum() == 16
    continued = model.generate(
        **given,
        pixel_values=turn["pixel_values"],
        past_key_values=copy.deepcopy(first.past_key_values),
        **GREEDY,
    )
    assert torch.equal(continued, fresh)


def test_prefill_in_chunks(model):
    inputs = make_inputs(images_per_row=0, length=20)
    expected = greedy_reference(model, inputs)
    assert torch.equal(new_tokens(model, inputs, prefill_chunk_size=6), expected)


def test_outputs_of_every_step(plain_model):
    inputs = make_mixed_inputs()
    plain_model.set_attn_implementation("eager")
    outputs = plain_model.generate(
        **inputs,
        **GREEDY,
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
        output_router_logits=True,
    )
    assert len(outputs.logits) == len(outputs.hidden_states) == len(outputs.attentions) == NEW
    assert [len(step) for step in outputs.hidden_states] == [3] * NEW
    assert outputs.attentions[-1][0].shape == (4, 4, 1, 14 + NEW - 1)
    tokens = torch.stack(outputs.logits, dim=1).argmax(dim=-1)
    assert torch.equal(tokens, outputs.sequences[:, -NEW:])


def test_end_of_sequence_pads_the_rest(plain_model):
    inputs = make_mixed_inputs()
    expected = greedy_reference(plain_model, inputs)
    end = int(expected[0, 2])
    output = new_tokens(plain_model, inputs, eos_token_id=end, pad_token_id=0)
    for row, tokens in enumerate(expected.tolist()):
        length = tokens.index(end) + 1 if end in tokens else NEW
        assert output[row].tolist()[:length] == tokens[:length]
        assert not output[row, length:].any()


def test_generation_configuration_is_saved_and_loaded(plain_model, tmp_path):
    model = copy.deepcopy(plain_model)
    assert model.generation_config.pad_token_id == 0
    assert model.generation_config.eos_token_id == 2
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=98)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    inputs = make_inputs()
    assert torch.equal(reloaded.generate(**inputs), model.generate(**inputs))
    assert reloaded.generate(**inputs).shape[1] <= 17


def test_right_padding_gives_the_same_logits(plain_model):
    inputs = make_mixed_inputs()
    lengths = inputs["attention_mask"].sum(dim=1)
    with torch.no_grad():
        left = plain_model(**inputs).logits[:, -1]
        right = plain_model(**shift_left(inputs)).logits[torch.arange(4), lengths - 1]
    torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-4)
