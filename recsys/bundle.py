"""Bundle: a folder with all that a device needs to train and to score, read and checked without torch.

``manifest.json`` names every other file with its SHA-256 digest, and says what goes into the graphs and what comes
out. A file is parsed only after its digest was found to be right; who signed the manifest, if anybody, is another
question.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import CheckpointError, DataError, RecipeError
from fedtower.core.plan import LocalSettings
from fedtower.core.settings import build

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"

Role = Literal["parameter", "state", "slot", "input", "candidates", "lr", "gradient", "loss", "scores"]
Precision = Literal["float32", "float16", "int8"]
Array = NDArray[Any]
FloatArray = NDArray[np.float32]

_MOST_MANIFEST_BYTES = 4 << 20
_MOST_FILE_BYTES = 1 << 30
_BAKED = (
    *("batch_size", "optimizer", "momentum", "beta1", "beta2", "eps"),
    *("proximal", "control", "frozen", "loss", "negatives"),
    *("on_device", "head_first", "ditto"),
)
"""What of a visit's settings is in the graph; the learning rates and the number of steps are not."""


class BundleError(CheckpointError):
    """A bundle is damaged, was altered, is of another format, or was made for something else."""


class InputError(DataError):
    """What a graph was to be fed does not fit it: a name, a shape, a type, a range, or a number that is none."""


@dataclass(frozen=True)
class Port:
    """One input or output of a graph: ``port`` in the file, ``name`` to us.

    Integers, and whole numbers such as labels, lie in ``low`` .. ``high``, both included.
    """

    port: str
    role: Role
    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "int32"] = "float32"
    low: int | None = None
    high: int | None = None

    def check(self, value: Array, whose: str, *, leading: int = 0) -> None:
        """Raise InputError unless ``value``, without its ``leading`` axes, may be fed to this port."""
        if tuple(value.shape[leading:]) != self.shape or value.ndim != leading + len(self.shape):
            raise InputError(
                f"{whose}: the {self.role} {self.name!r} has shape {tuple(value.shape[leading:])}, and the graph was "
                f"made for {self.shape}; shapes are fixed at export, and shorter data is padded"
            )
        if self.dtype == "int32":
            if value.dtype.kind not in "iu":
                raise InputError(f"{whose}: the {self.role} {self.name!r} must be integers, but is {value.dtype}")
            low, high = self.low or 0, np.iinfo(np.int32).max if self.high is None else self.high
            if value.size and not low <= int(value.min()) <= int(value.max()) <= high:
                raise InputError(
                    f"{whose}: the {self.role} {self.name!r} must lie in {low} .. {high}, but goes from {value.min()} "
                    f"to {value.max()}"
                )
        elif value.dtype != np.float32:
            raise InputError(f"{whose}: the {self.role} {self.name!r} must be float32, but is {value.dtype}")
        elif not np.isfinite(value).all():
            raise InputError(f"{whose}: the {self.role} {self.name!r} holds NaN or infinity")
        elif self.high is not None and ((value < (self.low or 0)) | (value > self.high) | (value % 1 != 0)).any():
            raise InputError(
                f"{whose}: the {self.role} {self.name!r} must be whole numbers in {self.low} .. {self.high}"
            )


@dataclass(frozen=True)
class Initial:
    """How a state of the optimiser begins: as a number everywhere, or as a parameter is."""

    name: str
    shape: tuple[int, ...]
    value: float | None = None
    parameter: str | None = None

    def fill(self, parameters: Mapping[str, FloatArray]) -> FloatArray:
        """The state before the first step."""
        if self.parameter is not None:
            return parameters[self.parameter]
        return np.full(self.shape, self.value, dtype=np.float32)


