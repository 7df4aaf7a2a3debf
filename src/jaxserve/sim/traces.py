"""Recorded requests: when they came, and how long they were."""

import csv
import gzip
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path

from jaxserve.core.errors import ConfigError
from jaxserve.sim.workload import Shape, Workload

SHIPPED = ("azure-chat", "azure-code")
"""Traces that come with the package; see `sim/data/README.md`."""
_SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")


def _seconds(text: str) -> float:
    return float(text)


def _milliseconds(text: str) -> float:
    return float(text) / 1000


def _date(text: str) -> float:
    return datetime.fromisoformat(text[:26]).timestamp()  # digits beyond microseconds are dropped


_FORMATS: tuple[tuple[str, str, str, Callable[[str], float]], ...] = (
    ("arrival_s", "prompt_tokens", "output_tokens", _seconds),
    ("arrival_s", "input_tokens", "output_tokens", _seconds),
    ("timestamp_s", "input_tokens", "output_tokens", _seconds),
    ("arrived_at", "num_prefill_tokens", "num_decode_tokens", _seconds),
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens", _date),
    ("timestamp", "input_length", "output_length", _milliseconds),
)
"""Columns of arrival, prompt and output, as our own files, ShareGPT's, ServeGen's, Vidur's, Azure's
and Mooncake's have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Recorded requests, in the order of their arrival.

    Attributes:
        name: Of the trace.
        arrivals: Seconds since the first one.
        prompt_lens: Tokens of each prompt.
        output_lens: Tokens that each generated.
    """

    name: str
    arrivals: tuple[float, ...]
    prompt_lens: tuple[int, ...]
    output_lens: tuple[int, ...]

    @property
    def rate(self) -> float:
        """Mean requests per second."""
        return (len(self.arrivals) - 1) / (self.arrivals[-1] - self.arrivals[0])

    def workload(self, *, ttft_slowdown: float, tpot_s: float) -> Workload:
        """Return the requests as a stream that can be offered at any rate.

        Args:
            ttft_slowdown: Time to the first token, as a multiple of that on an idle server.
            tpot_s: Seconds per further token.
        """
        shapes = tuple(
            Shape(
                prompt_len=prompt, output_len=output, ttft_slowdown=ttft_slowdown, tpot_s=tpot_s,
                name=self.name,
            )
            for prompt, output in zip(self.prompt_lens, self.output_lens, strict=True)
        )  # fmt: skip
        return Workload(name=self.name, arrivals=self.arrivals, shapes=shapes, is_paired=True)


def read_trace(source: str | Path) -> Trace:
    """Read a trace that is shipped, or a CSV or JSON-lines file, gzipped or not.

    Args:
        source: One of `SHIPPED`, or a path. Columns may be named as in this project's own files
            (`arrival_s`, `prompt_tokens`, `output_tokens`), or as in the public traces of Azure,
            Mooncake, ServeGen, ShareGPT and Vidur.

    Raises:
        ConfigError: If there is no such trace, or it holds something else; names the line.
    """
    if source in SHIPPED:
        found = files("jaxserve.sim") / "data" / f"{source}.csv.gz"
        return _parse(str(source), f"{source}.csv.gz", found.read_bytes())
    path = Path(source)
    if not path.name.endswith(_SUFFIXES):
        raise ConfigError(
            f"a trace must be one of {', '.join(SHIPPED)} or a file that ends in "
            f"{', '.join(_SUFFIXES)}, got {str(source)!r}."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the trace {path.name} cannot be read: {error.strerror or error}."
        ) from None
    return _parse(path.name.partition(".")[0], path.name, data)


def _parse(name: str, file: str, data: bytes) -> Trace:
    try:
        text = (gzip.decompress(data) if file.endswith(".gz") else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace {file} cannot be read: {error}.") from None
    rows = _csv(file, text) if ".csv" in file else _json_lines(file, text)
    found: list[tuple[float, int, int]] = []
    columns: tuple[str, str, str, Callable[[str], float]] | None = None
    for number, row in rows:
        if columns is None:
            columns = next((one for one in _FORMATS if all(c in row for c in one[:3])), None)
            if columns is None:
                known = "; ".join(", ".join(one[:3]) for one in _FORMATS)
                raise ConfigError(
                    f"line {number} of the trace {file} has the columns {', '.join(row)}; expected "
                    f"one of: {known}."
                )
        found.append(_request(file, number, row, columns))
    if len(found) < 2:
        raise ConfigError(f"the trace {file} must hold at least 2 requests, got {len(found)}.")
    found.sort(key=lambda one: one[0])
    if found[-1][0] == found[0][0]:
        raise ConfigError(f"all requests of the trace {file} arrive at one time; a rate needs two.")
    return Trace(
        name=name,
        arrivals=tuple(one[0] - found[0][0] for one in found),
        prompt_lens=tuple(one[1] for one in found),
        output_lens=tuple(one[2] for one in found),
    )


def _csv(file: str, text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=2):
        if None in row or None in row.values():
            raise ConfigError(f"line {number} of the trace {file} has not as many cells as line 1.")
        yield number, row


def _json_lines(file: str, text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"line {number} of the trace {file} is no JSON: {error}.") from None
        if not isinstance(row, dict):
            raise ConfigError(f"line {number} of the trace {file} must be a JSON object.")
        yield number, row


def _request(
    file: str,
    number: int,
    row: Mapping[str, object],
    columns: tuple[str, str, str, Callable[[str], float]],
) -> tuple[float, int, int]:
    """Read one line; requests without output tokens count as ones with one."""
    arrival, prompt, output, seconds = columns
    try:
        when = seconds(str(row[arrival]))
        lens = [float(str(row[name])) for name in (prompt, output)]
    except (KeyError, ValueError):
        when, lens = math.nan, []
    # NaN and infinity are no whole numbers.
    if not math.isfinite(when) or not all(one >= 0 and one % 1 == 0 for one in lens):
        raise ConfigError(
            f"line {number} of the trace {file} must hold a time and two counts of tokens in "
            f"{arrival}, {prompt} and {output}, got {[row.get(one) for one in columns[:3]]}."
        )
    return when, max(1, int(lens[0])), max(1, int(lens[1]))
