"""Packed batches of the collator, the check that a model supports them, and training with them."""

import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    MllamaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator, check_packing
from modeling_sparse_moe_vlm.toolbox.data.packing import RowPacker, RowPositions, assign_rows
from modeling_sparse_moe_vlm.toolbox.data.packing_check import fit_packer
from modeling_sparse_moe_vlm.toolbox.routing import RoutingMonitor
from modeling_sparse_moe_vlm.toolbox.routing.counts import count_batch, measure_routing
from modeling_sparse_moe_vlm.toolbox.throughput import count_tokens
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer
from tests.support import in_tree_models
from tests.support.models import QUIET_TRAINING
from tests.support.packed_rows import make_packer, make_rows
from tests.support.packing_census import NO, NOT_RUN, YES, census
from tests.support.processors import (
    VOCAB_SIZE,
    assistant,
    make_image,
    make_image_processor,
    make_processor,
    make_speaking_model,
    make_tokenizer,
    user,
)
from tests.support.tiny_models import tiny_model
from tests.support.upcycled import make_dense

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] }}{% endgeneration %}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
TEXT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)


def row(num_images: int, question: str, answer: str, seed: int = 0) -> dict:
    return {"messages": [user(*(make_image(seed + i) for i in range(num_images)), question), assistant(answer)]}


ROWS = [
    row(1, "the cat", "a mat"),
    row(0, "the", "yes"),
    row(2, "the cat sat on the mat and", "the cat and the image", seed=5),
    row(0, "a", "b"),
]


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture
def model():
    return make_speaking_model(output_router_logits=True)


# ------------------------------------------------------------------------------------------------ assignment


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([5], [[0]]),
        ([5, 5], [[0], [1]]),  # a single sequence of 10 would have larger attention matrices: 100 > 2 · 25
        ([10, 1, 1, 1], [[0, 1, 2, 3]]),  # 169 < 4 · 100
        ([2, 8, 3, 3], [[1], [2, 3, 0]]),  # as many tokens as in a single sequence, smaller attention matrices
        ([9, 3, 3, 3, 2, 2, 2, 2], [[0, 4, 6], [1, 2, 3, 5, 7]]),
    ],
)
def test_rows_are_assigned_to_few_sequences(lengths, expected):
    assert assign_rows(lengths) == expected


def test_sequences_have_no_larger_attention_matrices_than_padded_rows():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 100, (torch.randint(1, 20, (), generator=generator),), generator=generator).tolist()
        sequences = assign_rows(lengths)
        assert sorted(row for sequence in sequences for row in sequence) == list(range(len(lengths)))
        width = max(sum(lengths[row] for row in sequence) for sequence in sequences)
        assert len(sequences) * width**2 <= len(lengths) * max(lengths) ** 2
        assert len(sequences) * width <= len(lengths) * max(lengths)


# ------------------------------------------------------------------------------------------------ batches


def test_a_packed_batch(processor, model):
    rows = [row(1, "a cat on the mat, or an image of it?", "yes, and the image of a cat"), ROWS[1], ROWS[3]]
    padded = VisionLanguageCollator(processor)(rows)
    lengths = padded["attention_mask"].sum(dim=1).tolist()
    assert lengths == [52, 24, 22]
    packed = VisionLanguageCollator(processor, packing=True, model=model)(rows)
    assert [size.tokens for size in packed.row_sizes] == lengths
    assert sorted(packed) == ["input_ids", "labels", "mm_token_type_ids", "pixel_values", "position_ids", "use_cache"]
    assert packed["use_cache"] is False
    first, second, third = (padded["input_ids"][number, :length].tolist() for number, length in enumerate(lengths))
    assert packed["input_ids"].tolist() == [first, [*second, *third, *[0] * 6]]
    assert packed["position_ids"].tolist() == [[*range(52)], [*range(24), *range(22), *[-1] * 6]]
    labels = [padded["labels"][number, :length].tolist() for number, length in enumerate(lengths)]
    assert packed["labels"].tolist() == [labels[0], [*labels[1], *labels[2], *[-100] * 6]]
    assert packed["mm_token_type_ids"].equal((packed["input_ids"] == 3).long())
    assert packed["pixel_values"].equal(padded["pixel_values"])


