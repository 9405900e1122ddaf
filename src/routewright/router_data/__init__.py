"""Rows, labels, token ids and batches for training an encoder as a router.

Two shapes of training set meet here. `pair`: CoBench's JSON lines `question`, `llm_id`, `label`, one row a prompt and
model. `pool`: an outcome cache, one row a prompt with one soft label per model. Every row is checked before any weight
is loaded, and a bad one is named by file and line.
"""

from routewright.router_data.batches import SEPARATOR, LengthGroupedOrder, PadBatch, encode, with_labels
from routewright.router_data.examples import Examples, Source, load_examples
from routewright.router_data.labels import check_labels, check_soft_labels, class_weights, hold_out, positive_weights
from routewright.router_data.rows import PairData, pairs_of_table, read_pairs

__all__ = ["SEPARATOR", "Examples", "LengthGroupedOrder", "PadBatch", "PairData", "Source", "check_labels",
           "check_soft_labels", "class_weights", "encode", "hold_out", "load_examples", "pairs_of_table",
           "positive_weights", "read_pairs", "with_labels"]
