"""A context applies to its thread. Others run the same model without a context, or in their own."""

import contextvars
import threading
import warnings

import pytest
import torch
from torch._dynamo import eval_frame
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_sparse_moe_vlm.toolbox.modality_weights import modality_weights
from modeling_sparse_moe_vlm.toolbox.modality_weights.compiler_stance import StanceByThread, stance_as_before
from tests.support.in_tree_models import GREEDY, make_inputs, make_model
from tests.support.threads import TIMEOUT, in_step, run_at_once

pytestmark = pytest.mark.newest

PRIORS = {"modality_priors": {"image": 30.0}}
GUIDANCE = {"modality_guidance": 3.0}


@pytest.fixture(autouse=True)
def _compiler_as_before():
    stance = eval_frame._stance
    yield
    assert eval_frame._stance is stance


def generate(model, steering: dict | None = None):
    """Returns the tokens and, unless generation is plain, α."""
    inputs = make_inputs()
    if steering is None:
        return model.generate(**inputs, **GREEDY), None
    with modality_weights(model, **steering) as weights:
        tokens = model.generate(**inputs, **GREEDY)
    assert len(weights.steps) == GREEDY["max_new_tokens"]
    return tokens, weights.alpha


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("first", "second"), [(PRIORS, None), ({}, None), (PRIORS, GUIDANCE), ({}, PRIORS), (GUIDANCE, {})], ids=str
)
def test_every_thread_has_its_own_context(first, second, implementation):
    """A thread with a context and a thread without one, or two contexts, on one model."""
    model = make_model()
    model.set_attn_implementation({"text_config": implementation})
    expected = [generate(model, steering) for steering in (first, second)]
    if first or second:
        assert not torch.equal(expected[0][0], expected[1][0])
    with in_step(list(model.get_decoder().layers)):
        results = run_at_once(lambda: generate(model, first), lambda: generate(model, second))
    for (tokens, alpha), (expected_tokens, expected_alpha) in zip(results, expected, strict=True):
        assert torch.equal(tokens, expected_tokens)
        if expected_alpha is None:
            assert alpha is None
        else:
            assert torch.equal(alpha, expected_alpha)
    assert "eager" not in ALL_ATTENTION_FUNCTIONS._local_mapping
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_contexts_of_two_threads_that_overlap():
    """The context that begins first ends first, while the other continues."""
    model, inputs = make_model(), make_inputs()
    steps = threading.Barrier(2, timeout=TIMEOUT)

    def first():
        with modality_weights(model) as weights:
            steps.wait()  # both have begun
            steps.wait()
            model(**inputs)
        steps.wait()  # the first has ended
        return weights.alpha

    def second():
        steps.wait()
        with modality_weights(model, **PRIORS) as weights:
            steps.wait()
            steps.wait()
            model(**inputs)
        return weights.alpha

    with torch.no_grad():
        alone = []
        for steering in ({}, PRIORS):
            with modality_weights(model, **steering) as weights:
                model(**inputs)
            alone.append(weights.alpha)
        plain = model(**inputs).logits
        for ours, expected in zip(run_at_once(first, second), alone, strict=True):
            torch.testing.assert_close(ours, expected)
        assert torch.equal(model(**inputs).logits, plain)


# ---------------------------------------------------------------- threads that are started inside


def test_a_thread_does_not_inherit_the_context_and_a_warning_says_so():
    model = make_model()
    expected, _ = generate(model)
    with (
        pytest.warns(UserWarning, match=r"neither read out nor steered anything: all 8 forward passes .*copy_context"),
        modality_weights(model, **PRIORS) as weights,
    ):
        ((tokens, _),) = run_at_once(lambda: generate(model))
    assert torch.equal(tokens, expected)
    with pytest.raises(ValueError, match="in the thread that has entered `modality_weights`"):
        _ = weights.alpha


@torch.no_grad()
def test_no_warning_about_other_threads_if_the_context_is_used():
    model, inputs = make_model(), make_inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with modality_weights(model) as weights:
            run_at_once(lambda: generate(model))
            model(**inputs)
        with modality_weights(model):
            pass
    assert len(weights.steps) == 1
    with pytest.raises(ZeroDivisionError), modality_weights(model):
        run_at_once(lambda: generate(model) and 1 / 0)


def test_a_thread_can_run_in_a_copy_of_the_context():
    """As in streamed generation."""
    model, inputs = make_model(), make_inputs()
    tokens, alpha = generate(model, PRIORS)
    with modality_weights(model, **PRIORS) as weights:
        context = contextvars.copy_context()
        (streamed,) = run_at_once(lambda: context.run(model.generate, **inputs, **GREEDY))
    assert torch.equal(streamed, tokens)
    assert torch.equal(weights.alpha, alpha)
    # The copy outlives the context, which does not apply any more.
    with modality_weights(make_model("qwen3_vl")):  # nor while another context applies
        (plain,) = run_at_once(lambda: context.run(model.generate, **inputs, **GREEDY))
    assert torch.equal(plain, generate(model)[0])
    assert len(weights.steps) == 8