def test_the_first_token_of_a_row_is_not_a_target(model):
    """Otherwise, the last token of the row before would predict it."""
    rows = [{"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 6]])} for _ in range(2)]
    packer = RowPacker(0, {"input_ids": True, "labels": True}, RowPositions(model))
    assert packer.pack(rows, [[0, 1]])["labels"].tolist() == [[-100, 6, -100, 6]]
    assert rows[0]["labels"].tolist() == [[5, 6]], "the labels of the row must not change"


def test_separators_keep_the_positions_of_places(model):
    rows = [{"input_ids": torch.tensor([[5] * length]), "labels": torch.tensor([[5] * length])} for length in (2, 3, 1)]
    packer = RowPacker(0, {"input_ids": True, "labels": True}, RowPositions(model), separators=True)
    batch = packer.pack(rows, [[1, 0], [2]])
    assert batch["input_ids"].tolist() == [[5, 5, 5, 0, 5, 5], [5, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, -1, 4, 5], [0, -1, -1, -1, -1, -1]]
    assert batch["labels"].tolist() == [[-100, 5, 5, -100, -100, 5], [-100] * 6]
    assert packer.assign([6, 2, 2]) == [[0], [1, 2]], "a single sequence has 13 tokens with separators: 169 > 3 · 49"
    packer.separators = False
    assert packer.assign([6, 2, 2]) == [[0, 1, 2]]
    packer.one_sequence = True
    assert packer.assign([2, 9, 2]) == [[0, 1, 2]]


def test_separators_leave_rows_of_padding_without_positions(model):
    rows = [{"input_ids": torch.tensor([[5] * length]), "labels": torch.tensor([[5] * length])} for length in (2, 3, 1)]
    packer = RowPacker(0, {"input_ids": True, "labels": True}, RowPositions(model), separators=True)
    batch = packer.pack(rows, [[1, 0, 2]], padding={1})
    assert batch["input_ids"].tolist() == [[5, 5, 0, 5, 0, 5, 5, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, -1, 3, -1, -1, -1, -1]]
    assert batch["labels"].tolist() == [[-100, 5, -100, -100, -100, -100, -100, -100]]


def test_separators_are_only_put_between_tokens(model):
    """Another field can have as many entries as a row has tokens by chance."""
    rows = [
        {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids]), "image_numbers": torch.tensor([numbers])}
        for ids, numbers in (([5, 6], [1, 2]), ([7, 8, 9], [3]))
    ]
    layouts = {"input_ids": True, "labels": True, "image_numbers": True}
    batch = RowPacker(0, layouts, RowPositions(model), separators=True).pack(rows, [[0, 1]])
    assert batch["input_ids"].tolist() == [[5, 6, 0, 7, 8, 9]]
    assert batch["image_numbers"].tolist() == [[1, 2, 3]]


def test_sequences_without_images_have_an_image_of_padding():
    """If the images have one entry per row, the batch has one entry per sequence."""
    packer = make_packer(in_tree_models.make_model("idefics3"), "idefics3")
    rows = make_rows("idefics3", [(4, 0), (11, 1), (17, 2)])
    batch = packer.pack(rows, [[0], [2, 1]])
    assert batch["pixel_values"].shape == (2, 3, 3, 16, 16)
    assert not batch["pixel_values"][0].any()
    assert batch["pixel_values"][1].equal(torch.cat([rows[2]["pixel_values"], rows[1]["pixel_values"]], dim=1)[0])


