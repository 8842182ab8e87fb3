"""The page: an image, a question, and what base and adapters answer, side by side. By gradio, an optional extra.

Everything that is computed stands in modules without gradio: answer.py, occlusion.py. The page loads nothing from
outside this server (no analytics, no fonts of others), and its Content-Security-Policy forbids it.
"""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from data.boxes import boxes_in
from data.drawing import draw_boxes
from data.images import open_image
from finetune.demo.answer import Answered, ask
from finetune.demo.examples import QUESTION, Example
from finetune.demo.networks import Network, Opened
from finetune.demo.occlusion import heat_map, occlusion_map

LOCAL = ("127.0.0.1", "localhost", "::1")
SHORTEST = 16  # tokens that an answer may have, also where trained ones are shorter: the base writes more
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:"
)
CSS = """
.tokens { display: flex; flex-wrap: wrap; gap: .3rem; margin: .4rem 0; }
.token { border: 1px solid var(--border-color-primary); border-radius: .3rem; padding: .1rem .4rem; }
.token { text-align: center; }
.token b { display: block; font-weight: 500; white-space: pre; } .token small { opacity: .75; }
.answer { font-size: 1.3rem; font-weight: 600; overflow-wrap: anywhere; }
"""
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}

Scope = MutableMapping[str, Any]
Server = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Scope], Awaitable[None]]], Awaitable[None]]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question as it was asked, and its answers by the network's name: what a heat map is made for."""

    image: str
    prompt: str
    answers: dict[str, Answered]


def library() -> ModuleType:
    """gradio, told to send nothing to anyone. Raises ValueError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise ValueError(
            "the demo needs gradio: pip install 'gradio>=6,<7', or pip install --editable '.[demo]' in the checkout"
        ) from error
    module: ModuleType = gradio
    return module


def serve(
    opened: Opened, examples: Sequence[Example], host: str = LOCAL[0], port: int = 7860, batch_size: int = 16
) -> None:
    """Show the page at an address, until it is interrupted.

    Raises:
        ValueError: gradio is not installed. OSError: the port is taken.
    """
    gradio = library()
    from starlette.middleware import Middleware  # comes with gradio

    page = build(opened, examples, batch_size)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
        theme=gradio.themes.Base(**FONTS),
        css=CSS,
        app_kwargs={"middleware": [Middleware(NothingFromOutside)]},
    )
    reached = "from this machine alone" if host in LOCAL else "by everyone who reaches this machine, without a password"
    print(f"the demo is at http://{host}:{port}, {reached}; Ctrl+C ends it", flush=True)
    page.block_thread()


class NothingFromOutside:
    """Adds the policy by which a browser asks no other server, whatever a page says."""

    def __init__(self, app: Server) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        async def with_policy(message: Scope) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def build(opened: Opened, examples: Sequence[Example], batch_size: int = 16) -> Any:
    """The page, as gradio's Blocks.

    batch_size: covered images at once on the device, for a heat map.
    """
    gr = library()
    networks = opened.networks
    names = " and ".join(network.name for network in networks[1:])
    with gr.Blocks(title=f"{names}: a demo", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(f"<h1>{html.escape(names)}, beside the base</h1>")
        state = gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                image = gr.Image(
                    elem_id="image", label="image", type="filepath", image_mode=None, sources=["upload", "clipboard"]
                )
                question = gr.Textbox(label="question", lines=1, max_lines=3)
                button = gr.Button("Ask", variant="primary")
                prompt, *sampling = settings(gr, opened)
            with gr.Column(scale=2, min_width=300):
                answers = list(answer_columns(gr, networks))
                with gr.Row():
                    grid = gr.Slider(2, 16, value=8, step=1, label="patches across", scale=2, min_width=160)
                    explain = gr.Button("Show what the answers depend on", scale=1, min_width=160)
                gr.Markdown(
                    "Each patch of the image is covered in grey in turn; bright is where that makes the same answer "
                    "less probable."
                )
                maps = list(map_columns(gr, networks))
        given = [image, question, prompt, *sampling]
        shown = [part for column in answers for part in column] + [part for column in maps for part in column]
        for event in (button.click, question.submit):
            event(asking(gr, networks), given, [state, *shown], concurrency_id="network", api_visibility="private")
        explained = [part for column in maps for part in column]
        explain.click(
            explaining(gr, networks, batch_size),
            [state, grid],
            explained,
            concurrency_id="network",
            api_visibility="private",
        )
        if examples:
            rows = [[str(one.image), one.question, one.prompt] for one in examples]
            gr.Examples(rows, [image, question, prompt], label="from the validation set", cache_examples=False)
    return page


def settings(gr: ModuleType, opened: Opened) -> list[Any]:
    """Prompt, temperature, top-p, seed and length, in this order."""
    with gr.Accordion("prompt and sampling", open=False):
        return [
            gr.Textbox(opened.prompt, label="prompt", info=f"{QUESTION} stands for the question"),
            gr.Slider(0, 2, value=0, step=0.05, label="temperature", info="0 takes the most likely token"),
            gr.Slider(
                0.05, 1, value=1, step=0.05, label="top-p", info="sample from the most likely tokens of this sum"
            ),
            gr.Number(0, label="seed", precision=0),
            gr.Slider(
                1, 256, value=min(256, max(SHORTEST, opened.max_new_tokens)), step=1, label="longest answer, in tokens"
            ),
        ]


def answer_columns(gr: ModuleType, networks: Sequence[Network]) -> Iterator[list[Any]]:
    """For each network a text with probabilities, and an image for boxes."""
    with gr.Row():
        for number, network in enumerate(networks):
            with gr.Column(min_width=220):
                gr.HTML(f"<h3>{html.escape(network.name)}</h3>")
                answer = gr.HTML(elem_id=f"answer-{number}")
                yield [answer, shown_image(gr, f"boxes-{number}", "boxes")]


def map_columns(gr: ModuleType, networks: Sequence[Network]) -> Iterator[list[Any]]:
    """For each network an image for the heat map, and a sentence about it."""
    with gr.Row():
        for number, network in enumerate(networks):
            with gr.Column(min_width=220):
                heat = shown_image(gr, f"map-{number}", network.name)
                yield [heat, gr.HTML(elem_id=f"depends-{number}")]


def shown_image(gr: ModuleType, name: str, label: str) -> Any:
    """A place for an image that is not there yet; no button that uploads it anywhere."""
    buttons = ["download", "fullscreen"]
    return gr.Image(elem_id=name, label=label, visible=False, interactive=False, format="png", buttons=buttons)


def asking(gr: ModuleType, networks: Sequence[Network]) -> Callable[..., list[Any]]:
    """What the button does: every network's answer, and no heat map yet."""

    def answer(
        image: str | None, question: str, prompt: str, temperature: float, top_p: float, seed: int, length: int
    ) -> list[Any]:
        with messages(gr):
            if image is None:
                raise ValueError("there is no image: drop one in, or choose an example below")
            whole = filled(prompt, question)
            asked = Asked(image, whole, {})
            shown: list[Any] = []
            for network in networks:
                found = ask(network, image, whole, int(length), temperature, top_p, int(seed or 0))
                asked.answers[network.name] = found
                shown += [answer_html(found), gr.update(**boxes_shown(network, image, found))]
            return [asked, *shown, *[gr.update(value=None, visible=False), ""] * len(networks)]

    return answer


