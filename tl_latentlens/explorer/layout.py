"""The explore page before anything is read: prompt, controls, and empty places for readings."""

from collections.abc import Sequence
from typing import Any

from tl_latentlens.explorer.image_source import ImageSource
from tl_latentlens.explorer.reader import Reader
from tl_latentlens.explorer.scene_source import SceneSource
from tl_latentlens.explorer.web import dcc, html
from tl_latentlens.index.transforms import TRANSFORMS
from tl_latentlens.views.lens_names import LENSES
from tl_latentlens.views.text import hook_headings

EXPORTS = ("csv", "json", "html")
_MAX_UPLOAD_BYTES = 32 * 2**20
_INTRODUCTION = (
    "Type a prompt: each token is read at each layer by its nearest contexts in the bank. ",
    "Or decode a direction: a feature of the SAE, or a vector file.",
)
_UPLOAD_HINT = "Or give an image, dropped on the page or pasted: each patch of it is read so, with the prompt around it. "
_SCENE_HINT = "Or look at a scene: the model sees colored shapes, and each patch is read so. "


def layout(reader: Reader, transform: str) -> Any:
    """The page before anything is read."""
    stores = [dcc.Store(id=name) for name in ("reading", "cell", "grid-data", "picture")]
    return html.Div(
        [
            *stores,
            dcc.Store(id="history", storage_type="session"),
            dcc.Download(id="download"),
            html.Header([html.H1("tl-latentlens explore"), html.P(_about(reader, transform))]),
            _prompt_form(reader.images),
            _controls(reader, transform),
            html.P(id="message", className="message", role="alert"),
            html.Main(
                [
                    _view(reader.images),
                    html.Aside(id="panel", className="panel"),
                    html.Div([html.H3("read before"), html.Ol(id="past")], className="past"),
                ]
            ),
        ],
        className="page",
    )


def _about(reader: Reader, transform: str) -> str:
    """Model, rows and hook names in one line."""
    index, (_, kind) = reader.index(transform), hook_headings(list(reader.hook_names))
    info, hook_names = index.model_info, kind or f"{len(reader.hook_names)} hook names"
    return f"{info.name}, {info.n_layers} layers · {index.n_rows:,} contextual tokens · {hook_names}"


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


def _view(images: ImageSource | None) -> Any:
    """The place of the grid, and the buttons that save what it shows."""
    exports = [html.Button(kind.upper(), id=f"save-{kind}", type="button") for kind in EXPORTS]
    return html.Div(
        [
            html.Div(_introduction(images), id="title", className="title"),
            html.Div(id="grid", className="grid"),
            html.Div(id="ends", className="ends"),
            html.Div(exports, className="save"),
        ],
        className="view",
    )


def _introduction(images: ImageSource | None) -> str:
    image_hint = "" if images is None else _SCENE_HINT if isinstance(images, SceneSource) else _UPLOAD_HINT
    return image_hint.join(_INTRODUCTION)


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
