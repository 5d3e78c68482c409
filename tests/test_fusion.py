"""The fusion layer: the worked example, a literal reference, masks, gradients and errors."""

import copy
import doctest
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from modeling_sparse_moe_vlm import SparseMoeFusion
from modeling_sparse_moe_vlm import fusion as fusion_module

pytestmark = pytest.mark.newest

B, M_TOKENS, N_TOKENS, VISUAL_DIM, LANG_DIM, HEADS = 2, 7, 5, 12, 16, 2


def make_fusion(num_experts: int = 4, seed: int = 0, **options) -> SparseMoeFusion:
    """Returns a small layer with norms and priors that change the output."""
    torch.manual_seed(seed)
    fusion = SparseMoeFusion(num_experts, VISUAL_DIM, LANG_DIM, num_heads=HEADS, **options)
    with torch.no_grad():
        for name, parameter in fusion.named_parameters():
            if "norm" in name or "priors" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return fusion


def make_streams(seed: int = 1, batch_size: int = B, **further: int) -> dict[str, torch.Tensor]:
    """Returns streams by name. Arguments are the widths of further streams."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"visual": (M_TOKENS, VISUAL_DIM), "language": (N_TOKENS, LANG_DIM)}
    sizes |= {name: (4, width) for name, width in further.items()}
    return {name: torch.randn(batch_size, *size, generator=generator) for name, size in sizes.items()}


def fuse(fusion: SparseMoeFusion, streams: dict, masks: dict | None = None) -> fusion_module.SparseMoeFusionOutput:
    """Calls the layer with streams and masks by name."""
    masks = masks or {}
    further = {name: stream for name, stream in streams.items() if name not in ("visual", "language")}
    return fusion(
        streams["visual"],
        streams["language"],
        masks.get("visual"),
        masks.get("language"),
        further=further,
        further_masks={name: masks[name] for name in further if name in masks},
        output_modality_weights=True,
    )


def plain_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Returns plain softmax attention, as in a textbook. A query that sees nothing would give NaN."""
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2), None


@pytest.fixture(params=["sdpa", "eager", "plain"])
def attention(request) -> str:
    AttentionInterface.register("plain", plain_attention)
    AttentionMaskInterface.register("plain", sdpa_mask)
    return request.param


# ---------------------------------------------------------------- the worked example


def test_worked_example():
    fusion = SparseMoeFusion(num_experts=2, visual_dim=512, lang_dim=768)
    visual, language = torch.randn(1, 50, 512), torch.randn(1, 100, 768)
    fused = fusion(visual, language)
    assert isinstance(fused, torch.Tensor)
    assert fused.shape == (1, 100, 768)
    output, weights, _ = result = fusion(visual, language, output_modality_weights=True)
    assert torch.equal(output, fused)
    assert result.alpha.shape == result.beta.shape == (1, 8, 100)
    torch.testing.assert_close(result.alpha + result.beta, torch.ones(1, 8, 100))
    assert result.alpha is weights["visual"]
    assert result.beta is weights["language"]
    assert result.alpha.std() > 0.001, "they differ by head and token"


def test_documented_examples():
    results = doctest.testmod(fusion_module)
    assert results.attempted > 5
    assert results.failed == 0


def test_number_of_parameters():
    fusion = SparseMoeFusion(num_experts=2, visual_dim=512, lang_dim=768)
    expected = {
        "norms": 512 + 768,
        "projections": 512 * 768,
        "gate": 2 * 768,
        "experts": 2 * 3 * 768 * 768,
        "q_proj": 768 * 768,
        "k_proj": 768 * 768,
        "q_norm": 768 // 8,
        "k_norm": 768 // 8,
        "modality_log_priors": 8 * 2,
    }
    counted = dict.fromkeys(expected, 0)
    for name, parameter in fusion.named_parameters():
        counted[name.partition(".")[0]] += parameter.numel()
    assert counted == expected


# ---------------------------------------------------------------- the literal formula


