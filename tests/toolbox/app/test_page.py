"""The events of the web page and their outputs, without a browser."""

import socket
from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra `app` is not installed")

from modeling_sparse_moe_vlm.toolbox.app import page as module
from modeling_sparse_moe_vlm.toolbox.app.answers import Answer
from modeling_sparse_moe_vlm.toolbox.app.conversation import Turn, to_bubbles
from modeling_sparse_moe_vlm.toolbox.app.page import Page, as_settings, panels_of, serve
from modeling_sparse_moe_vlm.toolbox.app.panels import WAITING, panels, problem
from modeling_sparse_moe_vlm.toolbox.app.settings import Settings

CONTROLS = ("none", 0.0, 0.0, 5, 0.0)
REQUEST = SimpleNamespace(session_hash="session")


class Chat:
    """Answers in two pieces, or raises an error."""

    reads_images = True
    adapters = ("none", "other")

    def __init__(self, error: BaseException | None = None):
        self.error, self.asked = error, []

    def answer(self, messages, settings, on_text, stop):
        self.asked.append((messages, settings))
        if self.error is not None:
            raise self.error
        for piece in ("a ", "", "cat"):
            on_text(piece)
        text = "stopped" if stop.is_set() else f"a cat {len(self.asked)}"
        return Answer(text, ["a", "cat"], [0.5, 0.25], [0.5, 0.5], heat_note="no heat", experts_note="no experts")


@pytest.fixture
def image(tmp_path) -> str:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def is_skip(value) -> bool:
    return isinstance(value, dict) and value.get("__type__") == "update" and len(value) == 1


def test_an_answer_arrives_word_by_word_and_then_its_panels(image):
    chat = Chat()
    page = Page(chat, "a model")
    message = {"text": " What is it? ", "files": [image]}
    first, *words, last = page.ask([], message, REQUEST, "other", 1.0, 0.5, 7, 0.25)
    question = [{"role": "user", "content": {"path": image}}, {"role": "user", "content": "What is it?"}]
    assert first[0] == [*question, {"role": "assistant", "content": "…"}]
    assert first[2:4] == ({"text": "", "files": []}, "")
    assert [shown[0][-1]["content"] for shown in words] == ["a ", "a cat"]
    assert all(is_skip(value) for shown in words for value in shown[1:])
    bubbles, turns, box, trouble, *shown = last
    assert bubbles == [*question, {"role": "assistant", "content": "a cat 1"}]
    assert turns[0].question == "What is it?"
    assert is_skip(box)
    assert trouble == ""
    assert tuple(shown) == panels(turns[0].answer, [])
    ((messages, settings),) = chat.asked
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
    assert settings == Settings("other", 2.0, 0.5, 7, 0.25)
    assert page.stops == {}