def test_images_are_in_the_order_of_the_sequences(processor, model):
    collator = VisionLanguageCollator(processor, packing=True, model=model)
    rows = [ROWS[1], ROWS[0], ROWS[2]]
    batch = collator(rows)
    starts = [(number, place) for number, place in (batch["position_ids"] == 0).nonzero().tolist()]
    images = []
    for number, place in starts:
        row = next(
            row
            for row in (VisionLanguageCollator(processor)([row]) for row in rows)
            if row["input_ids"][0].equal(batch["input_ids"][number, place : place + row["input_ids"].shape[1]])
        )
        images += [row["pixel_values"]] if "pixel_values" in row else []
    assert len(images) == 2
    assert batch["pixel_values"].equal(torch.cat(images))


def test_rows_without_images(processor, model):
    batch = VisionLanguageCollator(processor, packing=True, model=model)([ROWS[1], ROWS[3]])
    assert "pixel_values" not in batch
    assert model(**batch).loss.isfinite()


def test_errors_name_the_row(processor, model):
    collator = VisionLanguageCollator(processor, packing=True, model=model, max_length=30)
    with pytest.raises(ValueError, match=r"^row 1 of the batch has 41 tokens, more than `max_length` \(30\)"):
        collator([ROWS[1], ROWS[2]])
    question = {"messages": [user("the cat")]}
    with pytest.raises(ValueError, match=r"^rows \[1, 2\] of the batch have no assistant turn"):
        collator([ROWS[1], question, question])
    with pytest.raises(ValueError, match=r"^row 1 has 0 images"):
        collator([ROWS[1], {"messages": [{"role": "user", "content": [{"type": "image"}]}]}])
    with pytest.raises(ValueError, match="no rows"):
        collator([])


def test_packing_needs_the_model(processor):
    with pytest.raises(ValueError, match="`packing=True` needs `model`"):
        VisionLanguageCollator(processor, packing=True)


def test_a_field_whose_layout_is_unknown(model):
    row = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 6]]), "pixel_values_videos": torch.ones(1)}
    packer = RowPacker(0, {"input_ids": True, "labels": True}, RowPositions(model))
    with pytest.raises(ValueError, match="returns `pixel_values_videos`, which packing does not know"):
        packer.pack([row], [[0]])


def test_a_collator_can_be_sent_to_workers_without_the_model(processor):
    dense = in_tree_models.make_model("qwen3_vl")
    dense.model.forward = dense.model.forward  # as hooks of Accelerate do
    packer = make_packer(dense, "qwen3_vl")
    found = pickle.loads(pickle.dumps(packer))
    rows = make_rows("qwen3_vl")
    sequences = [[0, 1, 2, 3, 4, 5]]
    assert found.pack(rows, sequences)["position_ids"].equal(packer.pack(rows, sequences)["position_ids"])
    assert len(pickle.dumps(packer)) < 20_000


def test_multimodal_positions_are_those_of_the_model():
    dense = in_tree_models.make_model("qwen3_vl")
    row = make_rows("qwen3_vl", [(17, 2)])[0]
    expected, _ = dense.model.get_rope_index(row["input_ids"], row["mm_token_type_ids"], row["image_grid_thw"])
    positions = RowPositions(dense)(row)
    assert positions.shape == (4, 1, 17)
    assert positions[0].tolist() == [list(range(17))]
    assert positions[1:].equal(expected)
    assert not expected[0].equal(expected[1])


# ------------------------------------------------------------------------------------------------ processors


def make_llava():
    processor = LlavaProcessor(
        make_image_processor(),
        make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )
    return processor, make_dense("llava", vocab_size=VOCAB_SIZE)


