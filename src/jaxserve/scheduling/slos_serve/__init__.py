"""Token planner for many service-level objectives on one engine.

Which requests can be promised their objectives is found by a dynamic programme over prefill
deadlines; batches are as large as the next deadline allows; who cannot be promised anything is
served with what is left over.

Source: SLOs-Serve (arXiv 2504.08784).
"""

from jaxserve.scheduling.slos_serve.config import SlosServeConfig
from jaxserve.scheduling.slos_serve.handoff import HandOffRouter
from jaxserve.scheduling.slos_serve.scheduler import SlosServeScheduler

__all__ = ["HandOffRouter", "SlosServeConfig", "SlosServeScheduler"]