def explaining(gr: ModuleType, networks: Sequence[Network], batch_size: int) -> Callable[..., list[Any]]:
    """What the second button does: a heat map for each network's answer."""

    def explain(asked: Asked | None, grid: int) -> list[Any]:
        with messages(gr):
            if asked is None:
                raise ValueError("there is no answer yet: ask a question first")
            shown: list[Any] = []
            for network in networks:
                ids = asked.answers[network.name].ids
                found = occlusion_map(network, asked.image, asked.prompt, ids, int(grid), batch_size)
                shown += [gr.update(value=heat_map(asked.image, found.falls), visible=True), found.sentence()]
            return shown

    return explain


@contextmanager
def messages(gr: ModuleType) -> Iterator[None]:
    """A person's mistake becomes a message on the page, as text: gradio would show HTML."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


def filled(prompt: str, question: str) -> str:
    """The whole prompt. ValueError where there is nothing to ask."""
    whole = prompt.replace(QUESTION, question.strip())
    if not whole.strip() or (QUESTION in prompt and not question.strip()):
        raise ValueError("there is no question: write one, such as: what is in the image?")
    return whole


def answer_html(answered: Answered) -> str:
    """An answer and its tokens with their probabilities; what the network wrote is escaped."""
    tokens = "".join(
        f'<span class="token"><b>{html.escape(token.text)}</b><small>{token.probability:.1%}</small></span>'
        for token in answered.tokens
    )
    text = html.escape(answered.text) or "(nothing)"
    cut = "" if answered.finished else "<small>It was cut off: the longest answer allowed is too short for it.</small>"
    return f'<div class="answer">{text}</div><div class="tokens">{tokens}</div>{cut}'


def boxes_shown(network: Network, image: str, answered: Answered) -> dict[str, Any]:
    """The image with the boxes of an answer, if that names any."""
    opened = open_image(image)
    boxes = boxes_in(answered.text, opened.size, network.processor.image_form.aspect)
    return {"value": draw_boxes(opened, boxes) if boxes else None, "visible": bool(boxes)}