def make_idefics3():
    """Has one entry of `pixel_values` per row, which contains the tiles of all images of the row."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]}
    )
    image_processor = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=TEMPLATE)
    model = in_tree_models.make_model("idefics3")
    model.resize_token_embeddings(len(tokenizer))
    return processor, model


@pytest.mark.parametrize("make", [make_llava, make_idefics3])
def test_packed_batches_of_other_processors(make):
    processor, model = make()
    collator = VisionLanguageCollator(processor, packing=True, model=model)
    rows = [*ROWS, row(0, "the mat", "and the image of the cat on the mat"), ROWS[0]]
    packed = collator(rows)
    assert packed["input_ids"].shape[0] < len(rows)
    padded = VisionLanguageCollator(processor)(rows)
    losses = [model(**batch).loss for batch in (packed, padded)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    reversed_images = packed | {"pixel_values": packed["pixel_values"].flip(1 if make is make_idefics3 else 0)}
    assert abs(model(**reversed_images).loss - losses[1]) > 1e-4, "the order of the images must matter"


def test_a_language_model():
    """Takes a tokenizer as processor."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    model = make_dense("llama", vocab_size=VOCAB_SIZE)
    rows = [ROWS[1], ROWS[3], row(0, "the cat sat on the mat" * 3, "the image")]
    packed = VisionLanguageCollator(tokenizer, packing=True, model=model)(rows)
    padded = VisionLanguageCollator(tokenizer)(rows)
    assert packed["input_ids"].shape[0] < 3
    assert model(**packed).loss.item() == pytest.approx(model(**padded).loss.item(), abs=1e-5)


# ------------------------------------------------------------------------------------------------ the check


def test_models_that_do_not_separate_rows_are_refused():
    model = tiny_model("qwen3_5", AutoModelForImageTextToText)  # has linear attention
    rows = make_rows("llama", [(9, 0), (6, 0), (5, 0)])
    with pytest.raises(
        ValueError, match=r"^Qwen3_5ForCond\w+ does not support packed rows: the logits of a row depend"
    ):
        fit_packer(make_packer(model, "llama"), model, rows)


def test_cross_attention_to_images_is_refused():
    model: MllamaForConditionalGeneration = in_tree_models.prepare(in_tree_models.make_mllama())
    rows = []
    for seed in range(3):
        torch.manual_seed(seed)
        inputs = in_tree_models.make_mllama_inputs()
        rows.append(inputs | {"labels": inputs["input_ids"]})
    packer = RowPacker(0, dict.fromkeys(rows[0], True), RowPositions(model))
    with pytest.raises(ValueError, match=r"Mllama.* does not support packed rows"):
        fit_packer(packer, model, rows)


def test_a_model_that_only_separates_the_rows_of_a_single_sequence(processor, model, monkeypatch):
    """As with Flash Attention."""
    forward = model.forward

    def forward_of_flash_attention(**inputs):
        positions = inputs.get("position_ids")
        if positions is not None and len(positions) > 1:
            inputs["position_ids"] = torch.arange(positions.shape[1]).expand_as(positions)
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", forward_of_flash_attention)
    batch = VisionLanguageCollator(processor, packing=True, model=model)(ROWS)
    assert batch["input_ids"].shape[0] == 1
    assert (batch["position_ids"] >= 0).all()


def test_router_losses_that_count_padding():
    """The load balancing loss of Transformers counts padding if there is no attention mask."""
    model = in_tree_models.make_model("qwen3_vl_moe")
    packer, rows = make_packer(model, "qwen3_vl_moe"), make_rows("qwen3_vl_moe", [(14, 1), (8, 0), (6, 0)])
    fit_packer(packer, model, rows)
    assert not packer.one_sequence
    model.config.text_config.output_router_logits = True
    fit_packer(packer, model, rows)
    assert packer.one_sequence
    assert not packer.separators


def test_a_model_that_fails(processor, model, monkeypatch):
    def fail(**inputs):
        raise RuntimeError("no positions" if "position_ids" in inputs else "nothing")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(
        ValueError, match=r"cannot be checked: Sparse\w+ fails on short padded rows with RuntimeError: nothing$"
    ):
        check_packing(model, processor)
    forward = type(model).forward
    monkeypatch.setattr(model, "forward", lambda **x: fail(**x) if "position_ids" in x else forward(model, **x))
    with pytest.raises(ValueError, match=r"not support packed rows: it fails with RuntimeError: no positions\. Set"):
        check_packing(model, processor)


