"""
`transformers serve` answers the OpenAI client and `transformers chat` as `generate` does. It runs the code in the
checkpoints.
"""

import base64
import io
import subprocess

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from tests.clients.servers import environment, running, script
from tests.support.processors import make_image

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

LENGTH = 6
GREEDY = {"temperature": 0}
CONVERSATIONS = {
    "text": ["What?"],
    "image": [0, "What?"],
    "two images": [0, "and", 1, "?"],
}
SMALL_CACHE = ["--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]


@pytest.fixture(scope="module", params=[[], ["--continuous-batching", *SMALL_CACHE]], ids=["", "continuous batching"])
def server(request, tmp_path_factory):
    """The server, which loads models on demand, its folder, and whether it batches continuously."""
    folder = tmp_path_factory.mktemp("serve")
    command = [script("transformers"), "serve", "--trust-remote-code", "--device", "cpu", *request.param]
    with running(*command, folder=folder, path="/health") as address:
        yield address, folder, bool(request.param)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=120)


def url_of(number: int) -> str:
    data = io.BytesIO()
    make_image(number).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def chat_content(parts: list) -> list[dict]:
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": url_of(part)}}
        for part in parts
    ]


def response_content(parts: list) -> list[dict]:
    return [
        {"type": "input_text", "text": part}
        if isinstance(part, str)
        else {"type": "input_image", "image_url": url_of(part), "detail": "auto"}
        for part in parts
    ]


def expected_answer(folder, parts: list) -> tuple[str, int]:
    """Returns the answer of `generate`, and the number of tokens of the prompt."""
    is_text = "text" in folder.name
    model = (AutoModelForCausalLM if is_text else AutoModelForImageTextToText).from_pretrained(
        folder, trust_remote_code=True
    )
    processor = (AutoTokenizer if is_text else AutoProcessor).from_pretrained(folder, trust_remote_code=True)
    content = (
        parts[0]
        if is_text
        else [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": make_image(part)}
            for part in parts
        ]
    )
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    output = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return processor.decode(output[0, length:], skip_special_tokens=True), length


@pytest.mark.parametrize("kind", ["ours", "upcycled"])
def test_chats_with_images(kind, client, checkpoints):
    model = str(checkpoints[kind])
    answers = set()
    for parts in CONVERSATIONS.values():
        expected, length = expected_answer(checkpoints[kind], parts)
        answers.add(expected)
        request = {"model": model, "messages": [{"role": "user", "content": chat_content(parts)}]}
        request |= {"max_tokens": LENGTH, **GREEDY}
        completion = client.chat.completions.create(**request)
        assert completion.choices[0].message.content == expected
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (length, LENGTH)
        stream = client.chat.completions.create(**request, stream=True)
        pieces = [
            chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content
        ]
        assert "".join(pieces) == expected
        assert len(pieces) > 1
    assert len(answers) == len(CONVERSATIONS)


@pytest.mark.parametrize("kind", ["ours", "upcycled"])
def test_responses_with_images(kind, client, checkpoints):
    for parts in CONVERSATIONS.values():
        expected, length = expected_answer(checkpoints[kind], parts)
        request = {"model": str(checkpoints[kind]), "max_output_tokens": LENGTH, **GREEDY}
        request["input"] = [{"role": "user", "content": response_content(parts)}]
        response = client.responses.create(**request, stream=False)
        assert response.output_text == expected
        assert (response.usage.input_tokens, response.usage.output_tokens) == (length, LENGTH)
        stream = client.responses.create(**request, stream=True)
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == expected


@pytest.mark.parametrize("kind", ["our_text", "upcycled_text"])
def test_models_of_text(kind, server, client, checkpoints):
    _, folder, batches = server
    expected, length = expected_answer(checkpoints[kind], ["What?"])
    request = {"model": str(checkpoints[kind]), "messages": [{"role": "user", "content": "What?"}]}
    request |= {"max_tokens": LENGTH, **GREEDY}
    completion = client.chat.completions.create(**request)
    assert completion.choices[0].message.content == expected
    assert completion.usage.prompt_tokens == length
    stream = client.chat.completions.create(**request, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == expected
    assert f"Model: {checkpoints[kind]}, CB: {batches}" in (folder / "server.log").read_text()


def test_models_with_images_are_not_batched(server, client, checkpoints):
    """The server itself falls back to `generate`, one request at a time."""
    _, folder, batches = server
    request = {"model": str(checkpoints["ours"]), "messages": [{"role": "user", "content": "?"}]}
    client.chat.completions.create(**request, max_tokens=1)
    log = (folder / "server.log").read_text()
    assert f"Model: {checkpoints['ours']}, CB: False" in log
    assert ("SparseMoeVlmForConditionalGeneration does not support continuous batching" in log) == batches


@pytest.mark.parametrize("kind", ["ours", "upcycled"])
def test_transformers_chat(kind, server, checkpoints):
    address, folder, _ = server
    command = [script("transformers"), "chat", str(checkpoints[kind]), address]
    chat = subprocess.run(
        [*command, f"max_new_tokens={LENGTH}", "do_sample=False"],
        input="What?\nn\n!exit\n",
        cwd=folder,
        env=environment(folder) | {"HF_HUB_OFFLINE": "0"},  # otherwise its client refuses all requests
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert chat.returncode == 0, chat.stderr
    assert expected_answer(checkpoints[kind], CONVERSATIONS["text"])[0] in chat.stdout
