"""Router rows: small random ones, or centroids of the inputs of the dense blocks."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize

from modeling_sparse_moe_vlm.toolbox.upcycling import router_rows
from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from modeling_sparse_moe_vlm.toolbox.upcycling.router_rows import (
    BlockInputs,
    collect_block_inputs,
    data_rows,
    random_rows,
    spherical_k_means,
)
from tests.support.dense_blocks import HIDDEN_SIZE, arrange, dense_weights, upcycled_block
from tests.support.in_tree_models import make_llava

pytestmark = pytest.mark.newest

OVERLAPPING = [
    {"name": "text", "num_experts": 3, "modalities": ["text"]},
    {"name": "joint", "num_experts": 2},
    {"name": "image", "num_experts": 2, "modalities": ["image"]},
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def routed(config):
    return config.layer_expert_groups(0, always_on=False)


# ---------------------------------------------------------------- random


@pytest.mark.parametrize(
    ("initializer_range", "hidden_size", "std"), [(0.02, 64, 0.02), (0.2, 64, 0.125), (0.2, 16, 0.2), (1.0, 400, 0.05)]
)
def test_random_rows_are_small(initializer_range, hidden_size, std):
    _, config = arrange(
        expert_groups="joint", num_experts=256, hidden_size=hidden_size, initializer_range=initializer_range
    )
    rows = random_rows(config, routed(config), 1, generator())
    assert rows.shape == (256, hidden_size)
    assert rows.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * rows.numel()))
    assert rows.mean().abs() < 4 * std / math.sqrt(rows.numel())


def test_parts_share_random_rows_and_copies_do_not():
    _, config = arrange(expert_groups=[OVERLAPPING[1], OVERLAPPING[0] | {"num_experts": 4}])
    rows = random_rows(config, routed(config), 2, generator(3))
    own = random_rows(config, routed(config), 1, generator(3))[:3]
    assert torch.equal(rows, own[[0, 0, 1, 1, 2, 2]])
    assert not torch.equal(rows, random_rows(config, routed(config), 2, generator(4)))


# ---------------------------------------------------------------- spherical k-means


def clouds(centres: torch.Tensor, per_cloud: int = 20, noise: float = 0.05, seed: int = 0) -> torch.Tensor:
    """Returns vectors of any length around each of the directions, cloud by cloud."""
    g = generator(seed)
    vectors = centres.repeat_interleave(per_cloud, 0)
    vectors = vectors + noise * torch.randn(vectors.shape, generator=g)
    return vectors * torch.rand(len(vectors), 1, generator=g).add(0.5).mul(3)


def mean_direction(vectors: torch.Tensor) -> torch.Tensor:
    total = sum(vector / vector.norm() for vector in vectors)
    return total / total.norm()


def same_rows(first: torch.Tensor, second: torch.Tensor, atol: float = 1e-5) -> bool:
    """Whether two matrices have the same rows in any order."""
    distances = torch.cdist(first, second)
    nearest = distances.argmin(dim=1)
    return len(set(nearest.tolist())) == len(second) and bool((distances.amin(dim=1) < atol).all())


@pytest.mark.parametrize("seed", range(5))
def test_centroids_of_clouds_are_their_mean_directions(seed):
    vectors = clouds(torch.eye(6)[:4], seed=seed)
    expected = torch.stack([mean_direction(cloud) for cloud in vectors.split(20)])
    assert same_rows(spherical_k_means(vectors, 4, generator(seed)), expected)


@pytest.mark.parametrize("seed", range(3))
def test_clustering_has_converged(seed):
    """Every centroid is the mean direction of the vectors nearest to it, which is the end of literal k-means."""
    vectors = torch.randn(200, 5, generator=generator(seed)) * torch.rand(200, 1, generator=generator(9)).add(0.1)
    centroids = spherical_k_means(vectors, 7, generator(seed))
    members: list[list[torch.Tensor]] = [[] for _ in range(7)]
    for vector in vectors:
        cosines = [float(vector @ centroid / vector.norm() / centroid.norm()) for centroid in centroids]
        members[cosines.index(max(cosines))].append(vector)
    for centroid, its_members in zip(centroids, members, strict=True):
        assert torch.allclose(centroid, mean_direction(torch.stack(its_members)), atol=1e-5)


def test_clustering_is_seeded():
    vectors = torch.randn(100, 5, generator=generator())
    before = torch.get_rng_state()
    first = spherical_k_means(vectors, 5, generator(1))
    assert torch.equal(first, spherical_k_means(vectors, 5, generator(1)))
    assert not same_rows(first, spherical_k_means(vectors, 5, generator(2)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("vectors", "different"),
    [
        (torch.eye(5)[:3], 3),  # fewer vectors than clusters
        (torch.eye(5)[[0, 1, 0, 1, 1, 0, 0, 0, 1]] * torch.arange(1, 10)[:, None], 2),  # equal except for the length
        (torch.ones(12, 5), 1),
        (torch.eye(5)[:1], 1),
        (torch.cat([torch.zeros(9, 5), torch.eye(5)[:2]]), 2),  # zero has no direction
        (torch.zeros(3, 5), 0),
        (torch.zeros(0, 5), 0),
    ],
)
def test_clusters_without_a_direction_get_random_ones(vectors, different):
    centroids = spherical_k_means(vectors.float(), 4, generator())
    assert centroids.shape == (4, 5)
    assert torch.allclose(centroids.norm(dim=1), torch.ones(4), atol=1e-5)
    found = [row for row in centroids if (normalize(vectors.float()) - row).norm(dim=1).lt(1e-5).any()]
    assert len(found) == different
    assert torch.pdist(centroids).min() > 1e-2


def test_an_empty_cluster_gets_the_farthest_vector(monkeypatch):
    vectors = torch.tensor([[1.0, 0.0, 0.1], [1.0, 0.0, -0.1], [0.0, 1.0, 0.1], [0.0, 1.0, -0.1], [0.0, 0.9, 0.8]])
    first = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    monkeypatch.setattr(router_rows, "_first_centroids", lambda *_: first)
    expected = torch.stack([first[0], first[1], vectors[4] / vectors[4].norm()])
    assert same_rows(spherical_k_means(vectors, 3, generator()), expected)


def test_distant_directions_are_chosen_first():
    """With uniform sampling, both centroids would be in the large cloud in about nine of ten cases."""
    vectors = torch.cat([clouds(torch.eye(8)[:1], 190, 0.002), clouds(torch.eye(8)[1:2], 10, 0.002)])
    for seed in range(20):
        first = router_rows._first_centroids(normalize(vectors), 2, generator(seed))
        assert first.shape == (2, 8)
        assert sorted(first.argmax(dim=1).tolist()) == [0, 1]


# ---------------------------------------------------------------- rows from data


def inputs_of(text: torch.Tensor, image: torch.Tensor) -> BlockInputs:
    ids = torch.tensor([0] * len(text) + [1] * len(image))
    return BlockInputs(torch.cat([text, image]), ids)


CENTRES = normalize(torch.randn(6, HIDDEN_SIZE, generator=generator(5)))
INPUTS = inputs_of(clouds(CENTRES[:3], 30), clouds(CENTRES[3:], 20, seed=1))


def spread(rows: torch.Tensor, config, groups, inputs: BlockInputs) -> float:
    """Returns the standard deviation of a token's logits over the experts that serve it, averaged over the tokens."""
    spreads = []
    for state, modality_id in zip(inputs.hidden_states, inputs.modality_ids.tolist(), strict=True):
        serves = [g.serves(config.modalities[modality_id]) for g in groups for _ in range(g.num_experts)]
        logits = [float(row @ state) for row, does in zip(rows, serves, strict=True) if does]
        if len(logits) > 1:
            mean = sum(logits) / len(logits)
            spreads.append(math.sqrt(sum((logit - mean) ** 2 for logit in logits) / len(logits)))
    return sum(spreads) / len(spreads)


