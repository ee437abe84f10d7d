"""The explore page before anything is read: prompt, controls, and empty places for readings."""

from collections.abc import Sequence
from typing import Any

from tl_latentlens.explorer.examples import Example
from tl_latentlens.explorer.head import explore_head
from tl_latentlens.explorer.image_source import ImageSource
from tl_latentlens.explorer.reader import Reader
from tl_latentlens.explorer.scene_source import SceneSource
from tl_latentlens.explorer.web import dcc, html
from tl_latentlens.index.transforms import TRANSFORMS
from tl_latentlens.views.lens_names import LENSES
from tl_latentlens.views.page_head import PageHead
from tl_latentlens.views.text import hook_headings

EXPORTS = ("csv", "json", "html")
_MAX_UPLOAD_BYTES = 32 * 2**20
_INTRODUCTION = (
    "Type a prompt: each token is read at each layer by its nearest contexts in the bank. ",
    "Or decode a direction: a feature of the SAE, or a vector file.",
)
_ONE_EXAMPLE = "Or begin with a sentence of this bank:"
_UPLOAD_HINT = "Or give an image, dropped on the page or pasted: each patch of it is read so, with the prompt around it. "
_SCENE_HINT = "Or look at a scene: the model sees colored shapes, and each patch is read so. "


def layout(reader: Reader, transform: str, examples: Sequence[Example], call: str) -> Any:
    """The page before anything is read, with prompts to begin with, and the call that made it."""
    stores = [dcc.Store(id=name) for name in ("reading", "cell", "grid-data", "picture")]
    return html.Div(
        [
            *stores,
            dcc.Store(id="history", storage_type="session"),
            dcc.Download(id="download"),
            _header(explore_head(reader.index(transform), call)),
            _prompt_form(reader.images),
            _controls(reader, transform),
            html.P(id="message", className="message", role="alert"),
            html.Main(
                [
                    _view(reader.images, examples),
                    html.Aside(id="panel", className="panel"),
                    html.Div([html.H3("read before"), html.Ol(id="past")], className="past"),
                ]
            ),
        ],
        className="page",
    )


def _header(head: PageHead) -> Any:
    """The head as all pages have it, as Dash components."""
    facts = [html.Span([html.Small(name), f" {text}"]) for name, text in head.facts()]
    made_by = [html.P(["Made by ", html.Code(head.call)])] if head.call else []
    about = html.Details([html.Summary("How to read this page"), *map(html.P, head.notes), *made_by], className="about")
    parts = [html.H1(head.title), html.P(head.lead, className="lead"), html.P(facts, className="facts"), about]
    return html.Header(parts, className="head")


def _prompt_form(images: ImageSource | None) -> Any:
    read = html.Button("Read", id="read", type="button", className="primary")
    prompt = dcc.Textarea(id="prompt", placeholder="Type a prompt; Enter reads it", rows=2, spellCheck=False, autoFocus="true")
    return html.Form([prompt, html.Div([read, *_image_controls(images)], className="buttons")], className="ask")


def _controls(reader: Reader, transform: str) -> Any:
    """Lens, transform, layers, and the direction to decode."""
    hook_names = list(reader.hook_names)
    labels, _ = hook_headings(hook_names)
    hint = "feature, or vector file" if reader.sae is not None else "a vector file"
    direction = [
        html.Label("direction", htmlFor="direction"),
        dcc.Input(id="direction", placeholder=hint, type="text", autoComplete="off"),
        html.Button("Decode", id="decode", type="button"),
        dcc.Upload(html.Button("Upload…"), id="upload", max_size=_MAX_UPLOAD_BYTES, className="upload"),
    ]
    return html.Div(
        [
            _pills("lens", {info.label: info.switch for info in LENSES.values()}, LENSES["words"].label),
            _pills("transform", ("auto", *TRANSFORMS), transform),
            _pills("layers", dict(zip(hook_names, labels, strict=True)), hook_names),
            html.Div(direction, className="control"),
        ],
        className="controls",
    )


def _view(images: ImageSource | None, examples: Sequence[Example]) -> Any:
    """The place of the grid, and the buttons that save what it shows."""
    exports = [html.Button(kind.upper(), id=f"save-{kind}", type="button") for kind in EXPORTS]
    return html.Div(
        [
            html.Div(_introduction(images, examples), id="title", className="title"),
            html.Div(id="grid", className="grid"),
            html.Div(id="ends", className="ends"),
            html.Div(exports, className="save"),
        ],
        className="view",
    )


def _introduction(images: ImageSource | None, examples: Sequence[Example]) -> list[Any]:
    """What can be done, and prompts to begin with."""
    image_hint = "" if images is None else _SCENE_HINT if isinstance(images, SceneSource) else _UPLOAD_HINT
    parts: list[Any] = [html.P(image_hint.join(_INTRODUCTION))]
    if examples:
        parts += [
            html.P(f"Or begin with «{examples[0].word}» in two sentences of this bank:" if len(examples) > 1 else _ONE_EXAMPLE)
        ]
        links = [
            html.Button([one.before, html.Mark(one.word), one.after], id={"link": "example", "to": i}, className="example")
            for i, one in enumerate(examples)
        ]
        parts.append(html.Div(links, className="examples"))
    return parts


def _image_controls(images: ImageSource | None) -> list[Any]:
    """The button that chooses an image; nothing where the model reads text alone."""
    if images is None:
        return []
    if isinstance(images, SceneSource):
        return [html.Button("New scene", id="scene", type="button")]
    button = html.Button("Image…", type="button", title="read an image with this prompt; it can be dropped or pasted too")
    return [dcc.Upload(button, id="image", accept="image/*", max_size=_MAX_UPLOAD_BYTES, className="upload")]


def _pills(name: str, options: Sequence[str] | dict[str, str], value: str | list[str]) -> Any:
    labels = options if isinstance(options, dict) else {option: option for option in options}
    choices = [{"label": label, "value": option, "title": option} for option, label in labels.items()]
    control = dcc.Checklist if isinstance(value, list) else dcc.RadioItems
    return html.Div([html.Label(name), control(choices, value, id=name, className="pills")], className="control")


def past_links(history: list[Any] | None) -> list[Any]:
    """Links to earlier readings, the last on top. The tab of the browser keeps them when the page is loaded again."""
    links = [
        html.Li(html.Button(_reading_name(past["reading"]), id={"link": "past", "to": i}, className="link"))
        for i, past in enumerate(history or [])
    ]
    return links[::-1]


def _reading_name(reading: dict[str, Any]) -> str:
    if "image" in reading:
        return f"{reading['image']} {reading['text']}".strip()
    if "feature" in reading:
        return f"feature {reading['feature']}"
    return reading.get("prompt") or reading["vector"]
