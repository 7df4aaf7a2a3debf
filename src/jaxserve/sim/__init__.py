"""The policies of `scheduling` on a virtual clock: replicas whose steps take a model's time."""