@dataclass(frozen=True)
class Graph:
    """The ports of one graph, in the order in which it is fed."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True)
class RowPort:
    """The rows that slots are filled with: how wide one is, and how many the cloud has."""

    source: str
    width: int
    num_rows: int


@dataclass(frozen=True)
class Manifest:
    """All that is known of a bundle.

    ``parameters`` are in order, with those that never leave a device in ``on_device``; ``inputs`` and ``slots`` are
    what a visit's data has, whether the graph looks at all of it or not.
    """

    model: str
    recipe: str
    local: Mapping[str, Any]
    parameters: Mapping[str, tuple[int, ...]]
    on_device: tuple[str, ...]
    state: tuple[Initial, ...]
    slots: tuple[Port, ...]
    inputs: tuple[Port, ...]
    rows: RowPort | None
    graphs: Mapping[str, Graph]
    files: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    checks: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of ``manifest.json``; the parameters stay in their order."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @property
    def settings(self) -> LocalSettings:
        """The visit that the graph was made for."""
        return _made(LocalSettings, self.local, "local")

    def refuse_other(self, local: LocalSettings) -> None:
        """Raise BundleError if a visit asks for what the graph does not do."""
        mine = self.settings
        for name in _BAKED:
            if getattr(mine, name) != getattr(local, name):
                raise BundleError(
                    f"the bundle was exported with local.{name} = {getattr(mine, name)!r}, but the plan asks for "
                    f"{getattr(local, name)!r}; this is part of the graph: export again"
                )


@dataclass(frozen=True)
class Bundle:
    """A folder whose files are what its manifest says."""

    path: Path
    manifest: Manifest
    digest: str

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """The bundle in a folder, every file's digest checked.

        Raises:
            BundleError: it is not one, or not as it was when it was made.
        """
        raw = _read(path / MANIFEST, _MOST_MANIFEST_BYTES)
        manifest = parse_manifest(raw, str(path))
        bundle = cls(path, manifest, hashlib.sha256(raw).hexdigest())
        for name in manifest.files:
            bundle.read(name)
        return bundle

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises BundleError unless they have the digest that the manifest gives."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no {name}; it holds {', '.join(sorted(self.manifest.files))}")
        data = _read(self.path / name, _MOST_FILE_BYTES)
        got, want = hashlib.sha256(data).hexdigest(), self.manifest.files[name]
        if got != want:
            raise BundleError(
                f"{self.path / name} was altered or cut short: its SHA-256 is {got[:16]}..., and the manifest says "
                f"{want[:16]}...; fetch or export the bundle again"
            )
        return data

    def parameters(self, precision: Precision = "float32") -> dict[str, FloatArray]:
        """The parameters, in the manifest's order; those of a lower precision as float32 again.

        Raises:
            BundleError: the weights are not there, or do not fit the manifest.
        """
        if precision not in self.manifest.weights:
            raise BundleError(
                f"{self.path} has no {precision} weights; it has {', '.join(sorted(self.manifest.weights)) or 'none'}"
            )
        held = read_tensors(self.read(str(self.manifest.weights[precision]["file"])), str(self.path))
        out = {}
        for name, shape in self.manifest.parameters.items():
            if name not in held:
                raise BundleError(f"{self.path}: the weights lack the parameter {name!r}")
            value = held[name].astype(np.float32)
            if f"{name}/scale" in held:
                value = value * held[f"{name}/scale"]
            if value.shape != shape or not np.isfinite(value).all():
                raise BundleError(
                    f"{self.path}: the parameter {name!r} has shape {value.shape} where the manifest says {shape}, or "
                    f"holds NaN or infinity"
                )
            out[name] = value
        return out

    def graph(self, name: str, suffix: str) -> tuple[Path, str, Graph]:
        """A graph's file, its digest and its ports."""
        file = f"{name}.{suffix}"
        if file not in self.manifest.files or name not in self.manifest.graphs:
            raise BundleError(f"{self.path} has no {file}; it holds {', '.join(sorted(self.manifest.files))}")
        return self.path / file, self.manifest.files[file], self.manifest.graphs[name]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which makes a folder a bundle."""
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def digest_of(path: Path) -> str:
    """A file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_tensors(data: bytes, origin: str) -> dict[str, Array]:
    """The arrays of a safetensors file. Raises BundleError when it is none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(data))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{origin}: the tensors cannot be read: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write arrays as a safetensors file."""
    from safetensors.numpy import save

    path.write_bytes(save({name: np.asarray(value, order="C") for name, value in tensors.items()}))


def parse_manifest(raw: bytes, origin: str) -> Manifest:
    """The manifest of its bytes. Raises BundleError, saying what is wrong."""
    try:
        values = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{origin}: the manifest is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise BundleError(
            f"{origin}: the manifest is of format {found!r}, and this fedtower reads format {FORMAT}; export it again"
        )
    try:
        manifest = _manifest(values)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, RecipeError) as error:
        raise BundleError(f"{origin}: the manifest is damaged: {type(error).__name__}: {error}") from error
    for name in manifest.files:
        if Path(name).name != name or name in ("", ".", "..", MANIFEST):
            raise BundleError(f"{origin}: the manifest names {name!r}, which is not a file beside it")
    return manifest


