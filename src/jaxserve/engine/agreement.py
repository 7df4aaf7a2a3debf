"""What several processes must agree on before they run one engine together."""

import dataclasses
import json
from collections.abc import Mapping

from jaxserve.core.config import EngineConfig, iter_options
from jaxserve.core.errors import ConfigError
from jaxserve.engine.hosts import Channel, Hosts
from jaxserve.engine.message import Message, Plain

_OWN = ("node_rank", "dist_init_addr", "compilation_cache_dir", "decision_log")
"""Settings in which processes may differ."""


def agree(
    hosts: Hosts | None, config: EngineConfig, found: Mapping[str, Plain]
) -> tuple[Channel | None, dict[str, Plain]]:
    """Take the sizes that process 0 has chosen, if its settings are one's own.

    Args:
        hosts: The processes; None for one by itself, which agrees with itself.
        config: Settings.
        found: Sizes that depend on how much memory a process has found.

    Returns:
        Where launches will be announced, and the sizes.

    Raises:
        ConfigError: If settings differ; names them.
        EngineDeadError: If a process is lost.
    """
    if hosts is None:
        return None, dict(found)
    channel, mine = hosts.open_channel(), _settings(config)
    if hosts.leads:
        channel.send(Message(name="agree", values={**found, "settings": json.dumps(mine)}))
        return channel, dict(found)
    values = dict(channel.receive().values)
    theirs = json.loads(str(values.pop("settings")))
    odd = [
        f"{name} {mine.get(name)} instead of {theirs.get(name)}"
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    ]
    if odd:
        raise ConfigError(
            f"process {hosts.rank} has other settings than process 0: {', '.join(odd)}; start all "
            "processes with the same flags, but for --node-rank."
        )
    return channel, values


def _settings(config: EngineConfig) -> dict[str, str]:
    parts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        spec.name: repr(getattr(parts[part], spec.name))
        for part, spec in iter_options()
        if spec.name not in _OWN
    }