def literal(fusion: SparseMoeFusion, streams: dict, masks: dict, num_experts_per_tok: int):
    """Computes E of every token, then O_P and ℓ_P of the parts for every head and query, and merges them."""
    names = ["language", "visual", *(name for name in streams if name not in ("language", "visual"))]
    parameters = dict(fusion.named_parameters())
    num_experts = parameters["gate.weight"].shape[0] // len(names)
    head_dim = LANG_DIM // HEADS

    def norm(x, weight):
        return x / (x.square().mean() + 1e-6).sqrt() * weight

    def embed(name, x):
        x = norm(x, parameters[f"norms.{name}.weight"])
        return x if name == "language" else parameters[f"projections.{name}.weight"] @ x

    def apply_experts(name, x):
        first = names.index(name) * num_experts
        probabilities = torch.softmax(parameters["gate.weight"][first : first + num_experts] @ x, dim=0)
        output = torch.zeros(LANG_DIM)
        for expert in probabilities.argsort(descending=True)[:num_experts_per_tok].tolist():
            gate, up = (parameters[f"experts.{name}.gate_up_proj"][expert] @ x).chunk(2)
            down = parameters[f"experts.{name}.down_proj"][expert]
            output = output + probabilities[expert] * (down @ (F.silu(gate) * up))
        return output

    output = torch.zeros(streams["language"].shape)
    weights = {name: torch.zeros(B, HEADS, N_TOKENS) for name in names}
    for row in range(B):
        for head in range(HEADS):
            part = slice(head * head_dim, (head + 1) * head_dim)
            for position, query_token in enumerate(streams["language"][row]):
                query = norm(
                    (parameters["q_proj.weight"] @ embed("language", query_token))[part], parameters["q_norm.weight"]
                )
                outputs, scores = {}, {}
                for number, name in enumerate(names):
                    seen = [
                        embed(name, token) for token, is_token in zip(streams[name][row], masks[name][row]) if is_token
                    ]
                    if not seen:
                        continue
                    keys = [norm((parameters["k_proj.weight"] @ x)[part], parameters["k_norm.weight"]) for x in seen]
                    logits = torch.stack([query @ key for key in keys]) / math.sqrt(head_dim)
                    values = torch.stack([apply_experts(name, x)[part] for x in seen])
                    outputs[name] = torch.softmax(logits, dim=0) @ values
                    scores[name] = parameters["modality_log_priors"][head, number] + torch.logsumexp(logits, dim=0)
                total = torch.logsumexp(torch.stack(list(scores.values())), dim=0)
                for name, score in scores.items():
                    weight = torch.exp(score - total)
                    weights[name][row, head, position] = weight
                    output[row, position, part] += weight * outputs[name]
    return output, weights


