"""Operators on the device, each with a plain reference, a card and interchangeable backends."""
