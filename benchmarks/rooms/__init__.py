"""One benchmark per system, each under the name of its room."""