@pytest.mark.parametrize(("share", "is_refused"), [(0.04, True), (0.01, False)])
def test_a_small_effect_of_other_rows(processor, model, monkeypatch, share, is_refused):
    """More than 2 % of the effect without separation is refused. Less can be rounding."""
    forward = model.forward

    def leaking_forward(**inputs):
        outputs = forward(**inputs)
        if "position_ids" in inputs:
            counted = torch.arange(inputs["position_ids"].shape[1]).expand_as(inputs["position_ids"])
            mixed = forward(**inputs | {"position_ids": counted})
            outputs.logits = outputs.logits + share * (mixed.logits - outputs.logits)
        return outputs

    monkeypatch.setattr(model, "forward", leaking_forward)
    if is_refused:
        with pytest.raises(ValueError, match=r"depend on the rows packed with it \(by 4% of the effect"):
            check_packing(model, processor)
    else:
        check_packing(model, processor)


@pytest.mark.parametrize("name", ["loss", "aux_loss"])
def test_another_loss_is_refused(processor, model, monkeypatch, name):
    forward = model.forward

    def forward_with_another_loss(**inputs):
        outputs = forward(**inputs)
        if "position_ids" in inputs:
            outputs[name] = 1.01 * outputs[name]
        return outputs

    monkeypatch.setattr(model, "forward", forward_with_another_loss)
    with pytest.raises(ValueError, match=rf"not support packed rows: its `{name}` is \d"):
        check_packing(model, processor)


def test_models_in_half_precision(processor, model):
    dtypes = []
    model.register_forward_pre_hook(
        lambda model, args, inputs: dtypes.append(inputs["pixel_values"].dtype), with_kwargs=True
    )
    batch = VisionLanguageCollator(processor, packing=True, model=model.bfloat16())(ROWS)
    assert batch["input_ids"].shape[0] > 1
    assert set(dtypes) == {torch.bfloat16}


def test_a_loss_that_is_infinite(processor, model, monkeypatch):
    """As of Chameleon, which never predicts image tokens."""
    forward = model.forward

    def forward_with_infinite_loss(**inputs):
        outputs = forward(**inputs)
        outputs.loss = torch.tensor(torch.inf)
        return outputs

    monkeypatch.setattr(model, "forward", forward_with_infinite_loss)
    check_packing(model, processor)


def test_a_template_that_fails(model):
    processor = make_processor(chat_template="{{ raise_exception('only one image') }}")
    with pytest.raises(ValueError, match=r"packing cannot be checked: a short row of the check fails: .*only one"):
        check_packing(model, processor)


def test_the_check_changes_nothing(processor):
    model = make_speaking_model(attention_dropout=0.5, router_bias_update_rate=0.1)
    model.train()
    model.model.vision_tower.eval()
    bias = model.model.language_model.layers[0].mlp.gate.e_score_correction_bias

    def change_buffer(*_) -> None:
        bias.add_(torch.rand(()))

    model.register_forward_pre_hook(change_buffer)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_packing(model, processor)
    assert torch.rand(4).equal(expected)
    assert [module.training for module in model.modules()] == modes
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_check_keeps_the_offset_of_multimodal_positions():
    model = in_tree_models.make_model("qwen3_vl")
    rows = make_rows("qwen3_vl", [(14, 1), (8, 0), (6, 0)])
    model.model.rope_deltas = torch.tensor([[7]])
    fit_packer(make_packer(model, "qwen3_vl"), model, rows)
    assert model.model.rope_deltas.tolist() == [[7]]


# ------------------------------------------------------------------------------------------------ routing and training


