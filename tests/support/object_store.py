"""Stores in a real object store; one of them with faults on the way to it."""

import random
import secrets

import obstore
from obstore.store import S3Store

from peakpoint.errors import ConflictError, NotFoundError, TransientStoreError
from peakpoint.store.bucket import BucketStore

ACCESS = {"access_key_id": "testkey", "secret_access_key": "testsecret", "region": "us-east-1"}


def bucket_store(url, lease_seconds=1.0, prefix=None):
    """A store below a prefix of its own, or of this name, in a bucket that exists."""
    client = S3Store(
        "conformance",
        endpoint=url,
        client_options={"allow_http": True},
        virtual_hosted_style_request=False,
        **ACCESS,
    )
    obstore.put(client, "made", b"")  # with which the server makes the bucket
    prefix = f"some/{prefix or secrets.token_hex(6)}"
    return BucketStore(f"s3://conformance/{prefix}", client, prefix, lease_seconds)


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