def _manifest(values: dict[str, Any]) -> Manifest:
    rows = values["rows"]
    manifest = Manifest(
        model=_is(str, values["model"]),
        recipe=_is(str, values["recipe"]),
        local=_is(dict, values["local"]),
        parameters={_is(str, name): _shape(shape) for name, shape in _is(dict, values["parameters"]).items()},
        on_device=tuple(_is(str, name) for name in values["on_device"]),
        state=tuple(_initial(each) for each in values["state"]),
        slots=_ports(values["slots"]),
        inputs=_ports(values["inputs"]),
        rows=None if rows is None else RowPort(_is(str, rows["source"]), _size(rows["width"]), _size(rows["num_rows"])),
        graphs={
            _is(str, name): Graph(_ports(graph["inputs"]), _ports(graph["outputs"]))
            for name, graph in _is(dict, values["graphs"]).items()
        },
        files={_is(str, name): _is(str, digest) for name, digest in _is(dict, values["files"]).items()},
        weights={_is(str, name): _is(dict, each) for name, each in _is(dict, values["weights"]).items()},
        checks={_is(str, name): float(each) for name, each in _is(dict, values["checks"]).items()},
        versions=_is(dict, values["versions"]),
    )
    _ = manifest.settings
    _check_graphs(manifest)
    return manifest


def _check_graphs(manifest: Manifest) -> None:
    """Every port of a graph is something that the manifest knows, of the same shape."""
    known: dict[tuple[str, str], tuple[int, ...]] = {
        **{("parameter", name): shape for name, shape in manifest.parameters.items()},
        **{("state", each.name): each.shape for each in manifest.state},
    }
    for each in manifest.state:
        if (each.value is None) == (each.parameter is None):
            raise ValueError(f"the state {each.name!r} needs a value or a parameter to begin with")
        if each.parameter is not None and manifest.parameters.get(each.parameter) != each.shape:
            raise ValueError(f"the state {each.name!r} begins as {each.parameter!r}, which does not fit")
    for name in manifest.on_device:
        if name not in manifest.parameters:
            raise ValueError(f"on_device names {name!r}, which is not a parameter")
    if "train" in manifest.graphs:
        train = manifest.graphs["train"]
        known |= {("slot", port.name): port.shape for port in manifest.slots}
        known |= {("gradient", port.name): port.shape for port in manifest.slots}
        known |= {("input", port.name): port.shape for port in manifest.inputs}
        known |= {("lr", "lr"): (), ("loss", "loss"): ()}
        for port in (*train.inputs, *train.outputs):
            if known.get((port.role, port.name)) != port.shape:
                raise ValueError(f"the graph 'train' has the {port.role} {port.name!r} of shape {port.shape}")
    if manifest.slots and manifest.rows is None:
        raise ValueError("there are slots, and no rows to fill them with")
    for port in manifest.slots:
        if manifest.rows is not None and (not port.shape or port.shape[-1] != manifest.rows.width):
            raise ValueError(f"the slot {port.name!r} has shape {port.shape}, and rows are {manifest.rows.width} wide")


def _ports(values: Sequence[Mapping[str, Any]]) -> tuple[Port, ...]:
    return tuple(_port(each) for each in _is(list, values))


def _port(values: Mapping[str, Any]) -> Port:
    role, dtype = values["role"], values["dtype"]
    if role not in get_args(Role) or dtype not in ("float32", "int32"):
        raise ValueError(f"there is no role {role!r} of type {dtype!r}")
    low, high = (None if values[name] is None else _whole(values[name]) for name in ("low", "high"))
    return Port(_is(str, values["port"]), role, _is(str, values["name"]), _shape(values["shape"]), dtype, low, high)


def _initial(values: Mapping[str, Any]) -> Initial:
    value = values["value"]
    return Initial(
        _is(str, values["name"]),
        _shape(values["shape"]),
        None if value is None else float(value),
        None if values["parameter"] is None else _is(str, values["parameter"]),
    )


def _made(cls: type[LocalSettings], values: Mapping[str, Any], what: str) -> LocalSettings:
    unknown = sorted(set(values) - {each.name for each in fields(cls)})
    if unknown:
        raise ValueError(f"{what} holds {unknown}, which this fedtower does not know: a newer one exported it")
    # A setting that is not there is one that there was not yet: its default does what was done before.
    return build(cls, {name: value for name, value in values.items() if value is not None}, path=what)


def _shape(values: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(_size(each) for each in _is(list, values))
    if np.prod([float(each) for each in shape]) > _MOST_FILE_BYTES:
        raise ValueError(f"the shape {shape} is larger than any that is in use")
    return shape


def _size(value: object) -> int:
    if _whole(value) < 0:
        raise ValueError(f"a size cannot be {value}")
    return _whole(value)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"a whole number was expected, not {value!r}")
    return value


def _is(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{kind.__name__} was expected, not {value!r:.60}")
    return value


def _read(path: Path, most: int) -> bytes:
    try:
        if path.stat().st_size > most:
            raise BundleError(f"{path} is larger than {most >> 20} MiB, which no file of a bundle is")
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read, so this is not a whole bundle: {error}") from error
