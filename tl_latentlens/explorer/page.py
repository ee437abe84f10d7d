"""The callbacks of the explore page: one for each thing that can be given, clicked or chosen. A test can call them too."""

from collections.abc import Sequence
from typing import Any

from tl_latentlens.errors import InvalidInputError, LatentLensError
from tl_latentlens.explorer.examples import Example, find_examples
from tl_latentlens.explorer.grid import image_grid, prompt_grid
from tl_latentlens.explorer.layout import EXPORTS
from tl_latentlens.explorer.parts import cell_parts, direction_notes, ends, feature_chips, heading, patch_heading
from tl_latentlens.explorer.reader import DirectionReading, ImageReading, PromptReading, Reader, uploaded_bytes
from tl_latentlens.explorer.scene_source import SceneSource
from tl_latentlens.explorer.upload_source import UploadSource
from tl_latentlens.explorer.web import dash
from tl_latentlens.views.image import picture_uri
from tl_latentlens.vision.image_page import patches_page

_MAX_HISTORY = 50  # readings


class Page:
    """The callbacks.

    A dictionary names a reading: {"prompt": text}, {"image": name, "text": prompt}, {"feature": number} or {"vector": name}.
    """

    def __init__(self, reader: Reader, *, files: bool = True) -> None:
        """With `files`, vector files of this machine can be named."""
        self.reader = reader
        self.files = files
        self.examples = find_examples(reader.index(reader.transform))

    def open_prompt(self, _: Any, text: str | None, transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Read a prompt, its last token at the middle layer first."""
        result = self.reader.prompt(text or "", transform).result
        return {"prompt": text}, self._middle_cell(int(result.positions[-1, 1]), layers), text, ""

    def open_example(self, example: Example, transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Read an example, its word at the middle layer first."""
        result = self.reader.prompt(example.text, transform).result
        tokens, positions = (result.tokens or [[]])[0], result.positions[:, 1].tolist()
        of_word = [pos for pos in positions if tokens[pos].strip() == example.word]
        pos = min(of_word or positions, key=lambda pos: abs(len("".join(tokens[positions[0] : pos])) - len(example.before)))
        return {"prompt": example.text}, self._middle_cell(pos, layers), example.text, ""

    def _middle_cell(self, pos: int, layers: Sequence[str]) -> dict[str, Any]:
        hook_names = self._chosen(layers)
        return {"hook": hook_names[len(hook_names) // 2], "pos": pos}

    def read(
        self, clicks: Any, text: str | None, transform: str, layers: Sequence[str], now: dict[str, Any] | None
    ) -> tuple[Any, ...]:
        """Read the typed prompt; where it has a place for an image, with the image that is shown."""
        images = self.reader.images
        if images is None or not images.has_placeholder(text or ""):
            return self.open_prompt(clicks, text, transform, layers)
        if now is None or "image" not in now:
            raise InvalidInputError("the prompt has a place for an image: choose one (Image…), or take the place out")
        return self.open_image(now["image"], text or "", transform, layers)

    def open_picture(
        self, contents: str | None, name: str, text: str | None, transform: str, layers: Sequence[str]
    ) -> tuple[Any, ...]:
        """Read an uploaded picture with the typed prompt."""
        if contents is None or not isinstance(self.reader.images, UploadSource):
            return (dash.no_update,) * 4
        key = self.reader.images.keep(uploaded_bytes(contents, name), name)
        return self.open_image(key, text or "", transform, layers)

    def open_scene(self, _: Any, transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Read a new scene."""
        if not isinstance(self.reader.images, SceneSource):
            return (dash.no_update,) * 4
        return *self.open_image(self.reader.images.random_name(), "", transform, layers)[:2], dash.no_update, ""

    def open_image(self, name: str, text: str, transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Read an image with a prompt; choose the patch with the highest similarity at the middle layer."""
        images = self.reader.images
        prompt = images.make_prompt(text) if images is not None else text
        read, hook_names = self.reader.image(name, prompt, transform), self._chosen(layers)
        hook_name = hook_names[len(hook_names) // 2]
        grid, similarities = read.image.grid, read.result.found[hook_name].similarities[:, 0].cpu().numpy()
        similarity_at = dict(zip(read.result.positions[:, 1].tolist(), similarities.tolist(), strict=True))
        finest = grid.positions[grid.is_patch & (grid.levels == grid.levels.max())].tolist()
        cell = {"hook": hook_name, "pos": max(finest, key=similarity_at.__getitem__)}
        return {"image": name, "text": prompt}, cell, prompt, ""

    def open_direction(self, _: Any, typed: str | None, transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Read a feature by its number, or a vector by its file."""
        typed = (typed or "").strip()
        if not typed:
            raise InvalidInputError("nothing to decode: give the number of a feature, or a vector file")
        if "." in typed or "/" in typed:
            if not self.files:
                raise InvalidInputError("files of the server cannot be named from another machine; upload the vector")
            return self._open({"vector": self.reader.keep_vector(typed)}, transform, layers)
        return self._open({"feature": self.reader.feature_number(typed)}, transform, layers)

    def open_upload(self, contents: str | None, name: str, transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Read an uploaded vector; the upload is emptied, so that the same file can be given again."""
        if contents is None:
            return (dash.no_update,) * 5
        try:
            return *self._open({"vector": self.reader.keep_upload(contents, name)}, transform, layers), None
        except LatentLensError as error:
            return dash.no_update, dash.no_update, dash.no_update, str(error), None

    def follow(self, clicks: list[int | None], history: list[Any], transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Open the link that was clicked: a feature, a neighbor's text, or an earlier reading."""
        if not any(clicks) or not dash.ctx.triggered[0]["value"]:  # links that have only just been shown
            return (dash.no_update,) * 4
        clicked = dash.ctx.triggered_id
        return self.open_link(clicked["link"], clicked["to"], history, transform, layers)

    def open_link(self, link: str, to: int, history: list[Any], transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """Open a feature by its number, an example, the text of a row, or a place in the history."""
        if link == "feature":
            return self._open({"feature": to}, transform, layers)
        if link == "example":
            return self.open_example(self.examples[to], transform, layers)
        if link == "text":
            return self.open_prompt(None, self.reader.index(transform).row(to).prompt_text, transform, layers)
        past = history[to]
        cell = past["cell"] if past["cell"] and past["cell"]["hook"] in self.reader.hook_names else None
        typed = past["reading"].get("prompt") or past["reading"].get("text") or dash.no_update
        return past["reading"], cell, typed, ""

    def _open(self, reading: dict[str, Any], transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        self._direction(reading, transform, layers)
        return reading, None, dash.no_update, ""

    def _direction(self, reading: dict[str, Any], transform: str, layers: Sequence[str]) -> DirectionReading:
        return self.reader.direction(reading["feature" if "feature" in reading else "vector"], transform, self._chosen(layers))

    def _chosen(self, layers: Sequence[str]) -> list[str]:
        """The chosen hook names in the index's order; all where none is chosen."""
        return [name for name in self.reader.hook_names if name in layers] or list(self.reader.hook_names)

    def show(self, reading: dict[str, Any] | None, lens: str, transform: str, layers: Sequence[str]) -> tuple[Any, ...]:
        """The grid of a prompt, or title and both ends of a direction; and no message."""
        if reading is None:
            return (dash.no_update,) * 4
        if "prompt" in reading:
            return "", prompt_grid(self.reader.prompt(reading["prompt"], transform), lens, self._chosen(layers)), [], ""
        if "image" in reading:
            read = self.reader.image(reading["image"], reading["text"], transform)
            return read.image.title, image_grid(read, reading["image"], lens, self._chosen(layers)), [], ""
        direction = self._direction(reading, transform, layers)
        return [direction.title, *direction_notes(direction.result)], None, ends(direction, lens), ""

    def picture(self, reading: dict[str, Any] | None, transform: str) -> dict[str, str] | None:
        """The picture of an image that is read. It is sent once for all lenses and layers."""
        if reading is None or "image" not in reading:
            return None
        read = self.reader.image(reading["image"], reading["text"], transform)
        return {"name": reading["image"], "uri": picture_uri(read.image.picture)}

    def panel(self, cell: dict[str, Any] | None, reading: dict[str, Any] | None, lens: str, transform: str) -> list[Any]:
        """The readings at a cell; nothing where a direction is shown."""
        read = self._read(reading, transform)
        if cell is None or read is None:
            return []
        hook_name, pos = cell["hook"], cell["pos"]
        is_patch = isinstance(read, ImageReading)
        return [
            *(patch_heading(read.image, hook_name, pos) if is_patch else heading(read.result, hook_name, pos)),
            *cell_parts(read.result, hook_name, pos, lens, is_patch=is_patch),
            *feature_chips(self.reader.active_features(read, pos), self.reader.sae_reads, self.reader.feature_labels.of),
        ]

    def _read(self, reading: dict[str, Any] | None, transform: str) -> PromptReading | None:
        """The readings of a prompt or an image; None for a direction, or where nothing is read."""
        if reading is not None and "prompt" in reading:
            return self.reader.prompt(reading["prompt"], transform)
        if reading is not None and "image" in reading:
            return self.reader.image(reading["image"], reading["text"], transform)
        return None

    def remember(self, reading: dict[str, Any] | None, cell: Any, history: list[Any] | None) -> Any:
        """The history with a new reading at its end; where the reading is in it already, with its cell changed."""
        if reading is None:
            return dash.no_update
        history = history or []
        place = next((i for i, past in enumerate(history) if past["reading"] == reading), len(history))
        return [*history[:place], {"reading": reading, "cell": cell}, *history[place + 1 :]][-_MAX_HISTORY:]

    def save(self, *arguments: Any) -> Any:
        """The view as a file, in the format of the button that was clicked."""
        if not any(arguments[: len(EXPORTS)]):
            return dash.no_update
        return self.export(str(dash.ctx.triggered_id).removeprefix("save-"), *arguments[len(EXPORTS) :])

    def export(self, kind: str, reading: dict[str, Any] | None, transform: str, layers: Sequence[str]) -> dict[str, str]:
        """Name and content of a file: csv or json of the hook names shown, or html of a whole prompt or image."""
        if reading is None:
            raise InvalidInputError("nothing was read yet; read a prompt first")
        read = self._read(reading, transform)
        result: Any = self._direction(reading, transform, layers).result if read is None else read.result
        if kind == "html":
            if read is None:
                raise InvalidInputError("a direction is saved as CSV or JSON; HTML is for prompts and images")
            image = read.image if isinstance(read, ImageReading) else None
            content = result.page() if image is None else patches_page(result, image.grid, image.picture)
            return {"content": content, "filename": "latentlens.html"}
        frame = result.to_dataframe()
        if read is not None:
            frame = frame[frame["hook_name"].isin(self._chosen(layers))]
        if isinstance(read, ImageReading):
            frame = frame.merge(
                read.image.grid.to_dataframe()[["position", "level", "row", "column"]], left_on="pos", right_on="position"
            ).drop(columns="position")
        content = frame.to_csv(index=False) if kind == "csv" else frame.to_json(orient="records", indent=1)
        return {"content": str(content), "filename": f"latentlens.{kind}"}
