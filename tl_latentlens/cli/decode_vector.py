"""`tl-latentlens decode-vector`: read any vector, and what it steers to."""

from pathlib import Path
from typing import Annotated, Any

import typer
from jaxtyping import Float
from torch import Tensor

import tl_latentlens as tll
from tl_latentlens.cli.options import BankArgument, DataOptions, ModelOptions, hook_name_in_bank
from tl_latentlens.cli.output import command_line, console, note, print_tables, require_folders
from tl_latentlens.directions.features.sae import TensorSAE
from tl_latentlens.directions.features.sae_fit import require_width, warn_of_other_model
from tl_latentlens.directions.vector_file import read_vector
from tl_latentlens.errors import InvalidInputError


def decode_vector(
    bank: BankArgument,
    vector: Annotated[Path | None, typer.Argument(help="a file with one vector: .npy, .pt, .safetensors or .csv")] = None,
    *,
    model: ModelOptions,
    data: DataOptions,
    key: Annotated[str | None, typer.Option(help="which tensor of a .pt or .safetensors file; default: the first")] = None,
    positive: Annotated[
        Path | None, typer.Option(help="a file of prompts (one a line): the vector is their mean activation minus ...")
    ] = None,
    negative: Annotated[Path | None, typer.Option(help="... that of the prompts in this one, both at their last token")] = None,
    sae: Annotated[str | None, typer.Option(help="`demo`, a folder as SAELens saves it, or a safetensors file")] = None,
    feature: Annotated[int | None, typer.Option("--feature", "-f", help="the decoder row of this feature of the SAE")] = None,
    hook_name: Annotated[
        str | None,
        typer.Option(
            "--hook-name",
            "-n",
            help="activation of the prompts, and where --text is steered, or its layer; default: the SAE's own",
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(help="neighbors of each end")] = 5,
    transform: Annotated[
        str,
        typer.Option(
            help="`auto`: take each hook name's mean away from the rows, as a direction stands for what is above it, and read "
            "the steered stream raw; `raw`, or another: the same for both"
        ),
    ] = "auto",
    calibrate: Annotated[
        bool,
        typer.Option(help="say whether the neighbors of each end are nearer than those of random directions, and show one"),
    ] = True,
    text: Annotated[str | None, typer.Option(help="also add the vector while this text runs, and read its last token")] = None,
    multiple: Annotated[
        list[float] | None, typer.Option("--multiple", "-x", help="multiples to add, one option each; default: 0, 1, 2 and 4")
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            help="of the multiples: the `vector` as it is, or an `activation` of median length in its direction; default: "
            "`activation` for an SAE's row, else `vector`"
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="write a page to this file too: both ends of the vector, or with --text what the runs mean"),
    ] = None,
) -> None:
    """Read both ends of a vector by their nearest neighbors in a bank: of a file, of two sets of prompts, or of an SAE.

    Example: `tl-latentlens decode-vector demo.h5 --sae demo --feature 12 --text "They walked along the"`
    """
    _require_one_source(
        {"a vector file": [vector], "--positive with --negative": [positive, negative], "--sae with --feature": [sae, feature]}
    )
    require_folders(html)
    opened = tll.Bank.open(bank)
    hook_name = hook_name_in_bank(hook_name, opened)
    encoder = None if sae is None else tll.load_sae(sae, hook_name=hook_name)
    hook_name = hook_name or getattr(encoder, "hook_name", None)
    needs_model = positive is not None or text is not None
    if needs_model and hook_name is None:
        raise InvalidInputError("give the activation that the vector belongs to, for instance -n blocks.3.hook_resid_post")
    index = tll.ContextualIndex(opened, device=model.device, transform=transform)
    loaded = None
    if needs_model:
        loaded = model.load_for(opened)
        index.check_model(loaded)
    if positive is not None and negative is not None:
        direction = _difference_of_means(loaded, positive, negative, hook_name or "")
        title = f"{positive} − {negative} at {hook_name}"
    elif encoder is not None and feature is not None:
        direction, title = _decoder_row(encoder, feature, index), f"feature {feature} of {sae} at {hook_name}"
    else:
        direction, title = read_vector(vector or "", key=key), f"{vector}"
    result = tll.decode_directions(direction, index, top_k=top_k, calibrate=calibrate)
    steered = None
    if text is not None:
        unit = unit or ("vector" if sae is None else "activation")
        multiples = multiple or (0, 1, 2, 4)
        settings: dict[str, Any] = {"multiples": multiples, "unit": unit, "calibrate": calibrate, "model": loaded}
        steer = tll.SteeringLens(direction, index, hook_name or "", **settings)
        steered = steer.run(loaded, text)
    if html is not None:
        (result if steered is None else steered).to_html(html, call=command_line())
        note(f"wrote {html}")
    length = float(direction.norm())
    if data.as_json is None:
        _print_readings(title, length, result, steered)
        return
    tables = {"neighbors": result.to_dataframe()}
    if result.scores is not None:
        tables["directions"] = result.scores
    if result.random is not None:
        tables["random"] = result.random.to_dataframe()
    if steered is not None:
        tables["steered"] = steered.to_dataframe()
    print_tables(data.as_json, tables, vector=title, length=length, transform=result.transform)


def _require_one_source(arguments: dict[str, list[Any]]) -> None:
    """Check that the arguments of one source of the vector are given, all of them, and none of another.

    Raises:
        InvalidInputError: They are not.
    """
    given = {name: values for name, values in arguments.items() if any(value is not None for value in values)}
    if len(given) == 1 and None not in next(iter(given.values())):
        return
    got = f"{' and '.join(given)} together" if given else "none"
    if len(given) == 1:
        ((name, values),) = given.items()
        sides = list(zip(name.split(" with "), values, strict=True))
        has, lacks = (next(side for side, value in sides if (value is None) == is_none) for is_none in (False, True))
        got = f"{has} without {lacks}"
    raise InvalidInputError(
        f"a vector is needed: expected one of {', '.join(arguments)}; got {got}. For instance: "
        "tl-latentlens decode-vector demo.h5 vector.npy, or tl-latentlens decode-vector demo.h5 --sae demo --feature 12"
    )


def _difference_of_means(model: Any, positive: Path, negative: Path, hook_name: str) -> Float[Tensor, " d"]:
    sides = [list(tll.load_corpus(path)) for path in (positive, negative)]
    return tll.difference_of_means(model, sides[0], sides[1], hook_name)


def _decoder_row(encoder: TensorSAE, feature: int, index: tll.ContextualIndex) -> Float[Tensor, " d"]:
    require_width(encoder, index, None)
    warn_of_other_model(encoder, index)
    if not 0 <= feature < len(encoder.W_dec):
        raise InvalidInputError(f"got feature {feature}; the SAE has features 0 to {len(encoder.W_dec) - 1}")
    return encoder.W_dec[feature]


def _print_readings(title: str, length: float, result: tll.DirectionResult, steered: tll.SteeringResult | None) -> None:
    console.print(f"v: {title}, length {length:.3g}", markup=False, highlight=False)
    console.print(result.neighbors_to_rich(width=console.width))
    if steered is not None:
        console.print(steered.table(width=console.width))
