"""Several engines behind one door: replicas, routing, scaling, and what happens when one dies."""
