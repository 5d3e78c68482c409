"""The turns of the assistant are found in conversations whose chat template does not mark them."""

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.data.targets import marks_targets, with_segments
from tests.support.processors import make_image, make_processor, make_tokenizer
from tests.toolbox.data.data_files import turn
from tests.toolbox.upcycling.test_processors import make_llava_processor

PARTS = "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = f"{HEAD}{PARTS}{{{{ '<|im_end|>\\n' }}}}{{% endfor %}}{PROMPT}"
MARKED = (
    f"{HEAD}{{% if m.role == 'assistant' %}}{{% generation %}}{PARTS}{{{{ '<|im_end|>' }}}}{{% endgeneration %}}"
    f"{{% else %}}{PARTS}{{{{ '<|im_end|>' }}}}{{% endif %}}{{{{ '\\n' }}}}{{% endfor %}}{PROMPT}"
)
ROWS = [
    {
        "messages": [
            turn("system", "the mat"),
            turn("user", None, "a cat?"),
            turn("assistant", "yes"),
            turn("user", "and", None, "?"),
            turn("assistant", "a cat sat "),
        ],
        "images": [make_image(0), make_image(1)],
    },
    {"messages": [turn("assistant", "hello"), turn("user", "the"), turn("assistant", "cat")]},
]


def test_labels_are_those_of_a_marked_template():
    processor = make_llava_processor()
    batches = []
    for template in (MARKED, PLAIN):
        processor.chat_template = template
        batches.append(VisionLanguageCollator(processor)(ROWS))
    marked, plain = batches
    assert marked.keys() == plain.keys()
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(marked[name], plain[name])
    answers = ["yes<|im_end|>a cat sat <|im_end|>", "<|im_start|>assistant\nhello<|im_end|>cat<|im_end|>"]
    decoded = [processor.tokenizer.decode(labels[labels != -100]) for labels in plain["labels"]]
    assert decoded == answers
    # In the first row, no prompt is missing, so the labels are the same.
    assert torch.equal(plain["labels"][0], marked["labels"][0])


def test_tokenizers_of_language_models():
    tokenizer = make_tokenizer()
    rows = [ROWS[1]]
    labels = []
    for template in (MARKED, PLAIN):
        tokenizer.chat_template = template.replace(PARTS, "{{ m.content }}")
        labels.append(VisionLanguageCollator(tokenizer)(rows)["labels"])
    assert tokenizer.decode(labels[0][labels[0] != -100]) == "hello<|im_end|>cat<|im_end|>"
    assert tokenizer.decode(labels[1][labels[1] != -100]) == "<|im_start|>assistant\nhello<|im_end|>cat<|im_end|>"


def test_segments_add_up_to_the_conversation():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN
    messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d"), turn("user", "e")]
    first, *others = with_segments(make_llava_with(PLAIN), messages, "row 0")
    assert others == messages[1:]
    assert {key: first[key] for key in ("role", "content")} == messages[0]
    assert [segment for segment in first["segments"] if segment[0]] == [(True, "b<|im_end|>"), (True, "d<|im_end|>")]
    text = "".join(segment for _, segment in first["segments"])
    assert text == make_llava_with(PLAIN).apply_chat_template(messages, tokenize=False)


def make_llava_with(template):
    processor = make_llava_processor()
    processor.chat_template = template
    return processor


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        (MARKED, True),
        (PLAIN, False),
        ("{%- generation -%}", True),
        ("{%generation%}", True),
        ("{% if add_generation_prompt %}", False),
        (None, True),
    ],
)
def test_templates_that_mark_targets(template, marks):
    assert marks_targets(make_llava_with(template)) is marks
    assert marks_targets(make_processor()) is True


def test_templates_that_change_earlier_turns_are_an_error():
    """Some templates leave out the thoughts of earlier turns."""
    changing = "{% for m in messages %}{% if loop.last %}!{% endif %}" + PARTS + "{% endfor %}"
    rows = [ROWS[1] | {"source": "a.jsonl", "row": 4}]
    with pytest.raises(
        ValueError, match=r"^a.jsonl, row 4 cannot be processed: the chat template renders the beginning"
    ):
        VisionLanguageCollator(make_llava_with(changing))(rows)
    failing = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match=r"^row 0 cannot be processed: no system"):
        VisionLanguageCollator(make_llava_with(failing))([ROWS[1]])
