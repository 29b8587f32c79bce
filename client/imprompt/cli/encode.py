"""`imprompt encode`: encode image prompts once, to use them in many requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from imprompt import Client
from imprompt.cli import console
from imprompt.cli.options import CONNECTION, only_bundle, with_options


@with_options(CONNECTION)
def encode(
    context: typer.Context,
    images: Annotated[list[str], typer.Argument(metavar="FILE", help="Image prompts for one adapter.")],
    adapter: Annotated[
        str | None, typer.Option(help="IP-Adapter to encode for (default: the one of the bundle, if it has only one).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Bundle to use (default: the one being served, if it is the only one).")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.npy).")] = Path("embeds.npy"),
    **connection: Any,
) -> None:
    """Encode image prompts into a file for `imprompt generate --ip-adapter-image-embeds`.

    The file holds float32 [2 (negative, positive), pictures, ...].
    """
    with console.reported_errors(context):
        console.check_file("output", output)
        if output.suffix.lower() != ".npy":
            console.fail(f"--output: {output.name}: embeddings must be saved as .npy")
        with Client(**connection) as client:
            model = model or only_bundle(client)
            adapter = adapter or _only_adapter(client, model)
            np.save(output, client.encode_image(model, adapter, images))
    console.print_path(output)


def _only_adapter(client: Client, model: str) -> str:
    names = [adapter["name"] for adapter in client.describe(model).get("ip_adapters", ())]
    if len(names) != 1:
        console.fail(f"--adapter: name one of the adapters of {model}: {', '.join(names) or 'it has none'}", status=2)
    return names[0]
