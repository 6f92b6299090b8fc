"""The same network with integers alone: a reference made to be read, and a fast executor."""

# ruff: noqa: F401
from quantlab.integer.network import to_integer
