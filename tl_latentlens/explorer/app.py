"""A local page to read a model by hand: give a prompt or an image, click a token at a layer, read its neighbors, go on."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tl_latentlens.bank.bank import Bank
from tl_latentlens.errors import LatentLensError
from tl_latentlens.explorer.components import (
    ALL,
    ClientsideFunction,
    Dash,
    Input,
    Output,
    State,
    abort,
    make_server,
    request,
    set_props,
)
from tl_latentlens.explorer.image import SceneImages, Uploads, images_for
from tl_latentlens.explorer.layout import EXPORTS, layout, past_links
from tl_latentlens.explorer.page import Page
from tl_latentlens.explorer.reader import Reader
from tl_latentlens.index.contextual import ContextualIndex

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
) -> Dash:
    """The page as a Dash app; `app.run()` serves it, in a notebook it shows in the cell.

    Everything comes from this machine: no asset, font or figure is fetched from elsewhere.

    Args:
        model: The model of the bank; or what `load_demo_vlm` gives, which sees scenes.
        banks: An index, whose hook names and device are used, or what `ContextualIndex` takes.
        sae: An SAELens SAE, or what `load_sae` gives, whose features can be read.
        processor: What makes a vision-language model's inputs from images; None: the one that its bridge was loaded with.
        top_k: Neighbors, and tokens of the other lenses, of each token.
        loopback: Answer only where the page is opened at this machine's own address, and let it name vector files of this
            machine. False where others reach it.

    Raises:
        ModelMismatchError: The model is not the bank's.
        InvalidInputError: A processor for a model that reads text alone.
        MissingExtraError: dash is not installed (raised at import).
    """
    index = banks if isinstance(banks, ContextualIndex) else ContextualIndex(banks)
    images = images_for(model, processor)
    language_model = images.model.model if isinstance(images, SceneImages) else model
    page = Page(Reader(language_model, index, sae, top_k=top_k, images=images), files=loopback)
    app = Dash(
        __name__,
        title="tl-latentlens explore",
        update_title="",
        assets_folder=str(Path(__file__).with_name("assets")),
        on_error=_say,
        add_log_handler=False,
    )
    app.layout = partial(layout, page.reader, index.transform)
    _connect(app, page)
    _guard(app, loopback)
    return app


def serve(app: Dash, host: str, port: int, ready: Callable[[], None]) -> None:
    """Serve the page until it is interrupted, without a line for each request; `ready` is called once the port is held."""
    for name in ("werkzeug", "dash.dash"):
        logging.getLogger(name).setLevel(logging.ERROR)
    server = make_server(host, port, app.server, threaded=True)  # says where a port is taken, and exits
    ready()
    with suppress(KeyboardInterrupt):
        server.serve_forever()


def _say(error: Exception) -> None:
    """One line in the page in place of a stack trace."""
    known = isinstance(error, LatentLensError)
    set_props("message", {"children": str(error) if known else f"{type(error).__name__}: {error}".splitlines()[0]})


def _guard(app: Dash, loopback: bool) -> None:
    """The browser may load nothing from elsewhere, and other sites' pages may not talk to this one."""

    def refuse_strangers() -> None:
        host = urlsplit(f"//{request.host}").hostname
        foreign = request.method == "POST" and request.headers.get("Sec-Fetch-Site") == "cross-site"
        if foreign or (loopback and host not in LOOPBACK):
            abort(403)

    def keep_local(response: Any) -> Any:
        response.headers["Content-Security-Policy"] = _POLICY
        return response

    app.server.before_request(refuse_strangers)
    app.server.after_request(keep_local)


def _connect(app: Dash, page: Page) -> None:
    now = State("reading", "data")
    opened = [Output("reading", "data"), Output("cell", "data"), Output("prompt", "value"), Output("message", "children")]
    again = [Output(one.component_id, one.component_property, allow_duplicate=True) for one in opened]
    settings = [Input("transform", "value"), Input("layers", "value")]
    chosen = [State("transform", "value"), State("layers", "value")]
    app.callback(opened, Input("read", "n_clicks"), State("prompt", "value"), *chosen, now, prevent_initial_call=True)(
        page.read
    )
    app.callback(again, Input("decode", "n_clicks"), State("direction", "value"), *chosen, prevent_initial_call=True)(
        page.open_direction
    )
    app.callback(
        [*again, Output("upload", "contents")],
        Input("upload", "contents"),
        State("upload", "filename"),
        *chosen,
        prevent_initial_call=True,
    )(page.open_upload)
    links = Input({"link": ALL, "to": ALL}, "n_clicks")
    app.callback(again, links, State("history", "data"), *chosen, prevent_initial_call=True)(page.follow)
    app.callback(
        [Output(i, p) for i, p in (("title", "children"), ("grid-data", "data"), ("ends", "children"))]
        + [Output("message", "children", allow_duplicate=True)],
        Input("reading", "data"),
        Input("lens", "value"),
        *settings,
        prevent_initial_call=True,
    )(page.show)
    app.callback(
        Output("panel", "children"), Input("cell", "data"), now, Input("lens", "value"), settings[0], prevent_initial_call=True
    )(page.panel)
    app.callback(
        Output("history", "data"),
        Input("reading", "data"),
        Input("cell", "data"),
        State("history", "data"),
        prevent_initial_call=True,
    )(page.remember)
    app.callback(Output("past", "children"), Input("history", "data"))(past_links)
    app.callback(
        Output("download", "data"),
        [Input(f"save-{kind}", "n_clicks") for kind in EXPORTS],
        now,
        *chosen,
        prevent_initial_call=True,
    )(page.save)
    if page.reader.images is not None:
        app.callback(Output("picture", "data"), Input("reading", "data"), chosen[0], prevent_initial_call=True)(page.picture)
    if isinstance(page.reader.images, SceneImages):
        app.callback(again, Input("scene", "n_clicks"), *chosen, prevent_initial_call=True)(page.open_scene)
    if isinstance(page.reader.images, Uploads):
        given = [Input("image", "contents"), State("image", "filename"), State("prompt", "value")]
        app.callback(again, *given, *chosen, prevent_initial_call=True)(page.open_picture)
    app.clientside_callback(
        ClientsideFunction("explore", "draw"),
        [Input(name, "data") for name in ("grid-data", "cell", "picture")],
        prevent_initial_call=True,
    )
