"""The `cvxq` command: one module per subcommand, imported only when that subcommand runs."""

from __future__ import annotations


def main() -> None:
    """Run the command line of this process and exit with a documented code."""
    from cvxq.cli.application import application, prepare_process

    prepare_process()
    application.main(prog_name="cvxq")
