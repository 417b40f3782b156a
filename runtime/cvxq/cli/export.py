"""`cvxq export`: the folder that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path

import click

from cvxq.cli.options import model_file


@click.command("export", short_help="Write the folder that transformers and vLLM load.")
@click.argument("file")
@click.argument("folder", type=click.Path(path_type=Path))
def command(file: str, folder: Path) -> None:
    """Write FILE as a FOLDER that transformers and vLLM load, its weights packed.

    For transformers, `import cvxq.transformers` comes first; without it loading fails. vLLM finds
    cvxq by itself. The folder holds the file itself, as a hard link where the disk can, so that the
    rest takes little room.

    \b
    Example:
      cvxq export model.cvxq folder
    """
    path = model_file(file)
    from cvxq.export import export

    export(path, folder)
    click.echo(f"{folder}: written, for `import cvxq.transformers` and from_pretrained", err=True)
