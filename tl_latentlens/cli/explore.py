"""`tl-latentlens explore`: serve the local page."""

from typing import Annotated

import typer

import tl_latentlens as tll
from tl_latentlens.cli.image_model import ImageModelOptions
from tl_latentlens.cli.options import BankArgument, HookOption
from tl_latentlens.cli.output import command_line, console, note
from tl_latentlens.explorer import app as explorer_app


def explore(
    bank: BankArgument,
    *,
    model: ImageModelOptions,
    sae: Annotated[
        str | None,
        typer.Option(help="an SAE whose features can be read: `demo`, a folder as SAELens saves it, or a safetensors file"),
    ] = None,
    hook_name: HookOption = None,
    transform: Annotated[str, typer.Option(help="the transform that is shown first; the page switches it")] = "auto",
    top_k: Annotated[int, typer.Option(help="neighbors for each token and hook name")] = 10,
    port: Annotated[int, typer.Option(help="of the page")] = 8050,
    host: Annotated[
        str, typer.Option(help="address to serve; any but this machine's own lets others use the page")
    ] = "127.0.0.1",
) -> None:
    """Serve a local page: type a prompt, click a token at a layer, read its neighbors, follow features and vectors.

    With a vision-language model it takes images too, and shows what each patch is near to.

    Example: `tl-latentlens explore demo.h5 --sae demo`
    """
    explorer_app.require_dash()
    encoder = None if sae is None else tll.load_sae(sae)
    index = tll.ContextualIndex(bank, hook_name, device=model.device, transform=transform)
    loaded = model.load_for(index.banks[0])
    loopback = host in explorer_app.LOOPBACK
    page = explorer_app.make_app(loaded, index, encoder, top_k=top_k, loopback=loopback, call=command_line())

    def ready() -> None:
        address = f"[{host}]" if ":" in host else host
        console.print(f"http://{address}:{port}   (Ctrl+C ends it)", markup=False, highlight=False)
        if host not in explorer_app.LOOPBACK:
            note("whoever reaches this port can use the page; there is no password", "note")

    explorer_app.serve(page, host, port, ready)
