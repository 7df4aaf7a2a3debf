"""FLASH's plans and models, measured; the room is `jaxserve.sharding.flash`."""
