"""What the explore page does when something is given, clicked or chosen: its callbacks, which a test can call too."""

from collections.abc import Sequence
from typing import Any

from tl_latentlens.errors import InvalidInputError, LatentLensError
from tl_latentlens.explorer.components import ctx, html, no_update
from tl_latentlens.explorer.grid import image_grid, prompt_grid
from tl_latentlens.explorer.image import SceneImages, Uploads
from tl_latentlens.explorer.layout import EXPORTS
from tl_latentlens.explorer.parts import cell_parts, ends, feature_chips, heading, patch_heading
from tl_latentlens.explorer.reader import DirectionReading, ImageReading, PromptReading, Reader, uploaded_bytes
from tl_latentlens.views.image import image_page, picture_uri
from tl_latentlens.vision.image_page import image_grid as read_image_grid

_CENTER = "A direction stands for what is above the mean; with the transform center the mean is taken away from the rows too."
_PAST = 50  # readings that can be gone back to


class Page:
    """The callbacks.

    What is read is a dictionary: {"prompt": text}, {"image": name, "text": prompt}, {"feature": number} or {"vector": name}.
    """

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

    def read(
        self, clicks: Any, text: str | None, transform: str, layers: Sequence[str], now: dict[str, Any] | None
    ) -> tuple[Any, ...]:
        """Read what was typed; where it has a place for an image, with the image that is shown."""
        images = self.reader.images
        if images is None or not images.asks_for_image(text or ""):
            return self.open_prompt(clicks, text, transform, layers)
        if now is None or "image" not in now:
            raise InvalidInputError("the prompt has a place for an image: choose one (Image…), or take the place out")
        return self.open_image(now["image"], text or "", transform, layers)

    def open_picture(
        self, contents: str | None, name: str, text: str | None, transform: str, layers: Sequence[str]
    ) -> tuple[Any, ...]:
        """Read an uploaded picture with what was typed."""
        if contents is None or not isinstance(self.reader.images, Uploads):
            return (no_update,) * 4
        key = self.reader.images.keep(uploaded_bytes(contents, name), name)
        return self.open_image(key, text or "", transform, layers)

    def open_scene(self, _: Any, transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Read a new scene."""
        if not isinstance(self.reader.images, SceneImages):
            return (no_update,) * 4
        return *self.open_image(self.reader.images.new(), "", transform, layers)[:2], no_update, ""

    def open_image(self, name: str, text: str, transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Read an image with a prompt, at the middle layer the patch first that is nearest to its neighbor."""
        images = self.reader.images
        text = images.prompt(text) if images is not None else text
        read, shown = self.reader.image(name, text, transform), self._shown(layers)
        hook_name = shown[len(shown) // 2]
        grid, similarities = read.seen.grid, read.result.found[hook_name].similarities[:, 0].cpu().numpy()
        at = {pos: similarities[i] for i, pos in enumerate(read.result.positions[:, 1].tolist())}
        finest = grid.positions[grid.is_patch & (grid.levels == grid.levels.max())].tolist()
        cell = {"hook": hook_name, "pos": max(finest, key=at.__getitem__)}
        return {"image": name, "text": text}, cell, text, ""

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
        typed = past["reading"].get("prompt") or past["reading"].get("text") or no_update
        return past["reading"], cell, typed, ""

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
        if "image" in reading:
            read = self.reader.image(reading["image"], reading["text"], transform)
            return read.seen.title, image_grid(read, reading["image"], lens, self._shown(layers)), [], ""
        found = self._direction(reading, transform, layers)
        note = [html.P(_CENTER, className="note")] if transform == "raw" else []
        return [found.title, *note], None, ends(found, lens), ""

    def picture(self, reading: dict[str, Any] | None, transform: str) -> dict[str, str] | None:
        """The picture of an image that is read, which is sent once for all lenses and layers."""
        if reading is None or "image" not in reading:
            return None
        read = self.reader.image(reading["image"], reading["text"], transform)
        return {"name": reading["image"], "uri": picture_uri(read.seen.picture)}

    def panel(self, cell: dict[str, Any] | None, reading: dict[str, Any] | None, lens: str, transform: str) -> list[Any]:
        """What was read at a cell; nothing where a direction is shown."""
        read = self._read(reading, transform)
        if cell is None or read is None:
            return []
        hook_name, pos = cell["hook"], cell["pos"]
        of_image = isinstance(read, ImageReading)
        return [
            *(patch_heading(read.seen, hook_name, pos) if of_image else heading(read.result, hook_name, pos)),
            *cell_parts(read.result, hook_name, pos, lens),
            *feature_chips(self.reader.active_features(read, pos), self.reader.sae_reads),
        ]

    def _read(self, reading: dict[str, Any] | None, transform: str) -> PromptReading | None:
        """A prompt or an image that is read; None where it is a direction, or nothing."""
        if reading is not None and "prompt" in reading:
            return self.reader.prompt(reading["prompt"], transform)
        if reading is not None and "image" in reading:
            return self.reader.image(reading["image"], reading["text"], transform)
        return None

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
        """Name and content of a file: csv or json of the hook names shown, or html of a whole prompt or image."""
        if reading is None:
            raise InvalidInputError("nothing was read yet; read a prompt first")
        read = self._read(reading, transform)
        result: Any = self._direction(reading, transform, layers).result if read is None else read.result
        if kind == "html":
            if read is None:
                raise InvalidInputError("a direction is saved as CSV or JSON; HTML is for prompts and images")
            seen = read.seen if isinstance(read, ImageReading) else None
            content = result.page() if seen is None else image_page(read_image_grid(result, seen.grid, seen.picture))
            return {"content": content, "filename": "latentlens.html"}
        frame = result.to_dataframe()
        if read is not None:
            frame = frame[frame["hook_name"].isin(self._shown(layers))]
        if isinstance(read, ImageReading):
            frame = frame.merge(
                read.seen.grid.to_dataframe()[["position", "level", "row", "column"]], left_on="pos", right_on="position"
            ).drop(columns="position")
        content = frame.to_csv(index=False) if kind == "csv" else frame.to_json(orient="records", indent=1)
        return {"content": str(content), "filename": f"latentlens.{kind}"}
