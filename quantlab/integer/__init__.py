"""The same network with integers alone: a reference made to be read, and a fast executor."""

from quantlab.integer.network import to_integer
