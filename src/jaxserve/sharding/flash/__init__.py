"""FLASH: all-to-all between servers in one-to-one stages, for traffic that changes at each layer.

Plans, bounds and simulations are host code on integers. Only `collectives`, which sends arrays,
imports JAX, and is therefore not imported here.
"""

from jaxserve.sharding.flash.bounds import lower_bound as lower_bound
from jaxserve.sharding.flash.cost import CostModel as CostModel
from jaxserve.sharding.flash.policy import choose as choose
from jaxserve.sharding.flash.schedule import Schedule as Schedule
from jaxserve.sharding.flash.schedule import plan as plan
from jaxserve.sharding.flash.simulate import simulate as simulate
