"""Share the embeddings of prompts and pictures between servers, through Redis.

Triton's own response cache belongs to one server: its keys contain a secret of that server. The shared cache stands in
front of the encoders. A store that is slow or down costs a request at most `TIMEOUT_S` per encoder call, and soon
nothing; it never fails a request. An answer from the store is as trustworthy as the store: only its form is checked.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from imprompt_serving.pipeline.models import Models, Tensors
from imprompt_serving.specs import Bundle

logger = logging.getLogger(__name__)

VARIABLE = "IMPROMPT_SHARED_CACHE"
"""The environment variable with the URL of the store. The URL may contain a password, so it is not an option."""
TIMEOUT_S = 0.05
"""For a look-up: many times what a network within a cluster takes, and small next to a request."""
MAX_FAILURES, PAUSE_S = 3, 10.0
"""After this many failures in a row, the store is left alone for this long."""
EXPIRE_S = 24 * 3600
MAX_WRITES = 32
"""Writes at the same time. Further answers are not stored, so that a slow store cannot fill the memory."""
_PREFIX = b"imprompt:1:"
"""Version of keys and values."""

Form = dict[str, tuple[str, tuple[int, ...]]]
"""Types and shapes of tensors by name."""


class Store(Protocol):
    """A key-value store, such as Redis."""

    def get(self, name: bytes, /) -> Awaitable[Any]: ...

    def set(self, name: bytes, value: bytes, /, *, ex: int) -> Awaitable[Any]: ...


class _Array(msgspec.Struct, frozen=True, array_like=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def open_store(url: str) -> Store:
    """Open the Redis at `url`, without connecting.

    Raises:
        ValueError: the URL is not one of Redis.
        ImportError: the extra `cache` is not installed.
    """
    try:
        from redis import asyncio as redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        raise ImportError(f'{VARIABLE} is set, but {error}: run `pip install "imprompt[cache]"`') from None
    store: Store = redis.from_url(url, socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 0))
    return store


class SharedCache:
    """The models of a bundle, with the answers of its encoders kept in a store.

    The first call with inputs of each shape goes to the encoder, whose answer shows the form that later ones must have.

    Args:
        encoders: the folder of each encoder, by model. Its files are part of the keys.
        count: called with the outcome of each call: `hit`, `miss`, `error`, or `skipped`.
    """

    def __init__(
        self, models: Models, store: Store, encoders: Mapping[str, Path], count: Callable[[str], None]
    ) -> None:
        self._models, self._store, self._count = models, store, count
        self._encoders = {model: _Encoder(folder) for model, folder in encoders.items()}
        self._failures, self._paused_until = 0, 0.0
        self._writes: set[asyncio.Task[None]] = set()

    @classmethod
    def of_bundle(
        cls, models: Models, store: Store, bundle: Bundle, folder: Path, count: Callable[[str], None]
    ) -> SharedCache:
        """Cache the encoders of `bundle`, given the version folder of one of its models."""
        names = [encoder.engine for encoder in bundle.text_encoders]
        names += [f"image_encoder_{encoder.name}" for encoder in bundle.image_encoders]
        models_of_bundle = [bundle.model(name) for name in names]
        encoders = {model: folder.parents[1] / model / folder.name for model in models_of_bundle}
        return cls(models, store, encoders, count)

    def stream(self, model: str, tensors: Mapping[str, np.ndarray]) -> AsyncIterator[Tensors]:
        return self._models.stream(model, tensors)

    async def call(self, model: str, tensors: Mapping[str, np.ndarray]) -> Tensors:
        encoder = self._encoders.get(model)
        if encoder is None:
            return await self._models.call(model, tensors)
        shapes = tuple(sorted((name, value.shape) for name, value in tensors.items()))
        digest, form = encoder.digest(), encoder.forms.get(shapes)
        key = None if digest is None else _key(digest, tensors)
        if key is None or form is None or time.monotonic() < self._paused_until:
            self._count("skipped")
        elif (found := await self._get(key, form)) is not None:
            return found
        answer = await self._models.call(model, tensors)
        encoder.forms[shapes] = _form(answer)
        if key is not None:
            self._set(key, answer)
        return answer

    async def _get(self, key: bytes, form: Form) -> Tensors | None:
        """Look up an answer; None if there is none of this form, or the store fails."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                value = await self._store.get(key)
        except Exception as error:
            self._failed(error)
            self._count("error")
            return None
        self._failures = 0
        found = None if value is None else _decode(value, form)
        self._count("miss" if value is None else "error" if found is None else "hit")
        return found

    def _set(self, key: bytes, answer: Tensors) -> None:
        """Store an answer in the background."""
        if time.monotonic() >= self._paused_until and len(self._writes) < MAX_WRITES:
            task = asyncio.ensure_future(self._write(key, answer))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)

    async def _write(self, key: bytes, answer: Tensors) -> None:
        try:
            async with asyncio.timeout(PAUSE_S):
                await self._store.set(key, _encode(answer), ex=EXPIRE_S)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._failures >= MAX_FAILURES and time.monotonic() >= self._paused_until:
            self._paused_until = time.monotonic() + PAUSE_S
            # Not the message, which may contain the URL.
            logger.warning("the shared cache fails (%s); next attempt in %g s", type(error).__name__, PAUSE_S)


class _Encoder:
    """An encoder: the hash of its files, and the forms of its answers by the shapes of its inputs."""

    def __init__(self, folder: Path) -> None:
        self.forms: dict[Any, Form] = {}
        self._folder = folder
        self._hashing: asyncio.Future[bytes] | None = None

    def digest(self) -> bytes | None:
        """Return the hash of the encoder's files; None while a thread computes it, a second or more per gigabyte."""
        if self._hashing is None:
            self._hashing = asyncio.ensure_future(asyncio.to_thread(_hash_files, self._folder))
        return self._hashing.result() if self._hashing.done() else None


def _hash_files(folder: Path) -> bytes:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with file.open("rb") as opened:
                digest.update(file.name.encode() + b"\0" + hashlib.file_digest(opened, "sha256").digest())
    return digest.digest()


def _key(encoder: bytes, tensors: Mapping[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256(encoder)
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return _PREFIX + digest.digest()


def _form(tensors: Tensors) -> Form:
    return {name: (value.dtype.str, value.shape) for name, value in tensors.items()}


def _encode(tensors: Tensors) -> bytes:
    arrays = {name: _Array(value.dtype.str, value.shape, value.tobytes()) for name, value in tensors.items()}
    return msgspec.msgpack.encode(arrays)


def _decode(value: bytes, form: Form) -> Tensors | None:
    """Decode an answer; None unless it has this form and finite values."""
    try:
        arrays = msgspec.msgpack.decode(value, type=dict[str, _Array])
        if {name: (array.dtype, array.shape) for name, array in arrays.items()} != form:
            return None
        tensors = {name: np.frombuffer(array.data, array.dtype).reshape(array.shape) for name, array in arrays.items()}
    except (msgspec.DecodeError, ValueError):
        return None
    return tensors if all(np.isfinite(tensor).all() for tensor in tensors.values()) else None