@pytest.mark.parametrize("expert_groups", [OVERLAPPING, "joint", "isolated"], ids=["overlapping", "joint", "isolated"])
def test_rows_are_the_centroids_of_the_tokens_that_a_group_serves(expert_groups):
    _, config = arrange(expert_groups=expert_groups)
    groups = routed(config)
    rows = data_rows(config, groups, 1, INPUTS, generator(2))
    assert rows.dtype == torch.float32
    text, image = INPUTS.hidden_states[:90], INPUTS.hidden_states[90:]
    tokens = {"text": text, "image": image, "joint": INPUTS.hidden_states}
    g = generator(2)
    centroids = torch.cat([spherical_k_means(tokens[group.name], group.num_experts, g) for group in groups])
    rows_by_hand = centroids - sum(centroids) / len(centroids)
    scale = 1 / spread(rows_by_hand, config, groups, INPUTS)
    assert torch.allclose(rows, rows_by_hand * scale, atol=1e-5)
    assert spread(rows, config, groups, INPUTS) == pytest.approx(1, rel=1e-4)


def test_every_cloud_has_its_own_expert():
    _, config = arrange(expert_groups="joint", num_experts=6)
    rows = data_rows(config, routed(config), 1, INPUTS, generator())
    chosen = (INPUTS.hidden_states @ rows.T).argmax(dim=1)
    of_clouds = [part.unique().tolist() for part in chosen.split([30] * 3 + [20] * 3)]
    assert sorted(expert for experts in of_clouds for expert in experts) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("initializer_range", [0.001, 0.2])
