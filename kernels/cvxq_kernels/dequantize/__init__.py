"""Expand packed codes to weights.

`reference` does it with plain torch operations on any device; it is what the CPU runtime uses
and what faster versions are checked against, bit for bit.
"""
