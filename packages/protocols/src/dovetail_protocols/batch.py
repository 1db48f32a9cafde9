"""Batches: any pytree whose leaves share the leading batch axis, and the convention for language models.

A row is read with T+1 tokens and split into T inputs and T targets, so that no target is lost at a row's end.
Segment 0 is padding. Masks come from segments and roles, never from comparing tokens with a padding id.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["LMBatch", "batch_size", "pad_choices", "split_rows"]


class LMBatch(NamedTuple):
    """One batch of token rows, a pytree of arrays of shape ``[batch, time]``, or None where one is not there.

    Attributes:
        tokens: int32 inputs.
        targets: int32, the token after each input.
        loss_weights: float32, how much each target counts; 0 where it must not be learned.
        positions: int32, the position inside the document, used by rotary embeddings.
        segment_ids: int32, equal for tokens that may attend to each other, 0 for padding.
        choices: int32 ``[batch, time, layers, k]``, the experts that tokens chose before, as when a sampler's tokens
            are trained on (router replay, arXiv:2510.11370), -1 where a token chooses now; None where all do.
    """

    tokens: Any
    targets: Any
    loss_weights: Any
    positions: Any
    segment_ids: Any
    choices: Any = None


def split_rows(rows: Any, segment_ids: Any = None, positions: Any = None, loss_weights: Any = None) -> LMBatch:
    """Split rows of T+1 tokens into a batch of T inputs and T targets (NumPy arrays on the host).

    Args:
        rows: integers ``[batch, T+1]``.
        segment_ids: ``[batch, T+1]``, default one segment per row. A target whose segment differs from its input's,
            or is 0, gets weight 0: the last token of a document has no target.
        positions: ``[batch, T+1]``, default 0..T in every row.
        loss_weights: ``[batch, T+1]``, the weight of each token *as a target*, default 1.

    Raises:
        ValueError: `rows` is not two-dimensional with at least two columns, or another array has another shape.
    """
    rows = np.asarray(rows)
    if rows.ndim != 2 or rows.shape[1] < 2 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"rows have shape {rows.shape} and dtype {rows.dtype}; expected integers [batch, T+1], T >= 1")
    segments = np.ones(rows.shape, np.int32) if segment_ids is None else np.asarray(segment_ids, np.int32)
    places = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape) if positions is None else positions
    weights = np.ones(rows.shape, np.float32) if loss_weights is None else np.asarray(loss_weights, np.float32)
    for name, array in (("segment_ids", segments), ("positions", places), ("loss_weights", weights)):
        if np.shape(array) != rows.shape:
            raise ValueError(f"{name} has shape {np.shape(array)}; expected that of rows, {rows.shape}")
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return LMBatch(
        tokens=np.ascontiguousarray(rows[:, :-1], np.int32),
        targets=np.ascontiguousarray(rows[:, 1:], np.int32),
        loss_weights=np.where(same, weights[:, 1:], np.float32(0)),
        positions=np.ascontiguousarray(places[:, :-1], np.int32),
        segment_ids=np.ascontiguousarray(segments[:, :-1]),
    )


def pad_choices(experts: Sequence[Any], time: int) -> Any:
    """Return `LMBatch.choices` of rows that begin with a prompt and its reply (a NumPy array on the host).

    Args:
        experts: of each row, `Completion.experts`, int ``[layers, tokens, k]``; None for a row without.
        time: tokens of a row; those after the reply choose now.

    Raises:
        ValueError: more than `time` tokens, rows of other layers or another k, or no row with experts.

    >>> pad_choices([np.zeros((2, 3, 1), int), None], time=4)[:, :, 0, 0]
    array([[ 0,  0,  0, -1],
           [-1, -1, -1, -1]], dtype=int32)
    """
    known = {row: np.asarray(found) for row, found in enumerate(experts) if found is not None}
    shapes = [found.shape for found in known.values()]
    same = len({(shape[0], *shape[2:]) for shape in shapes if shape}) == 1
    if not same or any(len(shape) != 3 or shape[1] > time for shape in shapes):
        raise ValueError(
            f"experts have the shapes {shapes}; expected one [layers, tokens, k] or more, of the same layers and k, "
            f"with at most time={time} tokens"
        )
    layers, _, k = shapes[0]
    choices = np.full((len(experts), time, layers, k), -1, np.int32)
    for row, found in known.items():
        choices[row, : found.shape[1]] = found.transpose(1, 0, 2)
    return choices


def batch_size(batch: Any) -> int:
    """Return the length of the leading axis that all leaves share.

    Raises:
        ValueError: the batch has no leaves, a leaf is a scalar, or the leading axes differ.
    """
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(batch)
    sizes = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
    if not sizes:
        raise ValueError("the batch has no array leaves; expected at least one [batch, ...] array")
    first = next(iter(sizes.values()))
    if any(not shape or shape[0] != first[0] for shape in sizes.values()):
        raise ValueError(f"the leaves of a batch share their leading axis; got the shapes {sizes}")
    return first[0]