@pytest.mark.parametrize(
    ("num_experts", "num_experts_per_tok", "further"),
    [(2, 1, {}), (8, 1, {}), (8, 3, {}), (6, 2, {"audio": 6}), (10, 1, {"a": 3, "b": 4, "text": 5})],
)
def test_equals_the_formula(num_experts, num_experts_per_tok, further):
    fusion = make_fusion(num_experts, num_experts_per_tok=num_experts_per_tok, further_dims=further)
    streams = make_streams(**further)
    generator = torch.Generator().manual_seed(3)
    masks = {name: torch.rand(stream.shape[:2], generator=generator) < 0.7 for name, stream in streams.items()}
    masks["visual"][1] = False
    with torch.no_grad():
        expected, expected_weights = literal(fusion, streams, masks, num_experts_per_tok)
        output, weights, _ = fuse(fusion, streams, masks)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert list(weights) == list(expected_weights)
    for name in weights:
        torch.testing.assert_close(weights[name], expected_weights[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(weights.values()), torch.ones(B, HEADS, N_TOKENS))


def test_priors_are_factors_of_the_odds():
    streams = make_streams()
    odds = []
    for options in ({}, {"alpha_init": 0.8, "beta_init": 0.2}):
        torch.manual_seed(0)
        result = fuse(SparseMoeFusion(2, VISUAL_DIM, LANG_DIM, num_heads=HEADS, **options), streams)
        odds.append(result.alpha / result.beta)
    torch.testing.assert_close(odds[1], 4 * odds[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_experts_per_tok", [1, 2])
def test_router_picks_by_token_among_the_experts_of_its_stream(num_experts_per_tok):
    fusion = make_fusion(8, num_experts_per_tok=num_experts_per_tok)
    chosen = []
    fusion.gate.register_forward_hook(lambda module, inputs, outputs: chosen.append(outputs[2]))
    fuse(fusion, make_streams())
    (index,) = chosen
    assert index.shape == (B * (M_TOKENS + N_TOKENS), num_experts_per_tok)
    index = index.view(B, -1, num_experts_per_tok)
    visual, language = index[:, :M_TOKENS].unique().tolist(), index[:, M_TOKENS:].unique().tolist()
    assert max(language) < 4 <= min(visual)
    assert len(visual) > num_experts_per_tok
    assert len(language) > num_experts_per_tok


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.long])
@pytest.mark.parametrize("name", ["visual", "language", "audio"])
@pytest.mark.parametrize("kept", [[0, 1, 2], [2, 3], [0, 3]], ids=["right", "left", "holes"])
def test_masks_equal_cutting_the_tokens(name, kept, dtype):
    fusion = make_fusion(6, further_dims={"audio": 6})
    streams = make_streams(audio=6)
    mask = torch.zeros(streams[name].shape[:2], dtype=dtype)
    mask[:, kept] = 1
    masked = fuse(fusion, streams, {name: mask})
    cut = fuse(fusion, streams | {name: streams[name][:, kept]})
    queries = kept if name == "language" else list(range(N_TOKENS))
    torch.testing.assert_close(masked.output[:, queries], cut.output)
    for weights, expected in zip(masked.modality_weights.values(), cut.modality_weights.values(), strict=True):
        torch.testing.assert_close(weights[:, :, queries], expected)
    torch.testing.assert_close(masked.aux_loss, cut.aux_loss)
    assert not torch.allclose(masked.output, fuse(fusion, streams).output, atol=1e-3), "the mask does something"


def test_a_row_does_not_depend_on_its_batch_or_padding():
    fusion = make_fusion(4)
    streams = make_streams()
    alone = [fusion(streams["visual"][row : row + 1], streams["language"][row : row + 1]) for row in range(B)]
    padded = {name: F.pad(stream, (0, 0, 0, 3), value=9.0) for name, stream in streams.items()}
    masks = {name: F.pad(torch.ones(stream.shape[:2]), (0, 3)).bool() for name, stream in streams.items()}
    together = fuse(fusion, padded, masks).output[:, :N_TOKENS]
    torch.testing.assert_close(together, torch.cat(alone))


def test_there_are_no_positions():
    fusion = make_fusion(4)
    streams = make_streams()
    order = torch.randperm(M_TOKENS)
    shuffled = fusion(streams["visual"][:, order], streams["language"])
    torch.testing.assert_close(shuffled, fusion(streams["visual"], streams["language"]))


@pytest.mark.parametrize("absent", ["visual", "language"])
def test_a_fully_masked_stream_has_no_weight(absent):
    fusion = make_fusion(4)
    streams = {name: stream.requires_grad_() for name, stream in make_streams().items()}
    mask = torch.ones(streams[absent].shape[:2], dtype=torch.bool)
    mask[1] = False
    result = fuse(fusion, streams, {absent: mask})
    other = "language" if absent == "visual" else "visual"
    assert result.modality_weights[absent][1].eq(0).all()
    torch.testing.assert_close(result.modality_weights[other][1], torch.ones(HEADS, N_TOKENS))
    assert result.modality_weights[absent][0].gt(0).all()
    result.output.square().sum().backward()
    tensors = [result.output, *(stream.grad for stream in streams.values())]
    tensors += [parameter.grad for parameter in fusion.parameters()]
    assert all(tensor.isfinite().all() for tensor in tensors)
    # Experts of a stream that is not visible have no effect.
    with torch.no_grad():
        fusion.experts[absent].down_proj.add_(1.0)
        changed = fuse(fusion, streams, {absent: mask}).output
    assert torch.equal(changed[1], result.output[1])
    assert not torch.allclose(changed[0], result.output[0], atol=1e-3)


def test_the_output_is_zero_if_nothing_is_visible(attention):
    fusion = make_fusion(4)
    fusion.config._attn_implementation = attention
    streams = make_streams()
    masks = {name: torch.tensor([[True], [False]]).expand(stream.shape[:2]) for name, stream in streams.items()}
    result = fuse(fusion, streams, masks)
    assert result.output[1].eq(0).all()
    assert all(weights[1].eq(0).all() for weights in result.modality_weights.values())
    torch.testing.assert_close(result.output[0], fuse(fusion, streams).output[0])
    result.output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


@pytest.mark.parametrize("is_training", [True, False])
def test_an_empty_stream(is_training):
    """Its weight is 0. In training, its parameters stay in the graph. Otherwise, data-parallel ranks would hang."""
    fusion = make_fusion(6, further_dims={"audio": 6}).train(is_training)
    streams = make_streams(audio=6)
    nothing = torch.zeros(B, M_TOKENS, dtype=torch.bool)
    expected = fuse(fusion, streams, {"visual": nothing, "audio": nothing[:, :4]})
    for visual in (None, streams["visual"][:, :0]):
        result = fusion(visual, streams["language"], output_modality_weights=True)
        torch.testing.assert_close(result.output, expected.output)
        assert result.alpha.eq(0).all()
        assert result.modality_weights["audio"].eq(0).all()
        torch.testing.assert_close(result.beta, torch.ones(B, HEADS, N_TOKENS))
    if is_training:
        fusion.zero_grad()
        result.output.sum().backward()
        assert not [name for name, parameter in fusion.named_parameters() if parameter.grad is None]


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("num_experts_per_tok", [1, 2])
def test_gradients_reach_every_parameter_and_stream(num_experts_per_tok):
    fusion = make_fusion(6, num_experts_per_tok=num_experts_per_tok, further_dims={"audio": 6})
    streams = {name: stream.requires_grad_() for name, stream in make_streams(batch_size=8, audio=6).items()}
    fuse(fusion, streams).output.square().sum().backward()
    for name, parameter in fusion.named_parameters():
        by_slice = parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[None]
        assert by_slice.abs().sum(dim=1).gt(0).all(), f"{name}: every expert, head and row"
    assert all(stream.grad.abs().sum() > 0 for stream in streams.values())


def test_weights_have_a_gradient():
    fusion = make_fusion(4)
    fuse(fusion, make_streams()).alpha.sum().backward()
    assert fusion.q_proj.weight.grad.abs().sum() > 0
    assert fusion.modality_log_priors.grad[:, 1].gt(0).all()
    assert fusion.modality_log_priors.grad[:, 0].lt(0).all()


@pytest.mark.parametrize("wanted", ["visual", "language"])
def test_priors_learn_which_stream_counts(wanted):
    """The target is the output of one stream by itself, so its prior must become larger than the other one."""
    torch.manual_seed(0)
    fusion = SparseMoeFusion(4, VISUAL_DIM, LANG_DIM, num_heads=HEADS)
    streams = make_streams(batch_size=8)
    unwanted = "language" if wanted == "visual" else "visual"
    hidden = torch.zeros(streams[unwanted].shape[:2], dtype=torch.bool)
    with torch.no_grad():
        target = fuse(fusion, streams, {unwanted: hidden}).output
    optimizer = torch.optim.Adam([fusion.modality_log_priors], lr=0.1)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(fuse(fusion, streams).output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    gain = fusion.modality_log_priors[:, 1] - fusion.modality_log_priors[:, 0]
    assert (gain if wanted == "visual" else -gain).gt(2.0).all()


def test_balancing_loss():
    """Its value if experts are used evenly and if one gets all tokens. Training only on it spreads the tokens."""
    fusion = make_fusion(8)
    streams = make_streams(batch_size=32)
    with torch.no_grad():
        fusion.gate.weight.zero_()
    assert fuse(fusion, streams).aux_loss.item() == pytest.approx(1.0, abs=1e-5)

    fusion.reset_parameters()
    language = streams["language"] + 1.0
    with torch.no_grad():
        fusion.gate.weight[0] = 1.0
    optimizer = torch.optim.Adam([fusion.gate.weight], lr=0.03)
    losses = []
    for _ in range(100):
        loss = fusion(None, language, output_modality_weights=True).aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5, "of at most 4, the number of experts of a stream"
    assert losses[-1] < 1.2


# ---------------------------------------------------------------- an ordinary module


def test_initialisation_is_seeded():
    one, other, different = (make_fusion(4, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["gate.weight"], different["gate.weight"])

    torch.manual_seed(7)
    fusion = SparseMoeFusion(4, VISUAL_DIM, LANG_DIM, alpha_init=0.75, beta_init=0.25, num_heads=HEADS)
    expected = torch.tensor([math.log(0.25), math.log(0.75)]).expand(HEADS, 2)
    torch.testing.assert_close(fusion.modality_log_priors.detach(), expected)
    resets = []
    for junk in (math.nan, 3.0):
        for parameter in fusion.parameters():
            torch.nn.init.constant_(parameter, junk)
        torch.manual_seed(7)
        fusion.reset_parameters()
        resets.append(copy.deepcopy(fusion.state_dict()))
    assert all(torch.equal(resets[0][name], resets[1][name]) for name in resets[0])


def test_output_has_the_same_scale_at_every_width():
    stds = []
    for width in (64, 512):
        torch.manual_seed(0)
        fusion = SparseMoeFusion(2, width, width)
        with torch.no_grad():  # a single token: nothing is averaged
            stds.append(fusion(None, torch.randn(64, 1, width)).std().item())
    assert stds[0] == pytest.approx(stds[1], rel=0.2)
    assert 0.2 < stds[0] < 1.0


def test_state_and_copies():
    fusion, other = make_fusion(4, seed=0), make_fusion(4, seed=1)
    streams = make_streams()
    expected = fuse(fusion, streams).output
    assert not torch.allclose(fuse(other, streams).output, expected, atol=1e-3)
    other.load_state_dict(fusion.state_dict())
    for copied in (other, copy.deepcopy(fusion), fusion.eval()):
        torch.testing.assert_close(fuse(copied, streams).output, expected, rtol=0, atol=0)


def test_attention_backends_agree(attention):
    fusion = make_fusion(4)
    streams = make_streams()
    masks = {
        "visual": torch.tensor([[1, 1, 1, 0, 0, 1, 1], [0] * 7]),
        "language": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]),
    }
    sdpa = fuse(fusion, streams, masks)
    fusion.config._attn_implementation = attention
    other = fuse(fusion, streams, masks)
    torch.testing.assert_close(other.output, sdpa.output)
    torch.testing.assert_close(other.alpha, sdpa.alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lang_dim", "moe_intermediate_size"), [(6, None), (6, 8), (16, 5), (16, 16)])
def test_any_width(lang_dim, moe_intermediate_size, dtype):
    """Grouped products do not support every width, but experts that run one by one do."""
    torch.manual_seed(0)
    fusion = SparseMoeFusion(4, 5, lang_dim, num_heads=1, moe_intermediate_size=moe_intermediate_size).to(dtype)
    visual, language = torch.randn(B, 7, 5, dtype=dtype), torch.randn(B, 5, lang_dim, dtype=dtype)
    output = fusion(visual, language)
    output.float().sum().backward()
    fusion.config._experts_implementation = "eager"
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(output, fusion(visual, language), **tolerance)


def test_bfloat16():
    fusion = make_fusion(4).bfloat16()
    streams = {name: stream.bfloat16() for name, stream in make_streams().items()}
    masks = {"visual": torch.tensor([[True] * 7, [False] * 7])}
    result = fuse(fusion, streams, masks)
    exact = fuse(
        copy.deepcopy(fusion).float(), {name: stream.float() for name, stream in streams.items()}, masks
    )  # fmt: skip
    assert result.output.dtype == torch.bfloat16
    assert result.alpha.dtype == torch.float32
    torch.testing.assert_close(result.output.float(), exact.output, rtol=0.05, atol=0.05)
    torch.testing.assert_close(result.alpha, exact.alpha, rtol=0.02, atol=0.02)
    torch.testing.assert_close(result.alpha + result.beta, torch.ones(B, HEADS, N_TOKENS))
    assert result.alpha[1].eq(0).all()


def test_autocast():
    fusion = make_fusion(4)
    streams = make_streams()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fuse(fusion, streams).output
    output.float().sum().backward()
    torch.testing.assert_close(output.float(), fuse(fusion, streams).output, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("with_masks", [False, True])
def test_compiles_in_one_graph(with_masks):
    fusion = make_fusion(6, further_dims={"audio": 6})
    streams = make_streams(audio=6)
    masks = {}
    if with_masks:
        masks = {"visual": torch.tensor([[True] * 7, [False] * 7]), "audio": torch.tensor([[1, 1, 0, 0]] * B)}
    if Version(transformers.__version__) < Version("5.23"):
        # The backward pass of the fallback for grouped products on the CPU does not compile.
        fusion.config._experts_implementation = "batched_mm"
    expected = fuse(fusion, streams, masks)
    expected.output.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in fusion.named_parameters()}
    fusion.zero_grad()
    result = torch.compile(fuse, fullgraph=True, backend="aot_eager")(fusion, streams, masks)
    torch.testing.assert_close(result.output, expected.output)
    torch.testing.assert_close(result.modality_weights, expected.modality_weights)
    torch.testing.assert_close(result.aux_loss, expected.aux_loss)
    result.output.square().sum().backward()
    for name, parameter in fusion.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 3}, r"`num_experts` must be a multiple of 2.*\['language', 'visual'\], got 3"),
        ({"num_experts": 4, "further_dims": {"audio": 8}}, r"multiple of 3.*'audio'\], got 4"),
        ({"num_experts": 0}, r"`num_experts` must be an integer of at least 1, got 0"),
        ({"visual_dim": 12.0}, r"`visual_dim` must be an integer of at least 1, got 12\.0"),
        ({"lang_dim": 18}, r"`lang_dim` must be a multiple of twice `num_heads`, 4, got 18"),
        ({"num_experts_per_tok": 3}, r"`num_experts_per_tok` must be at most 2.*got 3"),
        ({"alpha_init": 0.0}, r"`alpha_init` must be more than 0"),
        ({"beta_init": -1.0}, r"`beta_init` must be a number of at least 0, got -1\.0"),
        ({"moe_intermediate_size": 0}, r"`moe_intermediate_size` must be an integer of at least 1, got 0"),
        ({"further_dims": {"visual": 8}, "num_experts": 6}, r"`further_dims` repeats .*'visual', 'visual'"),
        ({"further_dims": {"audio": -8}, "num_experts": 6}, r"`further_dims\['audio'\]` must be .*got -8"),
        ({"further_dims": {"a.b": 8}, "num_experts": 6}, r"'a\.b' .*lower-case letters"),
    ],
)
def test_wrong_arguments(options, message):
    options = {"num_experts": 4, "visual_dim": VISUAL_DIM, "lang_dim": LANG_DIM, "num_heads": HEADS} | options
    with pytest.raises(ValueError, match=message):
        SparseMoeFusion(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual": torch.zeros(2, 7, 16)}, r"`visual` must have the shape \(2, tokens, 12\), got \(2, 7, 16\)"),
        ({"visual": torch.zeros(7, 12)}, r"`visual` must have the shape \(2, tokens, 12\), got \(7, 12\)"),
        ({"visual": torch.zeros(3, 7, 12)}, r"`visual` must have the shape \(2, tokens, 12\), got \(3, 7, 12\)"),
        ({"language": torch.zeros(2, 5, 12)}, r"`language` must have the shape \(batch_size, tokens, 16\), got"),
        ({"language": torch.zeros(2, 5, 16, 1)}, r"`language` must have the shape \(batch_size, tokens, 16\), got"),
        ({"language": torch.zeros(2, 0, 16)}, r"`language` must have at least one token.*got \(2, 0, 16\)"),
        ({"visual_mask": torch.ones(2, 5).bool()}, r"`visual_mask` must have the shape \(2, 7\), got \(2, 5\)"),
        ({"language_mask": torch.ones(5).bool()}, r"`language_mask` must have the shape \(2, 5\), got \(5,\)"),
        ({"visual_mask": torch.zeros(2, 7)}, r"`visual_mask` must be of type bool or int.*got torch\.float32"),
        ({"further": {"audio": torch.zeros(2, 4, 5)}}, r"`further\['audio'\]` must have the shape \(2, tokens, 6\)"),
        ({"further": {"depth": torch.zeros(2, 4, 6)}}, r"`further` has unknown streams \['depth'\].*\['audio'\]"),
        ({"further": {"visual": torch.zeros(2, 4, 6)}}, r"`further` has unknown streams \['visual'\]"),
        ({"further_masks": {"depth": torch.ones(2, 4)}}, r"`further_masks` has unknown streams \['depth'\]"),
        (
            {"further_masks": {"audio": torch.ones(2, 4).bool()}},
            r"`further_masks\['audio'\]` must have the shape \(2, 0\), got \(2, 4\)",
        ),
    ],
)
def test_wrong_inputs(change, message):
    fusion = make_fusion(6, further_dims={"audio": 6})
    with pytest.raises(ValueError, match=message):
        fusion(**(make_streams() | change))
