"""Kinds of part, and offers of them: strings until a part is used, and then an import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module, metadata, resources
from typing import Any, Protocol

from fedtower.core.errors import FedtowerError, MissingDependency, PluginError, nearest
from fedtower.core.garbage import undisturbed


@dataclass(frozen=True)
class Kind:
    """A kind of part: the protocol that its parts follow and the test class that proves it, as ``"module:Name"``.

    ``template`` is the folder, ``"package:path"``, that ``fedtower plugins new`` makes a package of. The target of an
    offer is ``"module:Name"``, or for a kind with a ``reader`` a data file, ``"package:path"``: the reader, a function,
    is given the offer's name and the registry.
    """

    name: str
    seam: str
    promises: str
    template: str
    summary: str
    reader: str = ""


@dataclass(frozen=True)
class Offer:
    """One part that some plugin brings, not imported yet."""

    kind: str
    name: str
    target: str
    summary: str = ""
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    plugin: str = "this process"
    distribution: str = ""
    version: str = ""

    @property
    def origin(self) -> str:
        """Who brings it, for messages."""
        return f"{self.plugin} of {self.package}" if self.distribution else self.plugin

    @property
    def package(self) -> str:
        """The distribution and its version."""
        return f"{self.distribution} {self.version}".strip()


def read_target(offer: Offer) -> str:
    """The text of the file that an offer names.

    Raises:
        PluginError: it cannot be read.
    """
    package, _, file = offer.target.partition(":")
    try:
        return resources.files(package).joinpath(file).read_text("utf-8")
    except (OSError, ModuleNotFoundError, UnicodeDecodeError) as error:
        raise PluginError(
            f"the {offer.kind} {offer.name!r} of {offer.origin} cannot be read from {offer.target}: {error}"
        ) from error


def load_target(offer: Offer) -> Any:
    """Import what an offer names.

    Raises:
        MissingDependency: a library that it imports is not installed; the message says what brings it.
        PluginError: the import fails otherwise.
    """
    module_name, _, attribute = offer.target.partition(":")
    try:
        with undisturbed():
            module = import_module(module_name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing == module_name.partition(".")[0]:
            raise PluginError(_broken(offer, error)) from error
        raise MissingDependency(
            f"the {offer.kind} {offer.name!r} needs {missing}, which is not installed; "
            + how_to_install(missing, offer.distribution)
        ) from error
    except FedtowerError:
        raise
    except Exception as error:
        raise PluginError(_broken(offer, error)) from error
    if not hasattr(module, attribute):
        close = nearest(attribute, vars(module))
        raise PluginError(
            f"the {offer.kind} {offer.name!r} of {offer.origin} is broken: {module_name} has no {attribute!r}{close}"
        )
    return getattr(module, attribute)


def seam_methods(seam: str) -> list[str]:
    """The public methods of the protocol ``"package.module:Protocol"``; none for a class that is no protocol.

    >>> seam_methods("fedtower.core.cohort:Sampler")
    ['sample']
    """
    module_name, _, attribute = seam.partition(":")
    protocol = getattr(import_module(module_name), attribute)
    bases = [base for base in protocol.__mro__ if getattr(base, "_is_protocol", False) and base is not Protocol]
    return [
        name for base in bases for name, value in vars(base).items() if callable(value) and not name.startswith("_")
    ]


HOST = "fedtower"
# This extra names the wheels of a machine with CUDA.
_ON_A_CPU = {"cloud": " where there is CUDA, and on a CPU `pip install -r requirements/cpu.txt` of a checkout does"}


def how_to_install(missing: str, distribution: str) -> str:
    """The extra of a distribution that brings a library, by its metadata; import names only start alike.

    Of fedtower itself it also says what is different on a machine without CUDA, and who knows the rest.
    """
    try:
        requirements = metadata.requires(distribution) or [] if distribution else []
    except metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        extra = requirement.partition("extra ==")[2].strip(" '\"")
        if extra and canonical(requirement).startswith(canonical(missing)):
            said = f"`pip install '{distribution}[{extra}]'` brings it"
            if distribution == HOST:
                said += f"{_ON_A_CPU.get(extra, '')}; `fedtower doctor` has the command for this machine"
            return said
    return f"install it (often `pip install {missing}`)"


def canonical(name: str) -> str:
    """A plugin or distribution name as names are compared.

    >>> canonical("My_Median")
    'my-median'
    """
    return name.lower().replace("_", "-").replace(".", "-")


def reason(error: BaseException) -> str:
    """Why something failed, in one line; our own errors need no type in front."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FedtowerError) else f"{type(error).__name__}: {text}"


def _broken(offer: Offer, error: Exception) -> str:
    return f"the {offer.kind} {offer.name!r} of {offer.origin} cannot be imported from {offer.target}: {reason(error)}"
