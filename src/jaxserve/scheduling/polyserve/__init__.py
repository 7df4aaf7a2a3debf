"""Tier router and scaler of a fleet: servers binned by time per token, filled one after the other.

Source: PolyServe (arXiv 2507.17769).
"""

from jaxserve.scheduling.polyserve.config import PolyServeConfig
from jaxserve.scheduling.polyserve.router import TierRouter, TierScaler

__all__ = ["PolyServeConfig", "TierRouter", "TierScaler"]
