"""From an address to its store. The client library is an extra, and imported here, late."""

from __future__ import annotations

import importlib

from holdfast.training.errors import InputError
from holdfast.training.storage.address import Address
from holdfast.training.storage.protocol import ObjectStore

EXTRA = "pip install 'holdfast[bucket]'"


def open_store(address: Address) -> ObjectStore:
    """The store of an address. Nothing is asked of the server yet; not to be used after ``fork``.

    Raises InputError where the extra is not installed, or the environment says what cannot be.
    """
    try:
        module = importlib.import_module("holdfast.training.storage.bucket")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "obstore":
            raise
        raise InputError(
            f"{address} is a bucket, which needs obstore, and that is not installed: {EXTRA}"
        ) from None
    store: ObjectStore = module.Bucket(address)
    return store
