"""A real object store as a place for records: as much of a store as aliases need, and faults on the way to it.

This release keeps repositories in directories only, so it is here and not in the package.
"""

import random

import obstore
from obstore.store import S3Store

from peakpoint.errors import ConflictError, NotFoundError, TransientStoreError


class Bucket:
    """Bytes under keys in a bucket.

    Args:
        url: of the server, such as ``http://127.0.0.1:8333``.
        name: of the bucket, which the server makes with the first key.
    """

    def __init__(self, url, name, key="testkey", secret="testsecret"):
        options = {"access_key_id": key, "secret_access_key": secret, "region": "us-east-1"}
        self.location = f"{url}/{name}"
        self._store = S3Store(
            name, endpoint=url, client_options={"allow_http": True}, virtual_hosted_style_request=False, **options
        )

    def create(self, key, data):
        try:
            obstore.put(self._store, key, data, mode="create")
        except obstore.exceptions.AlreadyExistsError as error:
            raise ConflictError(f"{key} already exists in {self.location}") from error
        except obstore.exceptions.BaseError as error:
            raise TransientStoreError(str(error)) from error

    def put(self, key, chunks):
        try:
            obstore.put(self._store, key, b"".join(chunks))
        except obstore.exceptions.BaseError as error:
            raise TransientStoreError(str(error)) from error

    def get(self, key, begin=0, end=None, **limits):
        try:
            return bytes(obstore.get(self._store, key).bytes())[begin:end]
        except FileNotFoundError as error:
            raise NotFoundError(f"{key} does not exist in {self.location}") from error
        except obstore.exceptions.BaseError as error:
            raise TransientStoreError(str(error)) from error

    def size(self, key):
        try:
            return obstore.head(self._store, key)["size"]
        except FileNotFoundError:
            return None

    def children(self, prefix):
        found = obstore.list_with_delimiter(self._store, prefix or None)
        start = len(prefix) + 1 if prefix else 0
        names = [one["path"][start:] for one in found["objects"]]
        return sorted(names + [one.rstrip("/")[start:] + "/" for one in found["common_prefixes"]])

    def stamp(self, prefix):
        return None

    def litter(self, prefix):
        return []


class Faulty:
    """A store whose ``create`` fails now and then: before it has done anything, after it has done everything, or in
    between, so that its own retry finds in the way what it has made itself."""

    def __init__(self, store, seed, often=0.5):
        self._store, self._random, self._often = store, random.Random(seed), often
        self.faults = 0

    def __getattr__(self, name):
        return getattr(self._store, name)

    def create(self, key, data):
        fault = self._random.choice(["before", "after", "retried"]) if self._random.random() < self._often else None
        self.faults += fault is not None
        if fault == "before":
            raise TransientStoreError("the connection was reset before the request was sent")
        self._store.create(key, data)
        if fault == "after":
            raise TransientStoreError("the connection was reset before the reply came")
        if fault == "retried":
            self._store.create(key, data)
