"""`python -m cvxq.cli`, for environments whose scripts are not on the path."""

from cvxq.cli import main

main()
