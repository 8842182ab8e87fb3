"""The demo as a person uses it: a question asked and answered, a heat map, mistakes, dark, on a phone; and nothing that
leaves this machine, neither from the page nor from its server.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from data.synthetic import scenes
from finetune.demo import __main__ as command
from finetune.demo.answer import Answered, ask
from finetune.demo.examples import examples_of
from finetune.demo.networks import Opened, find_sources, open_networks
from tests.browser.conftest import contrast, leave_out, on_phone, overflow
from tests.demo.conftest import ROOT, make_adapter
from tests.demo.test_examples import make_run
from tests.free_port import free_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# The command, in a process that notes every address it connects to, or asks for, that is not this machine's.
SERVER = """
import sys
noted, sys.argv = open(sys.argv[1], "a", buffering=1), ["paligemma-lora", *sys.argv[2:]]
def note(event, given):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = given[1] if event == "socket.connect" else given
        if str(host[0] if isinstance(host, tuple) else host) not in ("127.0.0.1", "localhost", "::1"):
            print(event, host, file=noted)
sys.addaudithook(note)
from finetune.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter and a validation set."""
    root = tmp_path_factory.mktemp("demo")
    scenes.write(root / "data", scenes=12, seed=2, split="val2014")
    files = {
        "questions": f"{root}/data/v2_OpenEnded_mscoco_val2014_questions.json",
        "annotations": f"{root}/data/v2_mscoco_val2014_annotations.json",
        "images": f"{root}/data/images",
    }
    directory = make_run(root / "<i>run", files)
    make_adapter(directory / "adapter", 1)
    make_adapter(root / "second", 2)
    return directory


@pytest.fixture(scope="module")
def opened(run: Path) -> Opened:
    """The same networks, here."""
    return open_networks(find_sources([run, run.parent / "second"]), "float32", "cpu")


@pytest.fixture(scope="module")
def address(browser: Browser, run: Path) -> Iterator[str]:
    """Where `paligemma-lora demo` serves the run and a second adapter."""
    if importlib.util.find_spec("gradio") is None:
        leave_out("gradio is not installed; make test-browser installs it")
    noted, said = run.parent / "connections", run.parent / "said"
    noted.touch()
    port = free_port()
    words = ["demo", str(run), str(run.parent / "second"), "--port", str(port), "--dtype", "float32", "--device", "cpu"]
    with serving([sys.executable, "-c", SERVER, str(noted), *words], ROOT, said, port) as url:
        yield url
    assert noted.read_text() == ""
    assert f"the demo is at {url[:-1]}, from this machine alone" in said.read_text()


@contextmanager
def serving(words: list[str], directory: Path, said: Path, port: int) -> Iterator[str]:
    """The address of a server, once it answers; what it says goes to a file."""
    url = f"http://127.0.0.1:{port}/"
    with said.open("w") as file:
        server = subprocess.Popen(words, cwd=directory, stdout=file, stderr=file)
    try:
        until = time.monotonic() + 300
        while not answers(url):
            assert server.poll() is None, said.read_text()
            assert time.monotonic() < until, said.read_text()
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=10) as page:
            return bool(page.status == 200)
    except (URLError, TimeoutError):
        return False


def open_page(tab: Page, address: str) -> None:
    tab.set_default_timeout(60_000)
    tab.goto(address)
    tab.get_by_text("from the validation set").wait_for()


def assert_shown(tab: Page, number: int, expected: Answered) -> None:
    """An answer stands in its column, with each token's probability."""
    column = tab.locator(f"#answer-{number}")
    column.locator(".answer").wait_for()
    assert column.locator(".answer").inner_text() == (expected.text or "(nothing)")
    shown = column.locator(".token small").all_inner_texts()
    assert [float(one.rstrip("%")) for one in shown] == pytest.approx(
        [100 * token.probability for token in expected.tokens], abs=0.11
    )


def test_a_question_is_asked_and_answered(tab: Page, address: str, opened: Opened, run: Path) -> None:
    """An example is chosen; base and adapters answer as they do here; then what each answer depends on."""
    open_page(tab, address)
    assert tab.locator("h1").inner_text() == "<i>run and second, beside the base"
    example = examples_of(run)[2]
    tab.get_by_text(example.question, exact=True).first.click()
    tab.locator("#image img").wait_for()
    tab.get_by_role("button", name="Ask", exact=True).click()
    for number, network in enumerate(opened.networks):
        prompt = example.prompt.replace("{question}", example.question)
        length = max(16, opened.max_new_tokens)
        assert_shown(tab, number, ask(network, example.image, prompt, length))
    tab.get_by_role("button", name="Show what the answers depend on").click()
    for number in range(3):
        tab.locator(f"#map-{number} img").wait_for()
        assert "probability, and" in tab.locator(f"#depends-{number}").inner_text()


def test_an_image_of_ones_own(tab: Page, address: str, opened: Opened, run: Path) -> None:
    """Dropped in, with a question and Enter; settings change what is asked."""
    open_page(tab, address)
    image = sorted((run.parent / "data/images").iterdir())[5]
    tab.locator("input[type=file]").first.set_input_files(str(image))
    tab.locator("#image img").wait_for()
    tab.get_by_text("prompt and sampling").click()
    tab.get_by_label("prompt").first.fill("caption en")
    tab.get_by_label("question", exact=True).first.press("Enter")
    assert_shown(tab, 1, ask(opened.networks[1], image, "caption en", max(16, opened.max_new_tokens)))


def test_a_mistake_is_a_message(tab: Page, address: str, run: Path) -> None:
    """As text: nothing that was typed becomes a part of the page."""
    open_page(tab, address)
    tab.get_by_role("button", name="Ask", exact=True).click()
    tab.get_by_text("there is no image: drop one in").wait_for()
    image = sorted((run.parent / "data/images").iterdir())[0]
    tab.locator("input[type=file]").first.set_input_files(str(image))
    tab.locator("#image img").wait_for()
    tab.get_by_label("question", exact=True).first.fill("<img src=x onerror=alert(1)><eos>")
    tab.get_by_role("button", name="Ask", exact=True).click()
    tab.get_by_text("holds the special token <eos>").wait_for()
    assert tab.locator("img[onerror]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_on_a_phone_and_by_night(tab: Page, address: str, scheme: Literal["light", "dark"]) -> None:
    on_phone(tab)
    tab.emulate_media(color_scheme=scheme)
    open_page(tab, address)
    tab.locator("table tbody tr").first.click()
    tab.locator("#image img").wait_for()
    tab.get_by_role("button", name="Ask", exact=True).click()
    tab.locator("#answer-2 .answer").wait_for()
    assert overflow(tab) == 0
    for selector in ("h1", "#answer-1 .answer", "#answer-1 .token b", "#answer-1 .token small"):
        assert contrast(tab, selector) >= 4.5, selector


def test_the_server_forbids_pages_to_ask_elsewhere(address: str) -> None:
    with urlopen(address) as page:
        policy = page.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "http" not in policy


def test_an_exported_page_starts(address: str, run: Path, tmp_path: Path) -> None:
    """Its app.py as it is, but for the port; `address` is here for what it asks for."""
    command.main([str(run), "--export", str(tmp_path / "space"), "--dtype", "float32"])
    app, port = tmp_path / "space/app.py", free_port()
    app.write_text(app.read_text().replace('host="0.0.0.0"', f'host="127.0.0.1", port={port}'))
    with serving([sys.executable, "app.py"], app.parent, tmp_path / "said", port) as url, urlopen(url) as page:
        assert json.dumps(examples_of(run)[0].question) in page.read().decode()
