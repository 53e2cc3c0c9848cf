"""What every signer promises."""

from __future__ import annotations

import pytest

from fedtower.core.signing import SignatureError, Signer
from fedtower.core.testing.promises import Promises

MESSAGES = [b"", b"a plan", bytes(range(256)) * 4_096]


class SignerPromises(Promises):
    """``make`` gives a signer that has a key."""

    @pytest.mark.parametrize("data", MESSAGES, ids=["nothing", "short", "a MiB"])
    def test_what_it_signs_its_verifier_accepts(self, data: bytes) -> None:
        signer: Signer = self.made()
        signer.verifier().verify(data, signer.sign(data), signer.key_id)

    @pytest.mark.parametrize("at", [0, 3, 5])
    def test_bytes_that_were_altered_are_refused(self, at: int) -> None:
        signer: Signer = self.made()
        altered = bytearray(b"a plan")
        altered[at] ^= 1
        with pytest.raises(SignatureError):
            signer.verifier().verify(bytes(altered), signer.sign(b"a plan"), signer.key_id)

    def test_bytes_that_were_lengthened_or_cut_are_refused(self) -> None:
        signer: Signer = self.made()
        for other in (b"a plan\0", b"a pla", b""):
            with pytest.raises(SignatureError):
                signer.verifier().verify(other, signer.sign(b"a plan"), signer.key_id)

    def test_a_signature_that_was_altered_is_refused(self) -> None:
        signer: Signer = self.made()
        signature = signer.sign(b"a plan")
        for bit in range(8 * len(signature)):
            altered = bytearray(signature)
            altered[bit // 8] ^= 1 << bit % 8
            with pytest.raises(SignatureError):
                signer.verifier().verify(b"a plan", bytes(altered), signer.key_id)

    @pytest.mark.parametrize("length", [0, 1, 63, 65, 1_000])
    def test_what_is_no_signature_is_refused(self, length: int) -> None:
        signer: Signer = self.made()
        with pytest.raises(SignatureError):
            signer.verifier().verify(b"a plan", bytes(length), signer.key_id)

    @pytest.mark.parametrize("key_id", ["", "another", "\0"])
    def test_a_key_that_was_not_pinned_is_refused(self, key_id: str) -> None:
        signer: Signer = self.made()
        with pytest.raises(SignatureError):
            signer.verifier().verify(b"a plan", signer.sign(b"a plan"), key_id)

    def test_the_key_has_one_name(self) -> None:
        signer: Signer = self.made()
        assert signer.key_id == signer.key_id != ""
