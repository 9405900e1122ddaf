"""Routewright: train, score and serve cost-aware LLM routers.

Importing the package is quick, offline and needs no key; weights, clients and GPUs appear inside functions.
"""

__version__ = "0.1.0"
