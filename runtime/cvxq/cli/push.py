"""`cvxq push`: a `.cvxq` file onto the Hugging Face hub."""

from __future__ import annotations

import click

from cvxq.cli.options import model_file


@click.command("push", short_help="Put a file onto the Hugging Face hub, with a card.")
@click.argument("file")
@click.argument("repo", metavar="USER/REPO")
@click.option("--base", metavar="ID", help="Hub id of the original, where FILE does not say.")
@click.option("--private", is_flag=True, help="Of a repository that is made now.")
def command(file: str, repo: str, base: str | None, private: bool) -> None:
    """Put FILE onto the Hugging Face hub as USER/REPO, which is made if need be.

    It goes there as the folder that cvxq export writes, so that cvxq and transformers both load
    it, with a model card: what FILE itself says of its rate, its losses and its making. A card that
    somebody else has written stays. Log in with `hf auth login` first.

    \b
    Example:
      cvxq push model.cvxq me/SmolLM2-135M-Instruct-cvxq --base HuggingFaceTB/SmolLM2-135M-Instruct
    """
    path = model_file(file)
    from cvxq_format.unfinished import temporary_folder

    from cvxq.card import base_of, model_card
    from cvxq.export import export_rest
    from cvxq.hub import upload
    from cvxq.summary import summarize

    summary = summarize(path)
    base = base or base_of(summary)
    if base is None:
        click.echo("the card names no base model; give its hub id with --base", err=True)
    card = model_card(summary, repo, base)
    with temporary_folder("cvxq-push") as folder:
        export_rest(path, folder)
        result = upload(path, folder, repo, card, private=private)
    if not result.card_written:
        click.echo("README.md of the repository is not of cvxq push, and stays as it is", err=True)
    click.echo(result.url)
