"""`jaxserve doctor`: what this machine is, and which backend serves which operation on it."""

import dataclasses
import importlib.metadata
import json
import platform
from typing import Any

import jax

from jaxserve import __version__
from jaxserve.core.units import format_bytes
from jaxserve.pallas_kernels.card import KernelCard
from jaxserve.pallas_kernels.cards import iter_cards

PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "llvmlite")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one backend can do of one operation.

    Attributes:
        operation: Name of the operation.
        backend: Name of the backend.
        dtypes: Dtypes that it serves.
        chosen: Those of them for which it is the first choice.
        reasons: Why it does not serve the others, by dtype.
    """

    operation: str
    backend: str
    dtypes: tuple[str, ...]
    chosen: tuple[str, ...]
    reasons: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything that `jaxserve doctor` prints.

    Attributes:
        versions: Of jaxserve, Python and packages; "not installed" where one is absent.
        devices: Kind and number, and what is known of them.
        summaries: What each operation computes.
        answers: Per operation and backend.
    """

    versions: dict[str, str]
    devices: list[str]
    summaries: dict[str, str]
    answers: list[Answer]

    def as_json(self) -> str:
        """Return one JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def as_text(self) -> str:
        """Return lines for people."""
        lines = [", ".join(f"{name} {number}" for name, number in self.versions.items())]
        lines += [f"device: {device}" for device in self.devices]
        for name, summary in self.summaries.items():
            lines += ["", f"{name}: {summary}"]
            mine = [answer for answer in self.answers if answer.operation == name]
            width = max((len(answer.backend) for answer in mine), default=0)
            for answer in mine:
                for text in _told(answer):
                    lines.append(f"  {answer.backend:{width}}  {text}")
        lines += ["", "* is what `auto` takes."]
        return "\n".join(lines)


def _told(answer: Answer) -> list[str]:
    told: list[str] = []
    if answer.dtypes:
        marked = [f"{d}*" if d in answer.chosen else d for d in answer.dtypes]
        told.append(f"serves {', '.join(marked)}")
    by_reason: dict[str, list[str]] = {}
    for dtype, reason in answer.reasons.items():
        by_reason.setdefault(reason, []).append(dtype)
    for reason, dtypes in by_reason.items():
        of = "" if len(by_reason) == 1 and not answer.dtypes else f" {', '.join(dtypes)}"
        told.append(f"does not serve{of}: {reason}")
    return told


def examine() -> Findings:
    """Look at this machine and ask every backend of every operation."""
    cards = list(iter_cards())
    return Findings(
        versions={"jaxserve": __version__, "python": platform.python_version(), **_packages()},
        devices=_devices(),
        summaries={card.name: card.summary for card in cards},
        answers=[answer for card in cards for answer in ask(card)],
    )


def ask(card: KernelCard) -> list[Answer]:
    """Ask every backend of an operation about the sizes of a usual model."""
    sizes, answers = card.usual(), []
    served: set[str] = set()
    for backend in card.backends:
        found = {dtype: card.supports(backend, sizes, dtype) for dtype in card.tolerances}
        dtypes = tuple(dtype for dtype, reason in found.items() if reason is None)
        answers.append(
            Answer(
                operation=card.name,
                backend=backend,
                dtypes=dtypes,
                chosen=tuple(d for d in dtypes if d not in served),
                reasons={dtype: reason for dtype, reason in found.items() if reason is not None},
            )
        )
        served.update(dtypes)
    return answers


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> list[str]:
    kinds: dict[str, int] = {}
    for device in jax.devices():
        stats: dict[str, Any] = (device.memory_stats() or {}) if device.platform != "cpu" else {}
        parts = [device.device_kind if device.platform != "cpu" else "CPU"]
        capability = getattr(device, "compute_capability", None)
        parts += [f"compute capability {capability}"] if capability else []
        parts += [format_bytes(stats["bytes_limit"])] if "bytes_limit" in stats else []
        text = ", ".join(parts)
        kinds[text] = kinds.get(text, 0) + 1
    return [f"{count} x {kind}" for kind, count in kinds.items()]
