"""The generated code is what `make protos` writes, and the wire keeps its own rules."""

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from fedtower.protos.v1 import federation_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("federation_pb2.py", "federation_pb2.pyi", "federation_pb2_grpc.py", "federation_pb2_grpc.pyi")


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("protos")
    # "-o" keeps make from looking whether the environment is up to date: this test runs in it.
    settings = [f"BIN={Path(sys.executable).parent}", f"PROTOS_OUT={out}"]
    command = ["make", "--no-print-directory", "-o", ".venv/.ready-to-test", "protos", *settings]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return out / "fedtower" / "protos" / "v1"


@pytest.mark.parametrize("name", GENERATED)
def test_what_is_committed_is_what_is_generated(name: str, regenerated: Path) -> None:
    assert (ROOT / "protos" / "v1" / name).read_bytes() == (regenerated / name).read_bytes(), "run `make protos`"


def test_nothing_else_is_generated(regenerated: Path) -> None:
    assert {path.name for path in regenerated.iterdir()} == set(GENERATED)
    assert {path.name for path in (ROOT / "protos" / "v1").glob("*_pb2*")} == set(GENERATED)


def messages() -> dict[str, Descriptor]:
    return dict(pb.DESCRIPTOR.message_types_by_name)


def inside(message: Descriptor, above: tuple[str, ...] = ()) -> int:
    """How deep the messages inside a message go; an endless one fails."""
    assert message.full_name not in above, f"{message.full_name} holds itself"
    below = [inside(field.message_type, (*above, message.full_name)) for field in message.fields if field.message_type]
    return 1 + max(below, default=0)


def test_no_message_holds_itself() -> None:
    assert len(messages()) > 30
    assert max(inside(message) for message in messages().values()) <= 4


def test_every_enum_begins_with_unspecified() -> None:
    enums: list[EnumDescriptor] = list(pb.DESCRIPTOR.enum_types_by_name.values())
    assert len(enums) == 3
    assert all(enum.values_by_number[0].name.endswith("_UNSPECIFIED") for enum in enums)


def test_there_are_no_groups_and_no_extensions() -> None:
    fields = [field for message in messages().values() for field in message.fields]
    assert len(fields) > 100
    assert not [field.full_name for field in fields if field.type == FieldDescriptor.TYPE_GROUP]
    assert not pb.DESCRIPTOR.extensions_by_name


def test_every_reply_can_refuse() -> None:
    calls = pb.DESCRIPTOR.services_by_name["Federation"].methods
    assert [call.name for call in calls] == ["Enrol", "CheckIn", "Fetch", "FetchRows", "Heartbeat", "Resume", "Submit"]
    for call in calls:
        assert call.output_type.fields_by_name["refusal"].message_type is pb.Refusal.DESCRIPTOR, call.name
