"""`tl-latentlens label-sae`: name the features of an SAE."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import tl_latentlens as tll
from tl_latentlens.cli.option_groups import OptionGroup
from tl_latentlens.cli.options import BankArgument, DataOptions, ModelOptions, hook_name_in_bank
from tl_latentlens.cli.output import WRITERS, command_line, console, note, print_table, require_folders, require_writable
from tl_latentlens.directions.features.neuronpedia.names import SourceName
from tl_latentlens.directions.features.neuronpedia.server import find_api_key
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.heads import hook_point
from tl_latentlens.views.terminal.features import summary_table


@dataclass
class LabelModelOptions(ModelOptions):
    """The options of the model whose logit lens reads the directions."""

    model: Annotated[str | None, typer.Option("--model", "-m", help="also read each direction by this model's logit lens")] = (
        None
    )
    logit_lens: Annotated[
        bool, typer.Option("--logit-lens", help="also read each direction by the logit lens of the bank's own model")
    ] = False


@dataclass
class NeuronpediaOptions(OptionGroup):
    """Where the features go on Neuronpedia."""

    neuronpedia: Annotated[
        Path | None, typer.Option(help="write the files of a bulk import to Neuronpedia into this folder")
    ] = None
    neuronpedia_model: Annotated[str, typer.Option(help="the model's id on Neuronpedia, such as `gpt2-small`")] = ""
    neuronpedia_source: Annotated[str, typer.Option(help="layer and source set on Neuronpedia, such as `5-name-res-16k`")] = ""

    neuronpedia_upload: Annotated[
        Path | None,
        typer.Option(
            help="send the features to your source there (key: NEURONPEDIA_API_KEY); this file remembers what was sent"
        ),
    ] = None

    def check(self) -> None:
        """Check the ids and the key, before anything is computed.

        Raises:
            InvalidInputError: Neuronpedia does not take one, or files cannot be written there.
        """
        require_folders(self.neuronpedia_upload)
        if self.neuronpedia is not None and self.neuronpedia.is_file():
            raise InvalidInputError(f"got --neuronpedia {self.neuronpedia}, which is a file; expected a folder, or a new one")
        if self.neuronpedia is not None or self.neuronpedia_upload is not None:
            SourceName(self.neuronpedia_model, self.neuronpedia_source)
        if self.neuronpedia_upload is not None:
            find_api_key(None)

    def write(self, result: tll.FeatureResult) -> None:
        """Write and send what was asked for."""
        model_id, source = self.neuronpedia_model, self.neuronpedia_source
        if self.neuronpedia is not None:
            note(f"wrote {result.to_neuronpedia(self.neuronpedia, model_id=model_id, source=source)}")
        if self.neuronpedia_upload is not None:
            note(str(result.upload_to_neuronpedia(model_id, source, state=self.neuronpedia_upload)))


def label_sae(
    sae: Annotated[str, typer.Argument(help="`demo`, a folder as SAELens saves it, or a safetensors file")],
    bank: BankArgument,
    *,
    model: LabelModelOptions,
    data: DataOptions,
    neuronpedia: NeuronpediaOptions,
    feature: Annotated[
        list[int] | None, typer.Option("--feature", "-f", help="a feature; give it several times for several; default: all")
    ] = None,
    hook_name: Annotated[
        str | None,
        typer.Option("--hook-name", "-n", help="the activation that the SAE reads, or its layer, where it does not say"),
    ] = None,
    top_k: Annotated[int, typer.Option(help="neighbors and max-activating rows of each feature")] = 10,
    transform: Annotated[
        str,
        typer.Option(
            help="`auto`: take the hook name's mean away, as a decoder direction stands for what is above it; `raw`, or another"
        ),
    ] = "auto",
    rows: Annotated[int, typer.Option(help="lines of the table to print")] = 30,
    out: Annotated[
        Path | None, typer.Option(help="write the whole table, with contexts, to this .csv, .parquet or .json file")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="write a page of all features, to search, and with a card for each, to this file")
    ] = None,
) -> None:
    """Label the features of a sparse autoencoder by a bank's rows, with the figures that say which labels to believe.

    Example: `tl-latentlens label-sae demo demo.h5 --out features.parquet --html features.html`
    """
    require_writable(out)
    require_folders(html)
    neuronpedia.check()
    opened = tll.Bank.open(bank)
    encoder = tll.load_sae(sae, hook_name=hook_name_in_bank(hook_name, opened))
    written = encoder.hook_name_out or encoder.hook_name
    hook_names = [written] if written is not None and hook_point(written) in opened.hook_names else None
    index = tll.ContextualIndex(opened, hook_names, device=model.device, transform=transform)
    loaded = model.load_for(opened) if model.logit_lens or model.model is not None else None
    if loaded is not None:
        index.check_model(loaded)
    result = tll.label_features(encoder, index, feature, top_k=top_k, model=loaded)
    if out is not None:
        WRITERS[out.suffix](result.with_evidence(), out)
        note(f"wrote {out}")
    if html is not None:
        result.to_html(html, call=command_line())
        note(f"wrote {html}")
    neuronpedia.write(result)
    if data.as_json is not None:
        print_table(data.as_json, result.with_evidence())
        return
    console.print(result.to_rich(rows, width=console.width))
    console.print(result.label_counts(), highlight=False, markup=False)
    if len(result.table) > 1:
        console.print()
        console.print(summary_table(result.summary()))
