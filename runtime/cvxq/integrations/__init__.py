"""What lets other programs use a `.cvxq` file; each part needs the program that it is for."""
