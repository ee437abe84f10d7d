"""A local page to read a model by hand: type a prompt, click a token at a layer, read its neighbors, go on from there."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tl_latentlens.bank import Bank
from tl_latentlens.errors import InvalidInputError, LatentLensError
from tl_latentlens.index import ContextualIndex
from tl_latentlens.results import LensResult
from tl_latentlens.views.explore_dash import (
    ALL,
    ClientsideFunction,
    Dash,
    Input,
    Output,
    State,
    abort,
    ctx,
    html,
    make_server,
    no_update,
    request,
    set_props,
)
from tl_latentlens.views.explore_grid import prompt_grid
from tl_latentlens.views.explore_layout import EXPORTS, layout, past_links
from tl_latentlens.views.explore_parts import cell_parts, ends, feature_chips, heading
from tl_latentlens.views.explore_reader import DirectionReading, Reader
from tl_latentlens.views.page import page as whole_page

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_CENTER = "A direction stands for what is above the mean; with the transform center the mean is taken away from the rows too."
_PAST = 50  # readings that can be gone back to
_POLICY = "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"


def make_app(
    model: Any,
    banks: ContextualIndex | Bank | str | Path | Sequence[Bank | str | Path],
    sae: Any = None,
    *,
    top_k: int = 10,
    loopback: bool = True,
) -> Dash:
    """The page as a Dash app; `app.run()` serves it, in a notebook it shows in the cell.

    Everything comes from this machine: no asset, font or figure is fetched from elsewhere.

    Args:
        model: The model of the bank.
        banks: An index, whose hook names and device are used, or what `ContextualIndex` takes.
        sae: An SAELens SAE, or what `load_sae` gives, whose features can be read.
        top_k: Neighbors, and tokens of the other lenses, of each token.
        loopback: Answer only where the page is opened at this machine's own address, and let it name vector files of this
            machine. False where others reach it.

    Raises:
        ModelMismatchError: The model is not the bank's.
        MissingExtraError: dash is not installed (raised at import).
    """
    index = banks if isinstance(banks, ContextualIndex) else ContextualIndex(banks)
    page = Page(Reader(model, index, sae, top_k=top_k), files=loopback)
    app = Dash(
        __name__,
        title="tl-latentlens explore",
        update_title="",
        assets_folder=str(Path(__file__).with_name("explore_assets")),
        on_error=_say,
        add_log_handler=False,
    )
    app.layout = partial(layout, page.reader, index.transform)
    _connect(app, page)
    _guard(app, loopback)
    return app


def serve(app: Dash, host: str, port: int) -> None:
    """Serve the page until it is interrupted, without a line for each request."""
    for name in ("werkzeug", "dash.dash"):
        logging.getLogger(name).setLevel(logging.ERROR)
    server = make_server(host, port, app.server, threaded=True)  # says where a port is taken, and exits
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


def _connect(app: Dash, page: "Page") -> None:
    now = State("reading", "data")
    opened = [Output("reading", "data"), Output("cell", "data"), Output("prompt", "value"), Output("message", "children")]
    again = [Output(one.component_id, one.component_property, allow_duplicate=True) for one in opened]
    settings = [Input("transform", "value"), Input("layers", "value")]
    chosen = [State("transform", "value"), State("layers", "value")]
    app.callback(opened, Input("read", "n_clicks"), State("prompt", "value"), *chosen, prevent_initial_call=True)(
        page.open_prompt
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
    app.clientside_callback(
        ClientsideFunction("explore", "draw"), Input("grid-data", "data"), Input("cell", "data"), prevent_initial_call=True
    )


class Page:
    """The callbacks. What is read is a dictionary: {"prompt": text}, {"feature": number} or {"vector": name}."""

    def __init__(self, reader: Reader, *, files: bool = True) -> None:
        """Without `files`, vector files of this machine cannot be named."""
        self.reader = reader
        self.files = files

    def open_prompt(self, _: Any, text: str | None, transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Read a prompt, its last token at the middle layer first."""
        result = self.reader.prompt(text or "", transform).result
        shown = self._shown(layers)
        cell = {"hook": shown[len(shown) // 2], "pos": int(result.positions[-1, 1])}
        return {"prompt": text}, cell, text, ""

    def open_direction(self, _: Any, what: str | None, transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Read a feature by its number, or a vector by its file."""
        what = (what or "").strip()
        if not what:
            raise InvalidInputError("nothing to decode: give the number of a feature, or a vector file")
        if "." in what or "/" in what:
            if not self.files:
                raise InvalidInputError("files of the server cannot be named from another machine; upload the vector")
            return self._open({"vector": self.reader.keep_vector(what)}, transform, layers)
        return self._open({"feature": self.reader.feature_number(what)}, transform, layers)

    def open_upload(self, contents: str | None, name: str, transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Read an uploaded vector; the upload is emptied, so that the same file can be given again."""
        if contents is None:
            return (no_update,) * 5
        try:
            return *self._open({"vector": self.reader.keep_upload(contents, name)}, transform, layers), None
        except LatentLensError as error:
            return no_update, no_update, no_update, str(error), None

    def follow(self, clicks: list[int | None], history: list[Any], transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Open what was clicked: a feature, a neighbor's text, or an earlier reading."""
        if not any(clicks) or not ctx.triggered[0]["value"]:  # links that have only just been shown
            return (no_update,) * 4
        clicked: Any = ctx.triggered_id
        return self.open_link(clicked["link"], clicked["to"], history, transform, layers)

    def open_link(self, link: str, to: int, history: list[Any], transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Open a feature by its number, the text of a row, or a place in the history."""
        if link == "feature":
            return self._open({"feature": to}, transform, layers)
        if link == "text":
            return self.open_prompt(None, self.reader.index(transform).row(to).prompt_text, transform, layers)
        past = history[to]
        cell = past["cell"] if past["cell"] and past["cell"]["hook"] in self.reader.hook_names else None
        return past["reading"], cell, past["reading"].get("prompt", no_update), ""

    def _open(self, reading: dict[str, Any], transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        self._direction(reading, transform, layers)
        return reading, None, no_update, ""

    def _direction(self, reading: dict[str, Any], transform: str, layers: Sequence[str]) -> DirectionReading:
        return self.reader.direction(reading["feature" if "feature" in reading else "vector"], transform, self._shown(layers))

    def _shown(self, layers: Sequence[str]) -> list[str]:
        """The chosen hook names in the index's order; all where none is chosen."""
        return [name for name in self.reader.hook_names if name in layers] or list(self.reader.hook_names)

    def show(self, reading: dict[str, Any] | None, lens: str, transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """The grid of a prompt, or title and both ends of a direction; and no message."""
        if reading is None:
            return (no_update,) * 4
        if "prompt" in reading:
            return "", prompt_grid(self.reader.prompt(reading["prompt"], transform), lens, self._shown(layers)), [], ""
        found = self._direction(reading, transform, layers)
        note = [html.P(_CENTER, className="note")] if transform == "raw" else []
        return [found.title, *note], None, ends(found, lens), ""

    def panel(self, cell: dict[str, Any] | None, reading: dict[str, Any] | None, lens: str, transform: str) -> list[Any]:
        """What was read at a cell; nothing where a direction is shown."""
        if cell is None or reading is None or "prompt" not in reading:
            return []
        read = self.reader.prompt(reading["prompt"], transform)
        return [
            *heading(read.result, cell["hook"], cell["pos"]),
            *cell_parts(read.result, cell["hook"], cell["pos"], lens),
            *feature_chips(self.reader.active_features(read, cell["pos"]), self.reader.sae_reads),
        ]

    def remember(self, reading: dict[str, Any] | None, cell: Any, history: list[Any] | None) -> Any:
        """Add a new reading at the end; of one that is there, note the cell."""
        if reading is None:
            return no_update
        history = history or []
        at = next((i for i, past in enumerate(history) if past["reading"] == reading), len(history))
        return [*history[:at], {"reading": reading, "cell": cell}, *history[at + 1 :]][-_PAST:]

    def save(self, *arguments: Any) -> Any:
        """The view as a file, as the button that was clicked asks."""
        if not any(arguments[: len(EXPORTS)]):
            return no_update
        return self.export(str(ctx.triggered_id).removeprefix("save-"), *arguments[len(EXPORTS) :])

    def export(self, kind: str, reading: dict[str, Any] | None, transform: str, layers: Sequence[str]) -> dict[str, str]:
        """Name and content of a file: csv or json of the hook names shown, or html of a whole prompt."""
        if reading is None:
            raise InvalidInputError("nothing was read yet; read a prompt first")
        if "prompt" in reading:
            result: Any = self.reader.prompt(reading["prompt"], transform).result
            frame = result.to_dataframe()
            frame = frame[frame["hook_name"].isin(self._shown(layers))]
        else:
            result = self._direction(reading, transform, layers).result
            frame = result.to_dataframe()
        if kind == "html":
            if not isinstance(result, LensResult):
                raise InvalidInputError("a direction is saved as CSV or JSON; HTML is for prompts")
            content = whole_page(result)
        else:
            content = frame.to_csv(index=False) if kind == "csv" else frame.to_json(orient="records", indent=1)
        return {"content": str(content), "filename": f"latentlens.{kind}"}