def test_no_row_is_longer_than_a_random_one(initializer_range):
    _, config = arrange(expert_groups="joint", initializer_range=initializer_range)
    quiet = BlockInputs(INPUTS.hidden_states * 1e-3, INPUTS.modality_ids)
    rows = data_rows(config, routed(config), 1, quiet, generator())
    longest = min(initializer_range * math.sqrt(HIDDEN_SIZE), 1)
    assert rows.norm(dim=1).max().item() == pytest.approx(longest, rel=1e-5)
    assert spread(rows, config, routed(config), quiet) < 1


def test_tokens_with_one_expert_do_not_affect_the_scale():
    groups = [
        {"name": "text", "num_experts": 1, "modalities": ["text"]},
        {"name": "image", "num_experts": 4, "modalities": ["image"]},
    ]
    _, config = arrange(expert_groups=groups, num_experts_per_tok=1)
    rows = data_rows(config, routed(config), 1, INPUTS, generator())
    assert spread(rows, config, routed(config), INPUTS) == pytest.approx(1, rel=1e-4)


def test_single_experts_also_have_rows():
    _, config = arrange(expert_groups="joint", num_experts=1, num_experts_per_tok=1, initializer_range=0.05)
    rows = data_rows(config, routed(config), 1, INPUTS, generator())
    length = 0.05 * math.sqrt(HIDDEN_SIZE)
    assert torch.allclose(rows[0], length * mean_direction(INPUTS.hidden_states), atol=1e-5)
    _, config = arrange(expert_groups="isolated", num_experts=2, num_experts_per_tok=1)
    same = inputs_of(torch.ones(3, HIDDEN_SIZE), torch.ones(3, HIDDEN_SIZE))
    assert not data_rows(config, routed(config), 1, same, generator()).any()


def test_parts_share_rows_from_data():
    start, config = arrange(expert_groups="joint", num_experts=12, start="split")
    rows = upcycled_block(config, dense_weights(), start, inputs=INPUTS).gate.weight
    assert torch.equal(rows[::2], rows[1::2])
    assert torch.pdist(rows[::2]).min() > 0.05


