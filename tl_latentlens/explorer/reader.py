"""Readings for the explore page: prompts, images and directions, under each transform, kept once read. Knows no Dash."""

import base64
import binascii
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_latentlens.directions.decode import decode_directions
from tl_latentlens.directions.direction_result import DirectionResult
from tl_latentlens.directions.features.sae import can_encode, decoder_of, encode, hook_names_of
from tl_latentlens.directions.features.sae_fit import require_width, warn_of_other_model
from tl_latentlens.directions.vector_file import read_vector
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.explorer.feature_labels import FeatureLabels
from tl_latentlens.explorer.image_source import MAX_KEPT_IMAGES, ImageSource
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.lens.lens_hooks import latentlens_hooks
from tl_latentlens.lens.lenses import embedding_lens, logit_lens
from tl_latentlens.lens.result import LensResult
from tl_latentlens.model.flatten import flat_activation
from tl_latentlens.model.hook_names import check_hook_names
from tl_latentlens.model.hook_points import in_residual_stream
from tl_latentlens.model.readout import readout_problem
from tl_latentlens.model.repeated import repeated
from tl_latentlens.model.tokenize import run_input, tokenize
from tl_latentlens.search.queries import normalize_queries
from tl_latentlens.views.data import TokenReading
from tl_latentlens.vision.shown_image import ShownImage

_MAX_KEPT_PROMPTS = 64


@dataclass(frozen=True, eq=False)
class PromptReading:
    """A prompt read at every hook name of the index.

    Attributes:
        result: Readings of the lens hooks.
        activations: The SAE's input, [pos, d_in]; None without an SAE that encodes.
    """

    result: LensResult
    activations: Float[Tensor, "pos d_in"] | None


@dataclass(frozen=True, eq=False)
class ImageReading(PromptReading):
    """The visual tokens of an image, read at every hook name of the index.

    Attributes:
        image: The image.
    """

    image: ShownImage


@dataclass(frozen=True, eq=False)
class DirectionReading:
    """A direction and its opposite.

    Attributes:
        title: Name of the direction, and its length.
        result: Neighbors of both ends.
        lenses: Lens → tokens that it reads from both ends; empty where the vector is not of the residual stream.
    """

    title: str
    result: DirectionResult
    lenses: dict[str, TokenReading]


