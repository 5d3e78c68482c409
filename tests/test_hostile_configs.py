"""Wrong and hostile configurations: every field with values of all kinds gives a clear error, or is accepted."""

import copy
import random
import signal

import pytest
import torch

from modeling_sparse_moe_vlm.checks import build_config, check_library_fields, errors_of_config
from tests.support.models import make_model
from tests.support.retrieval import make_retrieval_model
from tests.support.upcycled import make_few_experts

pytestmark = pytest.mark.newest

NESTED: list = []
for _ in range(100):
    NESTED = [NESTED]
VALUES = [
    *(None, True, -1, 0, 10**6, 10**12, 2**70, 1.5, float("nan"), float("inf"), "no", "", "../../etc/passwd"),
    *([], {}, [1, "a"], {"a": {"b": []}}, NESTED),
]
MODELS = {
    "ours": lambda: make_model(learned_modality_priors=True),
    "retrieval": make_retrieval_model,
    "upcycled": lambda: make_few_experts("llava"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(autouse=True)
def no_hang():
    """Ends a test that hangs, since a wrong configuration can make a model loop for a long time."""

    def fail(*_):
        raise TimeoutError("a wrong configuration hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(900)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fields_of(fields, before=()):
    """Yields the path of every field and of every entry of a list."""
    for key, value in fields.items() if isinstance(fields, dict) else enumerate(fields):
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from fields_of(value, (*before, key))


def with_value(fields: dict, path: tuple, value) -> dict:
    fields = copy.deepcopy(fields)
    holder = fields
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return fields


def refusal(model, fields: dict) -> str | None:
    """Returns the error message for a configuration, or `None`. An error of another kind fails the test."""
    try:
        config = type(model.config).from_dict(fields)
        with torch.device("meta"):
            type(model)(config)
    except ValueError as error:
        return str(error)
    return None


def check_values(model, choose_paths, values_of) -> None:
    fields, refused = model.config.to_dict(), 0
    for path in choose_paths(list(fields_of(fields))):
        for value in values_of(path):
            try:
                message = refusal(model, with_value(fields, path, value))
            except Exception as error:
                raise AssertionError(f"{path} = {value!r} fails with {type(error).__name__}: {error}") from error
            if message is not None:
                refused += 1
                assert "`" in message or "creating it failed" in message, (path, value, message)
    assert refused > 10


def test_wrong_values_for_some_fields(model):
    generator = random.Random(0)
    check_values(model, lambda paths: generator.sample(paths, 40), lambda path: [generator.choice(VALUES)])


@pytest.mark.extensive
@pytest.mark.slow
def test_wrong_values_for_every_field(model):
    generator = random.Random(1)
    check_values(model, list, lambda path: generator.sample(VALUES, 4))


HUGE = 2**24
OF_OURS = [
    (("text_config", "hidden_size"), HUGE + 1, "`hidden_size` is 16777217, which is not plausible: at most 16777216"),
    (("text_config", "intermediate_size"), 2**70, "`intermediate_size` is 1180591620717411303424"),
    (("text_config", "vocab_size"), HUGE + 1, "`vocab_size` is 16777217"),
    (("text_config", "num_attention_heads"), HUGE + 1, "`num_attention_heads` is 16777217"),
    (("text_config", "head_dim"), HUGE, "`head_dim` is 16777216, which is not plausible: at most 4194304"),
    (("text_config", "max_position_embeddings"), 2**70, "`max_position_embeddings` is 1180591620717411303424"),
    (("text_config", "rope_parameters", "rope_theta"), None, "`rope_parameters['rope_theta']` must be a number"),
    (("text_config", "rope_parameters", "rope_theta"), 2**70, "`rope_parameters['rope_theta']` must be a number from"),
    (("text_config", "dtype"), "float33", "`dtype` must be the name of a dtype of torch, got 'float33'"),
    (("dtype",), 7, "`dtype` must be the name of a dtype of torch, got 7"),
    (("id2label",), 3, "`id2label` (3) is invalid: 'int' object has no attribute 'items'"),
    (("vision_config", "hidden_size"), "16", "`vision_config.hidden_size` ('16') is invalid: TypeError: Field"),
    (("vision_config", "hidden_size"), HUGE + 1, "`vision_config.hidden_size` is 16777217"),
    (("vision_config", "hidden_size"), 17, "`vision_config.hidden_size` (17) must be a multiple of"),
    (("vision_config", "image_size"), 2**16 + 4, "`vision_config.image_size` is 65540"),
    (("vision_config", "hidden_act"), "no", "`vision_config.hidden_act` must be one of"),
    (
        ("vision_config", "num_attention_heads"),
        0,
        "`vision_config.num_attention_heads` must be an integer of at least 1",
    ),
    (("vision_config", "num_channels"), -1, "`vision_config.num_channels` must be an integer of at least 0"),
    (("vision_config", "dtype"), {}, "`vision_config.dtype` must be the name of a dtype"),
    (("text_config", "expert_groups", 0, "intermediate_size"), HUGE + 1, ".intermediate_size` is 16777217"),
    (("text_config", "expert_groups", 0, "num_experts"), 10**6, None),
]


@pytest.mark.parametrize(("path", "value", "message"), OF_OURS)
def test_values_of_our_architecture(path, value, message):
    model = make_model()
    refused = refusal(model, with_value(model.config.to_dict(), path, value)) or ""
    if message is not None:
        assert message in refused
    else:
        assert "`num_experts`" in refused


OF_UPCYCLED = [
    (("experts_config",), 3, "`experts_config` must be a configuration or a dict, got 3"),
    (("experts_config", "blocks"), "mlp", "`blocks` must be a list of str, got 'mlp'"),
    (("experts_config", "blocks", 0), "none.mlp", "`experts_config.blocks` names ['none.mlp'], which"),
    (
        ("text_config", "rope_parameters", "rope_theta"),
        "a",
        "`text_config.rope_parameters.rope_theta` must be more than",
    ),
    (("text_config", "head_dim"), 0, "`text_config.head_dim` must be an integer of at least 1"),
    (("text_config", "num_hidden_layers"), 4097, "`text_config.num_hidden_layers` is 4097"),
    (
        ("vision_config", "image_size"),
        [],
        "does not describe a LlavaForConditionalGeneration, creating it failed (TypeE",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), OF_UPCYCLED)
def test_values_of_upcycled_models(path, value, message):
    model = make_few_experts("llava")
    assert message in (refusal(model, with_value(model.config.to_dict(), path, value)) or "")


@pytest.mark.parametrize("make", [make_model, lambda: make_few_experts("llava")])
@pytest.mark.parametrize(
    ("path", "limit"),
    [
        (("num_labels",), 2**20),
        (("text_config", "num_labels"), 2**20),
        (("text_config", "num_hidden_layers"), 4096),
        (("vision_config", "num_hidden_layers"), 4096),
    ],
)
def test_lists_that_fill_the_memory(path, limit, make):
    """Transformers makes them before the other checks: names of labels, types of layers."""
    fields = make().config.to_dict()
    name = ".".join(path)
    if fields["text_config"]["model_type"] == "sparse_moe_vlm_text" and path == ("text_config", "num_hidden_layers"):
        name = "num_hidden_layers"  # the text configuration checks it itself
    message = f"`{name}` is 1000000000000, which is not plausible: at most {limit} is allowed"
    assert message in (refusal(make(), with_value(fields, path, 10**12)) or "")
    with pytest.raises(ValueError, match=r"`a\.num_labels` is 1048577"):
        build_config(dict, {"a": {"num_labels": 2**20 + 1}})
    assert build_config(dict, {"a": {"num_labels": 2**20, "other": 2**21}}) is not None


def test_too_many_weights():
    """The bound is on the product, so that each size can be large."""
    fields = {"hidden_size": 2**20, "num_experts": 2**10, "moe_intermediate_size": 2**20, "num_attention_heads": 4}
    model = make_model()
    message = r"`expert_groups\['joint'\]` would have 3,377,699,720,527,872 weights per layer"
    with pytest.raises(ValueError, match=message):
        type(model.config.text_config)(**fields)


# ------------------------------------------------------------------------------------------------ the checks themselves


def test_the_wrong_field_is_found_by_leaving_it_out():
    def make(fields):
        if fields.get("a", 1) != 1:
            raise AssertionError
        return fields["b"]["c"] + len(fields)

    assert build_config(make, {"a": 1, "b": {"c": 2}}) == 4
    with pytest.raises(ValueError, match=r"^`a` \(2\) is invalid: AssertionError$"):
        build_config(make, {"a": 2, "b": {"c": 2}})
    with pytest.raises(ValueError, match=r"^`b.c` \('x'\) is invalid: 'no number'$"):
        build_config(lambda fields: fields["b"].get("c", 0) and _fail(KeyError("no number")), {"b": {"c": "x"}})
    with pytest.raises(ValueError, match=r"^the configuration is invalid: can only concatenate"):
        build_config(make, {"b": {"c": "x"}, "a": 1})
    for error in (ValueError("`a` is wrong"), OSError("no file"), ImportError("no package")):
        with pytest.raises(type(error)) as raised:
            build_config(lambda fields, error=error: _fail(error), {"a": 1})
        assert raised.value is error


def _fail(error):
    raise error


def test_errors_while_a_model_is_created():
    for error in (KeyError("a"), TypeError("b"), RuntimeError("c"), ZeroDivisionError("d"), AssertionError("e")):
        message = rf"a Llama, creating it failed \({type(error).__name__}: "
        with pytest.raises(ValueError, match=message) as raised, errors_of_config("Llama"):
            raise error
        assert raised.value.__cause__ is error
    unexpected = TypeError("f() got an unexpected keyword argument 'a'")
    for error in (torch.OutOfMemoryError("a"), OSError("b"), ValueError("c"), ImportError("d"), unexpected):
        with pytest.raises(type(error)) as raised, errors_of_config("Llama"):
            raise error
        assert raised.value is error


def test_bounds_of_library_fields():
    right = {"hidden_size": HUGE, "num_layers": 4096, "num_channels": 0, "image_size": 2**16, "window": -(2**62)}
    check_library_fields("", right | {"dtype": "torch.bfloat16", "hidden_act": "silu", "rope_theta": 1e4, "a": True})
    for field, value in {"depth": 4097, "image_size": 2**16 + 1, "window": 2**62 + 1, "patch_size": 0}.items():
        with pytest.raises(ValueError, match=f"`part.inner.{field}` "):
            check_library_fields("part", {"inner": {field: value}})