def test_rows_from_data_are_seeded():
    start, config = arrange()
    rows = [upcycled_block(config, dense_weights(), start, inputs=INPUTS, seed=seed).gate.weight for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_half_precision_inputs_are_clustered_in_full_precision():
    _, config = arrange()
    half = BlockInputs(INPUTS.hidden_states.bfloat16(), INPUTS.modality_ids)
    full = BlockInputs(half.hidden_states.float(), INPUTS.modality_ids)
    rows = [data_rows(config, routed(config), 1, inputs, generator()) for inputs in (half, full)]
    assert torch.equal(*rows)


def test_group_without_tokens_is_refused():
    _, config = arrange(expert_groups="isolated")
    only_text = BlockInputs(INPUTS.hidden_states[:90], INPUTS.modality_ids[:90])
    message = (
        "`router_init` is \"data\", but `batch` has no tokens of ['image'], which the experts of group 'image' serve: "
        'add examples with some, or use `router_init="random"`.'
    )
    with pytest.raises(UpcyclingError, match=re.escape(message)):
        data_rows(config, routed(config), 1, only_text, generator())
    _, config = arrange(expert_groups="joint")
    assert data_rows(config, routed(config), 1, only_text, generator()).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused(value):
    _, config = arrange()
    states = INPUTS.hidden_states.clone()
    states[3, 4] = value
    with pytest.raises(UpcyclingError, match="hidden states of the dense model for `batch` are not finite"):
        data_rows(config, routed(config), 1, BlockInputs(states, INPUTS.modality_ids), generator())


# ---------------------------------------------------------------- inputs of blocks

LAYERS = [SimpleNamespace(name=f"model.language_model.layers.{layer}.mlp", layer=layer) for layer in (0, 1)]
MODALITIES = ["text", "image"]
PLACEHOLDERS = {"image": [3], "video": [98]}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return make_llava().train()


def llava_batch(rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns rows of two text tokens, an image of four tokens, and text. The second row is padded on the left."""
    g = generator(seed)
    input_ids = torch.randint(7, 90, (rows, 10), generator=g)
    input_ids[:, 2:6] = 3
    mask = torch.ones_like(input_ids)
    mask[1:, 0] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=g),
    }


def block_inputs(model, batch) -> dict[int, torch.Tensor]:
    """Returns the inputs of the blocks for a batch, `(B, T, D)` by layer, recorded by hooks of this test."""
    seen = {}
    handles = [
        model.get_submodule(block.name).register_forward_pre_hook(
            lambda _, args, layer=block.layer: seen.__setitem__(layer, args[0].detach())
        )
        for block in LAYERS
    ]
    with torch.no_grad():
        model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return seen


def test_block_inputs_of_real_tokens(model):
    batch = llava_batch()
    found = collect_block_inputs(model, batch, LAYERS, modalities=MODALITIES, placeholder_ids=PLACEHOLDERS)
    assert all(module.training for module in model.modules())
    expected = block_inputs(model, batch)
    is_image, is_real = batch["input_ids"] == 3, batch["attention_mask"].bool()
    assert list(found) == [0, 1]
    for layer, (states, ids) in found.items():
        assert torch.equal(ids, torch.tensor([0] * 11 + [1] * 8))
        assert same_rows(states[:11], expected[layer][~is_image & is_real])
        assert same_rows(states[11:], expected[layer][is_image & is_real])
        assert not states.requires_grad


def test_several_batches_are_concatenated(model):
    batches = [llava_batch(), llava_batch(rows=3, seed=1)]
    found = collect_block_inputs(model, batches, LAYERS, modalities=MODALITIES, placeholder_ids=PLACEHOLDERS)
    expected = torch.cat([block_inputs(model, batch)[1][batch["input_ids"] == 3] for batch in batches])
    assert same_rows(found[1].hidden_states[found[1].modality_ids == 1], expected)
    assert (found[1].modality_ids == 0).sum() == 11 + 16


def modality_ids_of(model, batch, modalities=MODALITIES, placeholder_ids=PLACEHOLDERS) -> list[int]:
    """Returns the number of tokens of each modality."""
    forward = model.forward
    model.forward = lambda mm_token_type_ids=None, **inputs: forward(**inputs)
    found = collect_block_inputs(model, batch, LAYERS, modalities=modalities, placeholder_ids=placeholder_ids)
    model.forward = forward
    return torch.bincount(found[0].modality_ids, minlength=len(modalities)).tolist()


def test_given_modality_ids_are_used(model):
    batch = llava_batch()
    ids = torch.zeros_like(batch["input_ids"])
    ids[0, 9] = 1
    expected = block_inputs(model, batch)[0][0, 9]
    batch["mm_token_type_ids"] = ids
    forward = model.forward
    model.forward = lambda mm_token_type_ids, **inputs: forward(**inputs)
    found = collect_block_inputs(model, batch, LAYERS, modalities=MODALITIES, placeholder_ids=PLACEHOLDERS)
    assert torch.equal(found[0].hidden_states[found[0].modality_ids == 1], expected[None])


def test_modalities_that_are_not_listed_count_as_in_the_sparse_model(model):
    """Video counts as images if there are experts for them. Everything else counts as text."""
    batch = llava_batch()
    batch["input_ids"][0, 7:9] = 98
    batch["input_ids"][0, 9] = 97
    placeholders = PLACEHOLDERS | {"audio": [97]}
    assert modality_ids_of(model, batch, placeholder_ids=placeholders) == [9, 10]
    assert modality_ids_of(model, batch, ["text", "image", "video"], placeholders) == [9, 8, 2]
    assert modality_ids_of(model, batch, ["text"], placeholders) == [19]
    given = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 2, 2, 3]] * 2)
    assert modality_ids_of(model, batch | {"mm_token_type_ids": given}) == [7, 12]
    assert modality_ids_of(model, batch | {"mm_token_type_ids": given}, ["text", "image", "video"]) == [7, 8, 4]
    assert modality_ids_of(model, batch | {"mm_token_type_ids": given}, ["text"]) == [19]


def test_the_sample_is_bounded_seeded_and_the_same_in_every_layer(model):
    batches = [llava_batch(), llava_batch(rows=3, seed=1)]

    def collect(**options):
        return collect_block_inputs(
            model, batches, LAYERS, modalities=MODALITIES, placeholder_ids=PLACEHOLDERS, **options
        )

    whole, few, again, other = collect(), collect(max_tokens=6), collect(max_tokens=6), collect(max_tokens=6, seed=1)
    assert few[0].modality_ids.tolist() == [0] * 6 + [1] * 6
    for layer in (0, 1):
        assert torch.equal(few[layer].hidden_states, again[layer].hidden_states)
        assert not same_rows(few[layer].hidden_states, other[layer].hidden_states)
    # The tokens with the smallest random numbers, for any bound, including those of a later batch.
    places = [
        [(whole[layer].hidden_states == state).all(dim=1).nonzero().item() for state in few[layer].hidden_states]
        for layer in (0, 1)
    ]
    assert places[0] == places[1] == [*range(6), *range(27, 33)]


def test_random_state_and_hooks_do_not_change(model):
    before = torch.get_rng_state()
    collect_block_inputs(model, llava_batch(), LAYERS, modalities=MODALITIES, placeholder_ids=PLACEHOLDERS)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_modes_and_hooks_are_restored_after_a_failure(model):
    batch = llava_batch() | {"pixel_values": torch.zeros(2, 3, 15, 15)}
    model.model.vision_tower.eval()
    with pytest.raises(Exception, match=r"15|size"):
        collect_block_inputs(model, batch, LAYERS, modalities=MODALITIES, placeholder_ids=PLACEHOLDERS)
    assert model.training
    assert not model.model.vision_tower.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_labels_are_left_out_and_lists_are_moved(model):
    batch = llava_batch()
    forward, calls = model.forward, []
    model.forward = lambda sizes=None, **inputs: calls.append((sizes, inputs)) or forward(**inputs)
    collect_block_inputs(
        model,
        batch | {"labels": batch["input_ids"], "sizes": [torch.tensor(3), "x"]},
        LAYERS,
        modalities=MODALITIES,
        placeholder_ids=PLACEHOLDERS,
    )
    ((sizes, inputs),) = calls
    assert sizes == [torch.tensor(3), "x"]
    assert set(inputs) == {*batch, "use_cache"}
    assert inputs["use_cache"] is False


def test_batches_without_tokens_are_refused(model):
    options = {"modalities": MODALITIES, "placeholder_ids": PLACEHOLDERS}
    with pytest.raises(UpcyclingError, match="needs examples: `batch` has no tokens"):
        collect_block_inputs(model, [], LAYERS, **options)
    only_padding = llava_batch() | {"attention_mask": torch.zeros(2, 10, dtype=torch.long)}
    with pytest.raises(UpcyclingError, match="needs examples: `batch` has no tokens"):
        collect_block_inputs(model, only_padding, LAYERS, **options)
    with pytest.raises(UpcyclingError, match="needs `input_ids` or `mm_token_type_ids` in `batch`"):
        collect_block_inputs(model, {"inputs_embeds": torch.zeros(1, 4, 32)}, LAYERS, **options)
    batch = llava_batch()
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        collect_block_inputs(model, batch | {"mm_token_type_ids": batch["input_ids"]}, LAYERS, **options)


@pytest.mark.parametrize(("name", "saw"), [("lm_head", "shape (2, 1, 32)"), ("model.nothing", "nothing")])
def test_blocks_that_see_other_tokens_are_refused(model, name, saw):
    model.model.add_module("nothing", torch.nn.Identity())
    batch = llava_batch() | {"logits_to_keep": 1}
    message = f"block {name!r} saw {saw if saw == 'nothing' else 'inputs of ' + saw} for 20 tokens of `batch`"
    with pytest.raises(UpcyclingError, match=re.escape(message)):
        collect_block_inputs(
            model, batch, [SimpleNamespace(name=name, layer=0)], modalities=MODALITIES, placeholder_ids=PLACEHOLDERS
        )
