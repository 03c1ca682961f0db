"""Let go of a head whose holder is presumed dead, for the one who comes next."""

from __future__ import annotations

import secrets
from dataclasses import replace

from holdfast.training.storage.protocol import ObjectStore, Unchanged
from holdfast.training.tiers.head import head_key, read_head


def let_go_of_dead(store: ObjectStore, name: str, tag: str, unchanged_s: float) -> bool:
    """Release the head of a run, so that its next holder need not watch it once more.

    A holder that lives nevertheless takes it back with its next renewal, unless somebody else was
    faster; then it has lost it, as to any other.

    Args:
        store: the bucket.
        name: ``experiment/run_id``.
        tag: of the head that was watched.
        unchanged_s: how long that was seen not to change, by one clock and without a gap.

    Returns whether that was done: it was held, watched for the time of its lease, and is still the
    same. Raises StorageError or InputError.
    """
    known = read_head(store, name)
    if known is None or known[1] != tag:
        return False
    head = known[0]
    if head.is_released or unchanged_s <= head.ttl_s:
        return False
    released = replace(head, is_released=True, nonce=secrets.token_hex(8))
    return store.put(head_key(name), released.to_bytes(), Unchanged(tag)) is not None