@torch.no_grad()
def test_two_threads_in_one_context_are_refused():
    model, inputs = make_model(), make_inputs()
    is_inside, goes_on = threading.Event(), threading.Event()

    def block(module, args):
        if not is_inside.is_set():
            is_inside.set()
            assert goes_on.wait(TIMEOUT)

    hook = model.get_decoder().layers[1].register_forward_pre_hook(block)
    with modality_weights(model) as expected:
        is_inside.set()
        model(**inputs)
    is_inside.clear()
    with modality_weights(model) as weights:
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(torch.no_grad()(model),), kwargs=inputs)
        thread.start()
        assert is_inside.wait(TIMEOUT)
        with pytest.raises(ValueError, match="enter one in each thread"):
            model(**inputs)
        # A part of the model has no modality ids, and does not use those of the other thread's pass.
        model.get_decoder()(input_ids=inputs["input_ids"].flip(1))
        goes_on.set()
        thread.join(TIMEOUT)
        assert torch.equal(weights.alpha, expected.alpha)
        model(**inputs)
    hook.remove()
    assert len(weights.steps) == 2


@torch.no_grad()
def test_a_context_that_ends_before_its_thread():
    model, inputs = make_model(), make_inputs()
    is_inside, goes_on = threading.Event(), threading.Event()

    def block(module, args):
        is_inside.set()
        assert goes_on.wait(TIMEOUT)

    hook = model.get_decoder().layers[1].register_forward_pre_hook(block)
    context = modality_weights(model)
    context.__enter__()
    thread = threading.Thread(target=contextvars.copy_context().run, args=(model,), kwargs=inputs)
    thread.start()
    assert is_inside.wait(TIMEOUT)
    with pytest.raises(ValueError, match="join the thread before"):
        context.__exit__(None, None, None)
    goes_on.set()
    thread.join(TIMEOUT)
    hook.remove()


@torch.no_grad()
def test_replicas_of_data_parallelism_are_refused():
    model, inputs = make_model(), make_inputs()
    base = model.base_model
    replica = base._replicate_for_data_parallel()
    replica._modules = dict(base._modules)
    run_at_once(lambda: replica(**inputs))
    with modality_weights(model), pytest.raises(ValueError, match="`DataParallel` runs copies"):
        run_at_once(lambda: replica(**inputs))


# ---------------------------------------------------------------- compiled code


@pytest.mark.extensive
@torch.no_grad()
def test_other_threads_keep_their_compiled_code():
    """Compiled code runs if its guards hold. What would be compiled again runs uncompiled, with the same result."""
    model, inputs, runs = make_model(), make_inputs(), []

    def backend(graph, _):
        def run(*args):
            runs.append(threading.current_thread())
            return graph.forward(*args)

        return run

    compiled = torch.compile(model, backend=backend)
    function = torch.compile(lambda x: x + 1, backend=backend)
    plain = compiled(**inputs).logits
    function(torch.ones(2))
    assert runs
    runs.clear()

    @torch.no_grad()  # this also depends on the thread
    def bystander():
        function(torch.ones(2))
        assert runs == [threading.current_thread()]
        return compiled(**inputs).logits

    with modality_weights(compiled, **PRIORS) as weights:
        (logits,) = run_at_once(bystander)
        torch.testing.assert_close(logits, plain)
        runs.clear()
        function(torch.ones(2))
        steered = compiled(**inputs).logits
        assert not runs, "this thread runs uncompiled"
    assert not torch.allclose(steered, plain)
    assert len(weights.steps) == 1
    torch.testing.assert_close(compiled(**inputs).logits, plain)
    assert runs


def test_the_stance_of_the_compiler_depends_on_the_thread():
    model = make_model()

    def stance() -> str:
        return eval_frame._stance.stance

    def stance_elsewhere() -> str:
        return run_at_once(stance)[0]

    assert (stance(), stance_elsewhere()) == ("default", "default")
    with modality_weights(model):
        assert (stance(), stance_elsewhere()) == ("force_eager", "eager_on_recompile")
        with stance_as_before():
            assert (stance(), stance_elsewhere()) == ("default", "eager_on_recompile")
        with torch.compiler.set_stance("fail_on_recompile"):
            assert stance() == "fail_on_recompile"
        assert stance() == "force_eager"
        with modality_weights(make_model("qwen3_vl")):
            pass
        assert stance() == "force_eager", "the outer one still holds"
    with torch.compiler.set_stance("force_eager"), modality_weights(model):
        assert (stance(), stance_elsewhere()) == ("force_eager", "force_eager")
        with stance_as_before():
            assert stance() == "force_eager"
    assert stance() == "default"


def test_a_saved_stance_can_be_restored_later():
    """Other code saves the stance inside a context, and sets it again after the end of the context."""
    before, context = eval_frame._stance, modality_weights(make_model())
    context.__enter__()
    with torch.compiler.set_stance("eager_on_recompile"):
        context.__exit__(None, None, None)
        assert eval_frame._stance.stance == "eager_on_recompile", "that of somebody else stays"
    assert isinstance(eval_frame._stance, StanceByThread)
    assert eval_frame._stance.stance == "default"
    with modality_weights(make_model()):
        assert eval_frame._stance.stance == "force_eager"
    assert eval_frame._stance is before


def test_contract_with_dynamo():
    """The replacement has every attribute of dynamo's stance, and dynamo reads it from where it is set."""
    with modality_weights(make_model()):
        ours = eval_frame._stance
        assert isinstance(ours, StanceByThread)
        assert {name for name in vars(eval_frame.DynamoStance()) if not hasattr(ours, name)} == set()
        assert eval_frame._callback_from_stance(print) is None
        assert run_at_once(lambda: eval_frame._callback_from_stance(print)) == [False]
        with stance_as_before():
            assert eval_frame._callback_from_stance(print) is print
    assert eval_frame._callback_from_stance(print) is print


def test_contract_with_data_parallelism():
    assert make_model().base_model._replicate_for_data_parallel()._is_replica
