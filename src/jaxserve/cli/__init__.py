"""The command `jaxserve`."""