def test_ask_again_replaces_the_last_answer(image):
    chat = Chat()
    page = Page(chat, "a model")
    turns = [Turn("One?", [image], Answer("one")), Turn("Two?", [], Answer("two"))]
    *_, last = page.ask_again(turns, REQUEST, *CONTROLS)
    assert [turn.answer.text for turn in last[1]] == ["one", "a cat 1"]
    assert [message["role"] for message in chat.asked[0][0]] == ["user", "assistant", "user"]
    assert turns[1].answer.text == "two", "the state from before is not changed"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("too\nlong"), "too long"),
        (OSError("gone"), "gone"),
        (RuntimeError("out of memory"), "out of memory"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_mistakes_are_shown_and_the_page_still_works(error, line, image, capsys):
    page = Page(Chat(error), "a model")
    before = [Turn("One?", [], Answer("one"))]
    message = {"text": "Two?", "files": [image]}
    *_, last = page.ask(before, message, REQUEST, *CONTROLS)
    assert last[:4] == (to_bubbles(before), before, message, problem(line))
    assert all(is_skip(value) for value in last[4:])
    assert ("Traceback" in capsys.readouterr().err) == (not isinstance(error, ValueError | OSError))
    page.chat.error = None
    *_, last = page.ask_again(before, REQUEST, *CONTROLS)
    assert last[3] == ""


def test_mistakes_in_messages(tmp_path):
    page = Page(Chat(), "a model")
    (tmp_path / "broken.png").write_text("text")
    for message, line in (
        ({"text": "  ", "files": []}, "The message is empty: type a question."),
        ({"text": "What?", "files": [str(tmp_path / "broken.png")]}, "broken.png cannot be read as an image"),
    ):
        (shown,) = page.ask([], message, REQUEST, *CONTROLS)
        assert line in shown[3]
        assert shown[0] == shown[1] == []
        assert shown[2] == message
    (shown,) = page.ask_again([], REQUEST, *CONTROLS)
    assert "There is no question yet: type one first." in shown[3]
    assert is_skip(shown[2])


def test_stop_ends_the_answer_of_its_session_only(image):
    page = Page(Chat(), "a model")
    answers = page.ask([], {"text": "What?", "files": []}, REQUEST, *CONTROLS)
    next(answers)
    page.stop(SimpleNamespace(session_hash="another"))
    assert not page.stops["session"].is_set()
    page.stop(REQUEST)
    *_, last = answers
    assert last[1][0].answer.text == "stopped"
    page.stop(REQUEST)


def test_a_closed_page_stops_its_answer():
    page = Page(Chat(), "a model")
    answers = page.ask([], {"text": "What?", "files": []}, REQUEST, *CONTROLS)
    next(answers)
    stop = page.stops["session"]
    answers.close()
    assert stop.is_set()
    assert page.stops == {}


def test_clear():
    assert Page(Chat(), "a model").clear() == ([], [], {"text": "", "files": []}, "", WAITING, WAITING, WAITING)


def test_a_click_shows_the_panels_of_an_answer(image, monkeypatch):
    page = Page(Chat(), "a model")
    turns = [Turn("One?", [image], Answer("1", ["1"], [0.1], [0.1])), Turn("Two?", [image], Answer("2"))]
    seen = []
    monkeypatch.setattr(module, "panels", lambda answer, images: seen.append((answer.text, len(images))))
    for index in (0, 2, 3, 5):
        page.show(turns, SimpleNamespace(index=index))
    assert seen == [("1", 1), ("1", 1), ("2", 2), ("2", 2)]


def test_no_panels_without_an_answer():
    assert panels_of([], 0) == panels_of([Turn("One?", [])], 0) == (WAITING, WAITING, WAITING)


@pytest.mark.parametrize(("log_odds", "prior"), [(-2, 0.25), (0, 1.0), (0.5, 2**0.5), (2, 4.0)])
def test_settings_of_the_controls(log_odds, prior):
    assert as_settings("none", log_odds, 1, 12.0, 0) == Settings("none", prior, 1.0, 12, 0.0)


def components(page: Page) -> dict[str, dict]:
    return {
        component["props"]["elem_id"]: component["props"]
        for component in page.blocks.get_config_file()["components"]
        if component["props"].get("elem_id")
    }


def test_controls():
    of_images = components(Page(Chat(), "a model"))
    assert [value for value, _ in of_images["adapter"]["choices"]] == ["none", "other"]
    assert of_images["adapter"]["visible"]
    assert (of_images["odds"]["minimum"], of_images["odds"]["maximum"], of_images["odds"]["value"]) == (-2, 2, 0)
    assert of_images["message"]["sources"] == ["upload"]
    chat = Chat()
    chat.reads_images, chat.adapters = False, ("none",)
    of_text = components(Page(chat, "a model"))
    assert not of_text["adapter"]["visible"]
    assert not of_text["factor"]["visible"]
    assert of_text["message"]["sources"] == []


def test_nothing_is_sent_to_others_and_answers_wait_for_each_other():
    blocks = Page(Chat(), "a model").blocks
    assert not blocks.analytics_enabled
    assert blocks.title == "a model – sparse-moe-vlm"
    answers = [function for function in blocks.fns.values() if function.name in ("ask", "ask_again")]
    assert [function.concurrency_id for function in answers] == ["model", "model"]


@pytest.mark.parametrize("port", [0, 7991, None])
def test_serve(port, monkeypatch):
    launched = {}
    monkeypatch.setattr("gradio.Blocks.launch", lambda self, **options: launched.update(options))
    serve(Chat(), "a model", "127.0.0.1", port)
    assert not launched["share"]
    assert launched["server_name"] == "127.0.0.1"
    if port == 0:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", launched["server_port"]))
    else:
        assert launched["server_port"] == port