class Reader:
    """A model, its bank under each transform, and the readings made from them. Safe to call from several threads."""

    def __init__(
        self, model: Any, index: ContextualIndex, sae: Any = None, *, top_k: int = 10, images: ImageSource | None = None
    ) -> None:
        """Check that model, bank and SAE belong together; `images` is the source of images that the model can be shown.

        Raises:
            ModelMismatchError: The model is not the bank's.
            UnknownHookError: The SAE reads an activation that the model does not have.
            InvalidInputError: The SAE has another width than the activation.
        """
        index.check_model(model)
        self.model, self.sae, self.top_k, self.images = model, sae, top_k, images
        self.hook_names = index.hook_names
        settings = index.banks[0].plan.settings
        self.repeat, self.keep_special_tokens = settings.repeat, settings.keep_special_tokens
        self.sae_reads, self.sae_writes = (None, None) if sae is None else hook_names_of(sae)
        if sae is not None:
            if self.sae_writes in index.hook_names:
                require_width(sae, index, self.sae_writes)
            warn_of_other_model(sae, index, stacklevel=3)
        self.feature_labels = FeatureLabels(sae, self.sae_writes, partial(self.index, "center"))
        if self.sae_reads is not None:
            check_hook_names([self.sae_reads], model.hook_dict, type(model).__name__)
        self._lock = RLock()
        self.transform = "auto" if index.direction_transform != index.transform else index.transform
        self._indexes = {self.transform: index}
        if self.transform == "auto":
            self._indexes["center"] = index.for_directions
        self._vectors: dict[str, Float[Tensor, " d"]] = {}
        self._cached_prompt = lru_cache(_MAX_KEPT_PROMPTS)(self._read_prompt)
        self._cached_image = lru_cache(MAX_KEPT_IMAGES)(self._read_image)

    def index(self, transform: str) -> ContextualIndex:
        """The bank under a transform, made when it is first asked for."""
        with self._lock:
            if transform not in self._indexes:
                first = next(iter(self._indexes.values()))
                self._indexes[transform] = ContextualIndex(
                    first.banks,
                    first.hook_names,
                    first.device,
                    transform=transform,
                    verify=False,
                    allow_mismatch=first.allow_mismatch,
                )
            return self._indexes[transform]

    def prompt(self, text: str, transform: str) -> PromptReading:
        """A text at every hook name and token; the model runs once for each text and transform.

        Raises:
            InvalidInputError: An empty text, or one longer than the model reads.
        """
        if not text.strip():
            raise InvalidInputError("the prompt is empty; type a text and read it")
        if tokenize(self.model, [text], repeat=self.repeat).n_truncated:
            n_tokens = len(self.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            twice = ", twice, as the bank was built" if self.repeat else ""
            raise InvalidInputError(
                f"the prompt has {n_tokens:,} tokens; the model reads {self.model.cfg.n_ctx:,} with BOS{twice}: shorten it"
            )
        with self._lock:  # hooks of two runs at once would see each other
            return self._cached_prompt(text, transform)

    def _read_prompt(self, text: str, transform: str) -> PromptReading:
        if self.repeat:
            copies = repeated(self.model, text, keep_special_tokens=self.keep_special_tokens)
            run = partial(self.model.run_with_hooks, copies.tokens, attention_mask=copies.attention_mask)
            positions = copies.second_copy
        else:
            given = run_input(self.model, [text])
            run = partial(self.model.run_with_hooks, given.input, attention_mask=given.attention_mask)
            positions = None
        reading = PromptReading(*self._run_with_hooks(run, positions, transform))
        if not len(reading.result.positions):
            raise InvalidInputError("the prompt has no token that can be read, only special ones; type a text")
        return reading

    def image(self, name: str, prompt: str, transform: str) -> ImageReading:
        """An image at every hook name and visual token; the model runs once for each image, prompt and transform.

        Args:
            name: Name of the image in the source of images.
            prompt: The prompt, from `images.make_prompt`.
            transform: Transform of the index.

        Raises:
            InvalidInputError: The page's model reads text alone, or cannot be shown this image.
        """
        with self._lock:
            return self._cached_image(name, prompt, transform)

    def _read_image(self, name: str, prompt: str, transform: str) -> ImageReading:
        if self.images is None:
            raise InvalidInputError(f"{name} cannot be read: the model of this page reads text alone")
        image = self.images.load(name, prompt)
        return ImageReading(*self._run_with_hooks(image.run, image.mask, transform), image)

    def _run_with_hooks(
        self, run: Callable[..., Any], positions: Bool[Tensor, "batch pos"] | None, transform: str
    ) -> tuple[LensResult, Float[Tensor, "pos d_in"] | None]:
        """The readings of the lens hooks in a run, and the activations that the SAE reads."""
        captured: dict[str, Tensor] = {}
        hooks = latentlens_hooks(
            self.index(transform),
            top_k=self.top_k,
            logit_lens=readout_problem(self.model) is None,
            embedding_lens=True,
            positions=positions,
            model=self.model,
        )
        encoder_hooks = []
        if self.sae_reads is not None and can_encode(self.sae):
            encoder_hooks = [(self.sae_reads, partial(_capture, captured=captured))]
        with torch.no_grad():
            run(fwd_hooks=[*hooks, *encoder_hooks])
        activation = captured.get("activation")
        return hooks.result, None if activation is None else flat_activation("", activation, activation.shape[:2])[0]

    def active_features(self, reading: PromptReading, pos: int, max_features: int = 8) -> list[tuple[int, float]]:
        """Features of the SAE that are active at a token and their activations, the largest first."""
        if reading.activations is None:
            return []
        top = encode(self.sae, reading.activations[pos : pos + 1])[0].topk(min(max_features, len(decoder_of(self.sae))))
        return [(i, value) for i, value in zip(top.indices.tolist(), top.values.tolist(), strict=True) if value > 0]

    def feature_number(self, text: str) -> int:
        """The number of a feature of the SAE, from the text that was typed.

        Raises:
            InvalidInputError: There is no SAE, or it has no such feature.
        """
        if self.sae is None:
            raise InvalidInputError("no SAE was loaded: start the page with --sae, or give a vector file")
        n = len(decoder_of(self.sae))
        if not (text.strip().isdecimal() and int(text) < n):
            raise InvalidInputError(f"got feature {text.strip()!r}; the SAE has features 0 to {n - 1:,}")
        return int(text)

    def keep_vector(self, path: str | Path, name: str | None = None) -> str:
        """Read a vector file, check it, and keep it; returns the name by which `direction` takes it.

        Raises:
            InvalidInputError: No vector there, a width that no hook name has, NaN, inf or zero.
        """
        vector = read_vector(path)
        widths = sorted({index.d(hook_name) for index in self._indexes.values() for hook_name in self.hook_names})
        name = name or Path(path).name
        if len(vector) not in widths:
            raise InvalidInputError(f"{name} has width {len(vector)}; the bank has width {' or '.join(map(str, widths))}")
        is_finite = torch.isfinite(vector).all()
        if not is_finite or not vector.any():
            raise InvalidInputError(f"{name} {'is zero' if is_finite else 'holds NaN or inf'}: it has no direction")
        key = f"{name} #{hashlib.sha256(vector.numpy().tobytes()).hexdigest()[:6]}"
        self._vectors[key] = vector
        return key

    def keep_upload(self, contents: str, name: str) -> str:
        """Read the vector in an uploaded file, check it, and keep it, like `keep_vector`; see `uploaded_bytes`.

        Raises:
            InvalidInputError: The errors of `keep_vector`, or what came is no file.
        """
        data = uploaded_bytes(contents, name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"uploaded{Path(name).suffix}"
            path.write_bytes(data)
            try:
                return self.keep_vector(path, name)
            except InvalidInputError as error:
                raise InvalidInputError(str(error).replace(str(path), name)) from error.__cause__

    def direction(self, feature_or_name: int | str, transform: str, hook_names: Sequence[str]) -> DirectionReading:
        """Readings of a feature of the SAE, by its number, or of a kept vector, by its name, among some hook names.

        Raises:
            InvalidInputError: A vector that is not kept, a row of zeros, or a width that none of the hook names has.
        """
        if isinstance(feature_or_name, int):
            vector, hook_name = decoder_of(self.sae)[feature_or_name].detach().float().cpu(), self.sae_writes
            title = f"feature {feature_or_name}{f' of the SAE at {hook_name}' if hook_name else ''}"
        elif feature_or_name in self._vectors:
            vector, hook_name, title = self._vectors[feature_or_name], None, feature_or_name
        else:
            raise InvalidInputError(f"{feature_or_name} is not kept since the page was started again; give the file once more")
        normalize_queries(vector[None], len(vector), torch.device("cpu"))  # refuses a row of zeros before it is searched
        result = decode_directions(vector, self.index(transform), top_k=self.top_k, hook_name=list(hook_names), progress=False)
        lenses = {}
        if len(vector) == self.model.cfg.d_model and (hook_name is None or in_residual_stream(hook_name)):
            ends = torch.stack([vector, -vector])
            lenses = {"embedding_lens": embedding_lens(self.model, ends.to(self.model.W_E), self.top_k)}
            if readout_problem(self.model) is None:
                lenses = {"logit_lens": logit_lens(self.model, ends, self.top_k), **lenses}
        return DirectionReading(f"{title}, length {float(vector.norm()):.3g}", result, lenses)


def uploaded_bytes(contents: str, name: str) -> bytes:
    """The bytes of a file that a browser sent as a data URI.

    Raises:
        InvalidInputError: What came is no data URI.
    """
    try:
        return base64.b64decode(contents.partition(",")[2], validate=True)
    except binascii.Error as error:
        raise InvalidInputError(f"{name} did not arrive whole; upload it again") from error


def _capture(activation: Tensor, hook: Any, *, captured: dict[str, Tensor]) -> None:
    captured["activation"] = activation.detach()
