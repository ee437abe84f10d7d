"""The explore page as a Dash app and a server: `make_app` joins reader, callbacks and layout; `serve` runs it."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tl_latentlens.bank.bank import Bank
from tl_latentlens.errors import InvalidInputError, LatentLensError
from tl_latentlens.explorer.head import with_shared_parts
from tl_latentlens.explorer.image_source import ImageSource
from tl_latentlens.explorer.layout import EXPORTS, layout, past_links
from tl_latentlens.explorer.page import Page
from tl_latentlens.explorer.reader import Reader
from tl_latentlens.explorer.scene_source import SceneSource
from tl_latentlens.explorer.upload_source import UploadSource
from tl_latentlens.explorer.web import dash, flask, serving
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.index.page_head import index_call
from tl_latentlens.vision.scenes.connector import SceneModel

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_POLICY = "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"


def make_app(
    model: Any,
    banks: ContextualIndex | Bank | str | Path | Sequence[Bank | str | Path],
    sae: Any = None,
    *,
    processor: Any = None,
    top_k: int = 10,
    loopback: bool = True,
    call: str = "",
) -> Any:
    """The page as a Dash app: `app.run()` serves it, and in a notebook shows it in the cell.

    Everything comes from this machine: no asset, font or figure is fetched from elsewhere.

    Args:
        model: The model of the bank; or the model that `load_demo_vlm` gives, which sees scenes.
        banks: An index, whose hook names and device are used, or what `ContextualIndex` takes.
        sae: An SAE whose features can be read, of SAELens or from `load_sae`.
        processor: The processor that makes a vision-language model's inputs from images; None: the one that its bridge was
            loaded with.
        top_k: Number of neighbors, and of tokens of the other lenses, of each token.
        loopback: Answer only where the page is opened at this machine's own address, and let it name vector files of this
            machine. Give False where others reach it.
        call: The command that made the page, for its head; empty: the call of this function.

    Raises:
        ModelMismatchError: The model is not the bank's.
        InvalidInputError: A processor for a model that reads text alone.
        MissingExtraError: dash is not installed.
    """
    require_dash()
    index = banks if isinstance(banks, ContextualIndex) else ContextualIndex(banks)
    images = image_source_for(model, processor)
    language_model = images.model.model if isinstance(images, SceneSource) else model
    page = Page(Reader(language_model, index, sae, top_k=top_k, images=images), files=loopback)
    app = dash.Dash(
        __name__,
        title="tl-latentlens explore",
        update_title="",
        assets_folder=str(Path(__file__).with_name("assets")),
        on_error=_show_error,
        add_log_handler=False,
    )
    app.index_string = with_shared_parts(app.index_string)
    app.layout = partial(
        layout, page.reader, page.reader.transform, page.examples, call or f"make_app(model, {index_call(index)})"
    )
    _connect(app, page)
    _guard(app, loopback)
    return app


def require_dash() -> None:
    """Check that Dash is installed, before anything slow is done.

    Raises:
        MissingExtraError: It is not.
    """
    _ = dash.Dash, serving.make_server


def image_source_for(model: Any, processor: Any = None) -> ImageSource | None:
    """The images that a model can be shown; None for a model that reads text alone.

    Args:
        model: A TransformerLens model, or the model that `load_demo_vlm` gives.
        processor: The processor of a vision-language model.

    Raises:
        InvalidInputError: A processor for a model without visual tokens.
    """
    if isinstance(model, SceneModel):
        return SceneSource(model)
    try:
        return UploadSource(model, processor)
    except InvalidInputError:
        if processor is not None:
            raise
        return None


def serve(app: Any, host: str, port: int, ready: Callable[[], None]) -> None:
    """Serve the page until it is interrupted, without a line for each request.

    Args:
        app: From `make_app`.
        host: Address to listen at.
        port: Port to listen at. Where it is taken, the server says so and ends the process.
        ready: Called once the port is held.
    """
    for name in ("werkzeug", "dash.dash"):
        logging.getLogger(name).setLevel(logging.ERROR)
    server = serving.make_server(host, port, app.server, threaded=True)
    ready()
    with suppress(KeyboardInterrupt):
        server.serve_forever()


def _show_error(error: Exception) -> None:
    """Show one line in the page in place of a stack trace."""
    is_own = isinstance(error, LatentLensError)
    message = str(error) if is_own else f"{type(error).__name__}: {error}".splitlines()[0]
    dash.set_props("message", {"children": message})


def _guard(app: Any, loopback: bool) -> None:
    """Let the browser load nothing from elsewhere, and refuse requests that come from pages of other sites."""

    def refuse_foreign_requests() -> None:
        request = flask.request
        host = urlsplit(f"//{request.host}").hostname
        is_cross_site = request.method == "POST" and request.headers.get("Sec-Fetch-Site") == "cross-site"
        if is_cross_site or (loopback and host not in LOOPBACK):
            flask.abort(403)

    def add_policy(response: Any) -> Any:
        response.headers["Content-Security-Policy"] = _POLICY
        return response

    app.server.before_request(refuse_foreign_requests)
    app.server.after_request(add_policy)


def _connect(app: Any, page: Page) -> None:
    """Register the callbacks of the page, each with the components that call it and that it changes."""
    _connect_what_opens(app, page)
    _connect_what_shows(app, page)
    _connect_history_and_exports(app, page)
    app.clientside_callback(
        dash.ClientsideFunction("explore", "draw"),
        [dash.Input(name, "data") for name in ("grid-data", "cell", "picture")],
        prevent_initial_call=True,
    )


def _settings() -> list[Any]:
    """Transform and layers as they are when something is clicked."""
    return [dash.State("transform", "value"), dash.State("layers", "value")]


def _opened(**options: Any) -> list[Any]:
    """The components that a new reading changes."""
    properties = (("reading", "data"), ("cell", "data"), ("prompt", "value"), ("message", "children"))
    return [dash.Output(component, name, **options) for component, name in properties]


def _connect_what_opens(app: Any, page: Page) -> None:
    """Prompts, directions, images and links: each opens a reading."""
    prompt, reading = dash.State("prompt", "value"), dash.State("reading", "data")
    direction, upload = dash.State("direction", "value"), dash.Input("upload", "contents")
    links = dash.Input({"link": dash.ALL, "to": dash.ALL}, "n_clicks")
    opened = partial(_opened, allow_duplicate=True)
    register = partial(app.callback, prevent_initial_call=True)
    register(_opened(), dash.Input("read", "n_clicks"), prompt, *_settings(), reading)(page.read)
    register(opened(), dash.Input("decode", "n_clicks"), direction, *_settings())(page.open_direction)
    emptied = dash.Output("upload", "contents")
    register([*opened(), emptied], upload, dash.State("upload", "filename"), *_settings())(page.open_upload)
    register(opened(), links, dash.State("history", "data"), *_settings())(page.follow)
    if isinstance(page.reader.images, SceneSource):
        register(opened(), dash.Input("scene", "n_clicks"), *_settings())(page.open_scene)
    if isinstance(page.reader.images, UploadSource):
        image = dash.Input("image", "contents")
        register(opened(), image, dash.State("image", "filename"), prompt, *_settings())(page.open_picture)


def _connect_what_shows(app: Any, page: Page) -> None:
    """Grid, panel and picture follow the reading, the chosen cell, the lens, the transform and the layers."""
    reading, cell = dash.Input("reading", "data"), dash.Input("cell", "data")
    lens, transform, layers = (dash.Input(name, "value") for name in ("lens", "transform", "layers"))
    shown = [dash.Output(*output) for output in (("title", "children"), ("grid-data", "data"), ("ends", "children"))]
    register = partial(app.callback, prevent_initial_call=True)
    message = dash.Output("message", "children", allow_duplicate=True)
    register([*shown, message], reading, lens, transform, layers)(page.show)
    register(dash.Output("panel", "children"), cell, dash.State("reading", "data"), lens, transform)(page.panel)
    if page.reader.images is not None:
        register(dash.Output("picture", "data"), reading, dash.State("transform", "value"))(page.picture)


def _connect_history_and_exports(app: Any, page: Page) -> None:
    history = dash.State("history", "data")
    app.callback(
        dash.Output("history", "data"),
        dash.Input("reading", "data"),
        dash.Input("cell", "data"),
        history,
        prevent_initial_call=True,
    )(page.remember)
    app.callback(dash.Output("past", "children"), dash.Input("history", "data"))(past_links)
    app.callback(
        dash.Output("download", "data"),
        [dash.Input(f"save-{kind}", "n_clicks") for kind in EXPORTS],
        dash.State("reading", "data"),
        *_settings(),
        prevent_initial_call=True,
    )(page.save)
