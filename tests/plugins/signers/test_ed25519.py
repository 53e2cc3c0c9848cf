"""The signer ed25519: against RFC 8032's own vectors, its files, and what it refuses."""

import base64
import stat
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedtower.core.errors import StorageError, TrustError
from fedtower.core.secret_files import write_secret
from fedtower.core.signing import SignatureError
from fedtower.core.testing.signer import SignerPromises
from fedtower.plugins.signers.ed25519.command import keygen
from fedtower.plugins.signers.ed25519.example import example
from fedtower.plugins.signers.ed25519.signer import Ed25519Signer, make_key
from fedtower.plugins.signers.ed25519.verifier import Ed25519Verifier

FOLDER = tempfile.TemporaryDirectory(prefix="fedtower-signer-")
SIGNER = Ed25519Signer(Path(example(Path(FOLDER.name))["key"]))

# RFC 8032, section 7.1, tests 1 to 3: secret key, public key, message, signature.
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


class TestEd25519(SignerPromises):
    make = staticmethod(lambda: SIGNER)


@pytest.mark.parametrize(("secret", "public", "message", "signature"), VECTORS)
def test_the_signatures_are_those_of_the_standard(
    secret: str, public: str, message: str, signature: str, tmp_path: Path
) -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    write_secret(tmp_path / "key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    signer = Ed25519Signer(tmp_path / "key")
    assert base64.b64decode(signer.public_key).hex() == public
    assert signer.sign(bytes.fromhex(message)).hex() == signature


def test_a_key_is_pinned_as_a_file_or_as_letters(tmp_path: Path) -> None:
    signer = make_key(tmp_path / "signing.pem", tmp_path / "signing.pub")
    for pinned in (str(tmp_path / "signing.pub"), signer.public_key):
        Ed25519Verifier((pinned,)).verify(b"a plan", signer.sign(b"a plan"), signer.key_id)


def test_two_keys_are_pinned_while_one_follows_the_other(tmp_path: Path) -> None:
    other = make_key(tmp_path / "signing.pem", tmp_path / "signing.pub")
    both = Ed25519Verifier((SIGNER.public_key, other.public_key))
    for signer in (SIGNER, other):
        both.verify(b"a plan", signer.sign(b"a plan"), signer.key_id)
    with pytest.raises(SignatureError, match="did not make over them"):
        both.verify(b"a plan", SIGNER.sign(b"a plan"), other.key_id)
    with pytest.raises(SignatureError, match="is it another server"):
        SIGNER.verifier().verify(b"a plan", other.sign(b"a plan"), other.key_id)


def test_the_private_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    signer = make_key(tmp_path / "signing.pem", tmp_path / "signing.pub")
    assert stat.S_IMODE(signer.key.stat().st_mode) == 0o600
    signer.key.chmod(0o640)
    with pytest.raises(TrustError, match=r"has the mode 640: .*`chmod 600"):
        Ed25519Signer(signer.key).sign(b"a plan")


@pytest.mark.parametrize("there", ["signing.pem", "signing.pub"])
def test_a_key_is_not_overwritten(there: str, tmp_path: Path) -> None:
    (tmp_path / there).write_bytes(b"a key")
    with pytest.raises(StorageError, match="is there already, and a key is not overwritten"):
        make_key(tmp_path / "signing.pem", tmp_path / "signing.pub")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_bytes() == b"a key"


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    other = generate_private_key(SECP256R1())
    write_secret(tmp_path / "ec", other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    write_secret(tmp_path / "text", b"no key")
    public = other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "public").write_bytes(public)
    for name, said in (("ec", "of another kind"), ("text", "can be read"), ("nowhere", "there is no key")):
        with pytest.raises(TrustError, match=said):
            Ed25519Signer(tmp_path / name).sign(b"a plan")
    pinned = {
        str(tmp_path / "public"): "of another kind",
        str(tmp_path / "nowhere"): "`fedtower keygen` makes it",
        "c2hvcnQ=": "as a file or as 44 letters of base64",
        "": "neither an Ed25519 public key",
        "\0": "neither an Ed25519 public key",
    }
    for key, said in pinned.items():
        with pytest.raises(TrustError, match=said):
            Ed25519Verifier((key,))
    with pytest.raises(TrustError, match="no key is pinned"):
        Ed25519Verifier(())


def test_keygen_makes_a_key_once_and_prints_what_to_pin(tmp_path: Path) -> None:
    done = CliRunner().invoke(keygen, [str(tmp_path / "keys")])
    assert done.exit_code == 0, done.output
    signer = Ed25519Signer(tmp_path / "keys" / "signing.pem")
    assert done.output.splitlines()[-1] == signer.public_key
    again = CliRunner().invoke(keygen, [str(tmp_path / "keys")])
    assert isinstance(again.exception, StorageError)
    assert Ed25519Signer(tmp_path / "keys" / "signing.pem").public_key == signer.public_key
