"""The web page in a headless browser, and the folder of a Space. Each runs in a separate process."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from peft import get_peft_model
from PIL import Image

from modeling_sparse_moe_vlm.toolbox.app import ChatModel, Settings
from modeling_sparse_moe_vlm.toolbox.app.chat_model import read_image
from modeling_sparse_moe_vlm.toolbox.app.drawings import draw_experts, draw_heat
from modeling_sparse_moe_vlm.toolbox.app.space import write_space
from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config
from tests.support.in_tree_moe import randomise
from tests.support.processes import ROOT
from tests.support.processors import make_image, make_processor, make_speaking_model, speak_printably, user

pytest.importorskip("gradio", reason="the extra `app` is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1400,1400"
)
QUESTION = "Where is the cat?"
THUMBNAIL = "#message img"
WAIT = 60  # seconds, for what takes a second or two on a machine that is not busy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a model, an adapter, an image and a file that is not an image."""
    folder = tmp_path_factory.mktemp("app")
    model = speak_printably(make_speaking_model())
    model.save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    randomise(get_peft_model(model, expert_lora_config(model, r=2))).save_pretrained(folder / "adapter")
    make_image().save(folder / "image.png")
    (folder / "broken.png").write_text("not an image")
    return folder


@contextlib.contextmanager
def started(*arguments: str, cwd: Path) -> Iterator[str]:
    """Serves a page from a new Python process. Yields its address."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    log = cwd / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(10 * WAIT):
            if found := re.search(r"http://[\d.]+:\d+", log.read_text()):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        assert found, log.read_text()
        yield found[0]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and its driver are not installed (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Visitor:
    """A visitor with a browser."""

    def __init__(self, browser, folder: Path):
        self.browser, self.folder = browser, folder

    def find(self, selector: str):
        """Waits until the element exists and returns it."""
        return self.until(lambda: self.browser.find_elements("css selector", selector))[0]

    def until(self, condition):
        for _ in range(10 * WAIT):
            if value := condition():
                return value
            time.sleep(0.1)
        self.browser.save_screenshot(str(self.folder / "failure.png"))
        pytest.fail(f"the page does not show what it should: see {self.folder}/failure.png")

    def attach(self, path: Path) -> None:
        self.until(lambda: not self.browser.find_elements("css selector", THUMBNAIL))
        field = self.find("#message input[type=file]")
        self.browser.execute_script("arguments[0].value = ''", field)  # the driver adds files to those already selected
        field.send_keys(str(path))
        self.find(THUMBNAIL)

    def ask(self, question: str) -> None:
        self.find("#message textarea").send_keys(question + "\ue007")

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def set_number(self, selector: str, number: float) -> None:
        field = self.find(f"{selector} input[type=number]")
        field.send_keys("\ue009a")  # select all
        field.send_keys(f"\ue003{number}\ue004")

    def words(self) -> list[tuple[str, str]]:
        """Returns the words of the answer with their numbers. One script reads all, because the page may change."""
        script = """return [...document.querySelectorAll('#alpha .word')].map(
            word => [word.children[0].innerText, word.children[1].innerText])"""
        return [tuple(pair) for pair in self.browser.execute_script(script)]

    def pixels(self, selector: str) -> np.ndarray:
        """Returns a screenshot of an element."""
        return np.array(Image.open(BytesIO(self.find(selector).screenshot_as_png)).convert("RGB")).astype(int)


def expected_words(answer) -> list[tuple[str, str]]:
    return [(word, f"{alpha:.2f}") for word, alpha in zip(answer.words, answer.alpha, strict=True)]


def test_chat_in_a_browser(saved, browser, tmp_path):
    """The page shows the figures of the model after uploads, questions, sliders and adapters, and survives mistakes."""
    chat = ChatModel.load(str(saved / "model"), {"mine": str(saved / "adapter")})
    image = read_image(str(saved / "image.png"))

    def answer(**settings):
        return chat.answer([user(image, QUESTION)], Settings(max_new_tokens=8, **settings))

    command = ["-m", "modeling_sparse_moe_vlm.toolbox.commands", "app", str(saved / "model")]
    with started(*command, "--adapter", f"mine={saved / 'adapter'}", cwd=tmp_path) as address:
        browser.get(address)
        visitor = Visitor(browser, tmp_path)
        visitor.set_number("#new-tokens", 8)

        visitor.attach(saved / "broken.png")
        visitor.ask("What is it?")
        visitor.until(lambda: "broken.png cannot be read as an image" in visitor.find("#trouble").text)
        visitor.click("#clear")
        visitor.until(lambda: not visitor.find("#trouble").text)

        visitor.attach(saved / "image.png")
        visitor.ask(QUESTION)
        plain = answer()
        visitor.until(lambda: visitor.words() == expected_words(plain))
        assert plain.text in visitor.find("#chat").text

        # Scrolled into view; rounded corners and the space around the text differ.
        for selector, drawing in (
            ("#heat img", draw_heat(image, plain.heat[0])),
            ("#experts img", draw_experts(image, plain.experts[0], plain.layers, plain.groups)),
        ):
            shown, drawn = visitor.pixels(selector), np.array(drawing).astype(int)
            assert shown.shape == drawn.shape
            assert (np.abs(shown - drawn).max(axis=-1) <= 2).mean() > 0.99
            assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 20, "the image is not blank"

        visitor.set_number("#odds", 2)
        visitor.until(lambda: "'image': 4.00" in visitor.find("#factor").text)
        visitor.click("#again")
        steered = answer(image_prior=4.0)
        assert expected_words(steered) != expected_words(plain)
        visitor.until(lambda: visitor.words() == expected_words(steered))

        visitor.click("#adapter input")
        visitor.click("ul[role=listbox] [aria-label=mine]")
        visitor.click("#again")
        adapted = answer(image_prior=4.0, adapter="mine")
        assert expected_words(adapted) != expected_words(steered)
        visitor.until(lambda: visitor.words() == expected_words(adapted))
        browser.save_screenshot(str(tmp_path / "page.png"))

        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert {url.split("/")[2] for url in requests if url.startswith("http")} == {address.removeprefix("http://")}


@pytest.mark.extensive
def test_a_space_starts(saved, tmp_path):
    space = write_space(tmp_path / "space", str(saved / "model"), {"mine": str(saved / "adapter")})
    saved.joinpath("model").rename(saved / "elsewhere")
    try:
        with started(str(space / "app.py"), cwd=tmp_path) as address, urlopen(f"{address}/config") as response:
            config = json.load(response)
    finally:
        saved.joinpath("elsewhere").rename(saved / "model")
    assert config["title"] == "model – sparse-moe-vlm"
    (adapter,) = [part["props"] for part in config["components"] if part["props"].get("elem_id") == "adapter"]
    assert [value for value, _ in adapter["choices"]] == ["none", "mine"]
