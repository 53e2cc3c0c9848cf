"""Credentials: which devices may take part, by token or by certificate, in a small SQLite file.

A device's token has 256 random bits, and the file holds its SHA-256. A slow hash (scrypt) protects what people choose,
which can be guessed, and would let anybody who calls keep the server busy; 256 bits nobody guesses, however fast the
hash.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedtower.core.errors import StorageError, TrustError
from fedtower.plugins.transports.grpc.last_write import LastWrite
from fedtower.plugins.transports.grpc.refusals import Reason, Refused

_BUSY_SECONDS = 5.0
ATTEMPT_BYTES = 16
_MOST_LETTERS = 256
_NO_HASH = bytes(32)
_MOST_KNOWN = 8_192

_SCHEMA = """
CREATE TABLE IF NOT EXISTS codes (
    id TEXT PRIMARY KEY, hash BLOB NOT NULL, client INTEGER, left INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS devices (
    id TEXT PRIMARY KEY, client INTEGER NOT NULL, name TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'active',
    token BLOB, certificate TEXT UNIQUE, code TEXT, attempt BLOB, used INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS attempts ON devices (code, attempt);
CREATE UNIQUE INDEX IF NOT EXISTS clients ON devices (client) WHERE state = 'active';
"""


@dataclass(frozen=True)
class Device:
    """One that may take part, or might: ``client`` is the number by which it is sampled and its draws are made."""

    id: str
    client: int
    name: str
    state: Literal["active", "revoked"] = "active"
    certificate: str | None = None


class Credentials:
    """The devices of a federation; several processes may have the file open.

    Raises:
        StorageError: the file cannot be opened or written.
        TrustError: it is no file of credentials.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._reading = path, threading.Lock(), threading.Lock()
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise StorageError(f"the credentials {path} cannot be opened: {error.strerror}") from error
        with self._said():
            self._db, self._reader = self._connect(), self._connect()
            self._db.executescript(_SCHEMA)
            self._reader.execute("SELECT 1 FROM devices LIMIT 1").fetchone()
        # Asked for with every call: while nobody writes to the file, those who called are known without looking.
        self._last_write = LastWrite(path)
        self._as_of, self._known = b"", OrderedDict[str, _Found]()

    def _connect(self) -> sqlite3.Connection:
        """One connection writes, and one reads, which in WAL mode does not wait for what is being written."""
        # Without transactions of the module's own: _change begins them, so that two processes take turns.
        connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        return connection

    def close(self) -> None:
        """Close the file."""
        with self._lock, self._reading:
            self._reader.close()
            self._db.close()
            self._last_write.close()

    # What an operator does

    def make_codes(self, count: int, *, uses: int = 1, first_client: int | None = None) -> list[str]:
        """New enrolment codes, each good for ``uses`` devices; their hashes are kept, and not they.

        With ``first_client``, the device of the first code becomes that client, that of the second the next, and so on.

        Raises:
            TrustError: a client that is taken, or a code for several devices that would all be one client.
        """
        if count < 1 or uses < 1 or (first_client is not None and (uses > 1 or first_client < 0)):
            raise TrustError(
                f"{count} codes of {uses} uses with the first client {first_client} cannot be made: a code that says "
                "which client a device becomes is for one device, and there are at least one code, one use and client 0"
            )
        minted = [_mint() for _ in range(count)]
        with self._change():
            for turn, (_, public, digest) in enumerate(minted):
                client = None if first_client is None else first_client + turn
                if client is not None:
                    self._refuse_taken(client)
                self._db.execute("INSERT INTO codes VALUES (?, ?, ?, ?)", (public, digest, client, uses))
        return [code for code, _, _ in minted]

    def withdraw(self, code: str) -> None:
        """Make a code worthless, given it or its part before the dot. Raises TrustError when it is not known."""
        with self._change():
            if not self._db.execute("DELETE FROM codes WHERE id = ?", (code.partition(".")[0],)).rowcount:
                raise TrustError(f"there is no enrolment code {code.partition('.')[0]!r}; it may be used up")

    def register(self, certificate: str, client: int | None = None) -> Device:
        """A device known by the common name of its certificate. Raises TrustError when the name or client is taken."""
        with self._change():
            if self._find("certificate = ?", certificate) is not None:
                raise TrustError(f"a device with the certificate {certificate!r} is registered already")
            if client is not None:
                self._refuse_taken(client)
            device = Device(_new_id(), self._free() if client is None else client, certificate, certificate=certificate)
            self._insert(device)
        return device

    def revoke(self, device_id: str) -> Device:
        """Take a device out: it is refused from its next call on. Raises TrustError when there is none of that id."""
        with self._change():
            if not self._db.execute("UPDATE devices SET state = 'revoked' WHERE id = ?", (device_id,)).rowcount:
                raise TrustError(f"there is no device {device_id!r}; `fedtower enrol list` shows all")
            found = self._find("id = ?", device_id)
        assert found is not None
        return found[0]

    def devices(self) -> list[Device]:
        """All devices, by client."""
        with self._lock, self._said():
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM devices ORDER BY client").fetchall()
        return [Device(*row) for row in rows]

    def codes_left(self) -> int:
        """How many more devices the codes that were given out would let in."""
        with self._lock, self._said():
            return int(self._db.execute("SELECT coalesce(sum(left), 0) FROM codes").fetchone()[0])

    # What a device does

    def enrol(self, code: str, name: str, attempt: bytes) -> tuple[Device, str]:
        """A device's id and number, and its token, for an enrolment code.

        The token is said here and never again. Where a reply was lost, the same code and attempt give the same device
        another token, until one was used.

        Raises:
            Refused: ``ENROLMENT_CODE``; or ``CORRUPT``, for an attempt that is not of 16 bytes.
        """
        if len(attempt) != ATTEMPT_BYTES:
            raise Refused(Reason.CORRUPT, f"an enrolment's attempt has {ATTEMPT_BYTES} bytes, not {len(attempt)}")
        public, secret = _halves(code)
        with self._change():
            row = self._db.execute("SELECT hash, client, left FROM codes WHERE id = ?", (public,)).fetchone()
            known, client, left = row or (_NO_HASH, None, 0)
            right = hmac.compare_digest(known, _hash(secret)) and row is not None
            before = self._find("code = ? AND attempt = ?", public, _hash(attempt)) if right else None
            spent = not left if before is None else before[2]
            if not right or spent:
                raise Refused(
                    Reason.ENROLMENT_CODE, "the enrolment code is not known here, or was used up; ask for another"
                )
            if before is not None:
                device = before[0]
            else:
                device = Device(_new_id(), self._free() if client is None else client, name[:256])
                self._insert(device, public, _hash(attempt))
                self._db.execute("UPDATE codes SET left = left - 1 WHERE id = ?", (public,))
            token, _, digest = _mint(device.id)
            self._db.execute("UPDATE devices SET token = ? WHERE id = ?", (digest, device.id))
        return device, token

    def by_token(self, token: str) -> Device:
        """The device whose token this is.

        Raises:
            Refused: ``UNKNOWN_DEVICE`` or ``REVOKED``. Whether id or secret was wrong is neither said nor to be timed.
        """
        public, secret = _halves(token)
        found = self._known_token(public)
        device, digest, used = found or (None, None, 1)
        right = hmac.compare_digest(digest or _NO_HASH, _hash(secret))
        if device is None or digest is None or not right:
            raise Refused(Reason.UNKNOWN_DEVICE, "the token is of no device that is enrolled here; enrol again")
        if not used:
            self._mark_used(device.id)
        return _admitted(device)

    def by_certificate(self, subject: str) -> Device:
        """The device of that common name, whose certificate the handshake has checked; refused as by token."""
        found = self._look("certificate = ?", subject)
        if found is None:
            raise Refused(
                Reason.UNKNOWN_DEVICE,
                f"the certificate of {subject!r} is good, but no such device is registered here; the operator runs "
                "`fedtower enrol certificate`",
            )
        return _admitted(found[0])

    # Rows

    def _mark_used(self, device_id: str) -> None:
        """Note that a token was used, unless that would take time, as calls wait meanwhile: then the next one does.

        Lost, or left out for a while, it lets the device itself, and nobody else, ask for its token again.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._db.execute("PRAGMA busy_timeout = 0")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("UPDATE devices SET used = 1 WHERE id = ?", (device_id,))
        except sqlite3.OperationalError:
            pass  # somebody else writes, or the disk is full
        finally:
            self._db.execute(f"PRAGMA busy_timeout = {1_000 * _BUSY_SECONDS:.0f}")
            self._lock.release()

    def _known_token(self, public: str) -> _Found | None:
        with self._reading:
            now = self._last_write()
            if now != self._as_of:
                self._as_of, self._known = now, OrderedDict()
            if public in self._known:
                self._known.move_to_end(public)
                return self._known[public]
        found = self._look("id = ?", public)
        with self._reading:
            if found is not None and now == self._as_of:
                self._known[public] = found
                if len(self._known) > _MOST_KNOWN:
                    self._known.popitem(last=False)
        return found

    def _look(self, where: str, *values: object) -> _Found | None:
        with self._reading, self._said():
            return self._find(where, *values, among=self._reader)

    def _find(self, where: str, *values: object, among: sqlite3.Connection | None = None) -> _Found | None:
        row = (
            (among or self._db).execute(f"SELECT {_COLUMNS}, token, used FROM devices WHERE {where}", values).fetchone()
        )
        return None if row is None else (Device(*row[:5]), row[5], row[6])

    def _insert(self, device: Device, code: str | None = None, attempt: bytes | None = None) -> None:
        self._db.execute(
            "INSERT INTO devices (id, client, name, certificate, code, attempt) VALUES (?, ?, ?, ?, ?, ?)",
            (device.id, device.client, device.name, device.certificate, code, attempt),
        )

    def _refuse_taken(self, client: int) -> None:
        """A device that was revoked has left its place: whoever lost a token comes back as the same client."""
        devices = "SELECT 1 FROM devices WHERE client = ? AND state = 'active'"
        codes = "SELECT 1 FROM codes WHERE client = ? AND left > 0"
        if self._db.execute(f"{devices} UNION ALL {codes}", (client, client)).fetchone() is not None:
            raise TrustError(f"client {client} is taken, by a device or by another code; revoke or withdraw that first")

    def _free(self) -> int:
        """The number after the last one, of a device or of a code."""
        query = "SELECT max(client) FROM (SELECT client FROM devices UNION ALL SELECT client FROM codes)"
        last = self._db.execute(query).fetchone()[0]
        return 0 if last is None else last + 1

    @contextmanager
    def _change(self) -> Iterator[None]:
        """All of it or nothing; on disk when this returns."""
        with self._lock, self._said():
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _said(self) -> Iterator[None]:
        """SQLite's errors, as ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StorageError(f"the credentials {self._path} cannot be used: {error}; is the disk full?") from error
        except sqlite3.DatabaseError as error:
            raise TrustError(f"{self._path} is no file of credentials, or is damaged: {error}") from error


_Found = tuple[Device, bytes | None, int]
_COLUMNS = "id, client, name, state, certificate"


def _admitted(device: Device) -> Device:
    if device.state != "active":
        raise Refused(Reason.REVOKED, f"device {device.id} was taken out by the operator")
    return device


def _new_id() -> str:
    return secrets.token_hex(8)


def _mint(public: str | None = None) -> tuple[str, str, bytes]:
    """A secret of 256 bits behind a public id to find it by: the two together, the id, and the hash to keep."""
    public, secret = public or _new_id(), secrets.token_urlsafe(32)
    return f"{public}.{secret}", public, _hash(secret.encode())


def _halves(token: str) -> tuple[str, bytes]:
    """The id and the secret; of what was never minted here, nothing."""
    public, _, secret = token.partition(".") if token.isascii() and len(token) < _MOST_LETTERS else ("", "", "")
    return public, secret.encode()


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
