"""Depths → codes, scales, level tables; then the corrections that cost no codes."""