def test_padding_of_packed_rows_is_not_counted(processor, model):
    batches = [VisionLanguageCollator(processor, packing=packing, model=model)(ROWS) for packing in (True, False)]
    assert (batches[0]["position_ids"] < 0).any()
    packed, padded = (measure_routing(model, [batch]) for batch in batches)
    assert packed.tokens.tolist() == [int(batches[1]["attention_mask"].sum()) - 12, 12]
    assert packed.tokens.equal(padded.tokens)
    assert packed.wanted.equal(padded.wanted)
    torch.testing.assert_close(packed.entropy, padded.entropy)
    assert count_tokens(model, batches[0], 2).equal(packed.tokens)
    outputs = model(**batches[0])
    assert count_batch(model, batches[0], outputs.router_logits, outputs.router_indices).wanted.equal(padded.wanted)


def test_padding_of_packed_rows_takes_no_capacity(processor):
    model = make_speaking_model(expert_capacity_factor=1.0, output_router_logits=True)
    batches = [VisionLanguageCollator(processor, packing=packing, model=model)(ROWS) for packing in (True, False)]
    packed, padded = (measure_routing(model, [batch]) for batch in batches)
    assert packed.dropped.sum() > 0
    assert packed.dropped.equal(padded.dropped)


@pytest.mark.parametrize("trainer_class", [Trainer, SparseMoeTrainer])
def test_training_with_packed_rows_equals_training_with_padded_rows(processor, tmp_path, trainer_class):
    """With gradient accumulation, gradient checkpointing, router losses and the bias of the routers."""
    rows = [*ROWS, *(row(number % 2, "the cat " * number, "sat", seed=number) for number in range(4))]
    runs = {}
    for packing in (True, False):
        model = make_speaking_model(output_router_logits=True, router_bias_update_rate=0.1)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            **QUIET_TRAINING,
            max_steps=2,
            logging_steps=1,
            learning_rate=0.1,
            optim="sgd",
            save_strategy="no",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            max_grad_norm=0,
        )
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=VisionLanguageCollator(processor, packing=packing, model=model),
            callbacks=[RoutingMonitor()] if trainer_class is Trainer else None,
        )
        trainer.train()
        logs = [
            {name: value for name, value in log.items() if not name.startswith(("tokens_per_second", "peak_memory"))}
            for log in trainer.state.log_history[:2]
        ]
        runs[packing] = logs, model.state_dict()
    (packed_logs, packed), (padded_logs, padded) = runs[True], runs[False]
    for packed_log, padded_log in zip(packed_logs, padded_logs, strict=True):
        assert packed_log.keys() == padded_log.keys()
        for name in packed_log:
            if not name.startswith("tokens_per_second"):
                assert packed_log[name] == pytest.approx(padded_log[name], abs=1e-3, rel=1e-3), name
        assert any(name.startswith("routing/") for name in packed_log)
    start = make_speaking_model(output_router_logits=True, router_bias_update_rate=0.1).state_dict()
    for name, tensor in packed.items():
        torch.testing.assert_close(tensor, padded[name], atol=1e-5, rtol=1e-4, msg=name)
    assert any((tensor - start[name]).abs().max() > 1e-2 for name, tensor in packed.items())


@pytest.mark.parametrize(("model_type", "outcome"), [("llava", YES), ("lfm3_vl", NO), ("blip-2", NOT_RUN)])
def test_the_census(model_type, outcome):
    ((name, found, reason),) = census([model_type])
    assert (name, found) == (model_type, outcome)
    assert ("does not support packed rows" in reason) == (outcome == NO)


def test_padding_at_the_end_of_sequences():
    packer = RowPacker(
        9, {"input_ids": True, "labels": True}, lambda row: torch.arange(row["labels"].shape[1])[None, None]
    )
    rows = [{name: torch.tensor([ids]) for name in ("input_ids", "labels")} for ids in ([1, 2, 3], [4])]
    batch = packer.pack(rows, [[0], [1]])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, -1, -1]]
