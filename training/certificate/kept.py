"""The certificate that a run keeps, and whether it is of this run's code and configuration.

No torch: the command line reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from holdfast.training.experiment.loading import is_same_code
from holdfast.training.runs.directory import RunRecord
from holdfast.training.runs.durable_json import json_bytes, without_nan, write_json_durably
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.stored_json import Kinds, read_json, required_fields

CERTIFICATE: Kinds = {
    "is_exact": (bool,),
    "num_steps": (int,),
    "stops": (list,),
    "verdict": (dict,),
    "made_with": (dict,),
}
MADE_WITH: Kinds = {
    "made_at": (str,),
    "device": (str,),
    "versions": (dict,),
    "code_digest": (str, type(None)),
    "config_digest": (str,),
}
VERDICT: Kinds = {"num_tensors": (int,), "num_losses": (int,)}


@dataclass(frozen=True)
class KeptCertificate:
    """What ``verify-resume`` found of a run's training.

    Attributes:
        is_exact: whether no byte differed.
        num_steps: of each training that was compared.
        num_stops: how often one of them was stopped.
        num_tensors, num_losses: what was compared.
        made_at, device: when and where.
        digest: ``sha256:...`` of the whole certificate.
        differs_in: in what this run is another training than the one that was tried: its code, its
            configuration, its versions. Empty where the certificate is of this run.
    """

    is_exact: bool
    num_steps: int
    num_stops: int
    num_tensors: int
    num_losses: int
    made_at: str
    device: str
    digest: str
    differs_in: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``, and for a bundle's manifest."""
        return {**asdict(self), "differs_in": [*self.differs_in]}

    @property
    def is_good(self) -> bool:
        """Whether it certifies this run."""
        return self.is_exact and not self.differs_in

    def told(self) -> str:
        """One line."""
        if self.differs_in:
            return f"one is there, of other {' and '.join(self.differs_in)} than this run's"
        stops = "1 stop" if self.num_stops == 1 else f"{self.num_stops} stops"
        tried = f"{stops} in {self.num_steps} steps on {self.device}, {self.made_at[:10]}"
        if self.is_exact:
            return f"exact, 0 bytes differ after {tried}"
        return f"NOT exact, other bytes after {tried}"


def keep_certificate(run: RunDirectory, certificate: Mapping[str, Any]) -> None:
    """Keep a certificate in a run, in the place of an earlier one. Raises StorageError."""
    write_json_durably(run.certificate_json, _plain(certificate))


def read_certificate(run: RunDirectory, record: RunRecord) -> KeptCertificate | None:
    """What the run keeps; None where nobody has tried it.

    Raises DataFormatError or StorageError where the file is not readable.
    """
    path = run.certificate_json
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    found = required_fields(content, path, CERTIFICATE)
    made = required_fields(found["made_with"], f"{path}: made_with", MADE_WITH)
    verdict = required_fields(found["verdict"], f"{path}: verdict", VERDICT)
    return KeptCertificate(
        is_exact=found["is_exact"],
        num_steps=found["num_steps"],
        num_stops=len(found["stops"]),
        num_tensors=verdict["num_tensors"],
        num_losses=verdict["num_losses"],
        made_at=made["made_at"],
        device=made["device"],
        digest=f"sha256:{hashlib.sha256(json_bytes(content)).hexdigest()}",
        differs_in=tuple(_differing(made, record)),
    )


def _differing(made: Mapping[str, Any], record: RunRecord) -> list[str]:
    code = made["code_digest"]
    is_other_code = code != record.experiment_digest and not is_same_code(record.experiment, code)
    apart = {
        "code": is_other_code,
        "configuration": made["config_digest"] != record.config_digest,
        "versions": made["versions"] != record.versions,
    }
    return [what for what, is_other in apart.items() if is_other]


def _plain(certificate: Mapping[str, Any]) -> Any:
    """As JSON has it: lists for tuples, words for what is not finite."""
    return without_nan(_lists(certificate))


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
