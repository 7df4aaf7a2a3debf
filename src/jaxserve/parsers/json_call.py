"""Reads JSON that is still being written."""

import json

_SPACE = " \t\r\n"
_NAMES = ("name",)
_ARGUMENTS = ("arguments", "parameters")


class JsonValue:
    """Finds the end of one JSON value.

    Attributes:
        is_done: Whether it is complete.
    """

    __slots__ = ("_depth", "_escaped", "_kind", "_quoted", "is_done")

    def __init__(self) -> None:
        """Stand in front of the value."""
        self.is_done = False
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self._kind = ""

    def feed(self, text: str) -> int:
        """Take text.

        Args:
            text: What follows; begins with the value's first character.

        Returns:
            How many of its characters belong to the value.
        """
        for at, char in enumerate(text):
            if self._is_outside(char):
                self.is_done = True
                return at
            self._step(char)
            if self.is_done:
                return at + 1
        return len(text)

    def _is_outside(self, char: str) -> bool:
        """Tell whether a number or word has ended in front of this character."""
        return self._kind == "word" and char in ",]}" + _SPACE

    def _step(self, char: str) -> None:
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._quoted = False
                self.is_done = self._depth == 0
            return
        self._kind = self._kind or ("word" if char not in '{["' else "other")
        if char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.is_done = self._depth <= 0


class JsonCall:
    """Reads one call written as `{"name": ..., "arguments": {...}}`, in whichever order.

    Attributes:
        name: Name of the function, once known.
        arguments: Text of the arguments that nobody has taken yet.
        is_done: Whether the object is complete.
        has_failed: Whether the text turned out to be something else.
    """

    __slots__ = ("_key", "_raw", "_state", "_value", "arguments", "has_failed", "is_done", "name")

    def __init__(self) -> None:
        """Stand in front of the brace."""
        self.name: str | None = None
        self.arguments = ""
        self.is_done = False
        self.has_failed = False
        self._state = "open"
        self._key = ""
        self._raw = ""
        self._value = JsonValue()

    def feed(self, text: str) -> int:
        """Take text; return how many characters belong to the object.

        With `has_failed` set, the character behind those is the one that does not fit.
        """
        at = 0
        while at < len(text) and not (self.is_done or self.has_failed):
            if self._state in ("key", "value"):
                at += self._feed_value(text[at:])
            elif text[at] in _SPACE:
                at += 1
            else:
                at += self._feed_mark(text[at])
        return at

    def _feed_mark(self, char: str) -> int:
        state = self._state
        follow = {
            ("open", "{"): "first key",
            ("colon", ":"): "begin value",
            ("next", ","): "next key",
        }.get((state, char))
        if follow is not None:
            self._state = follow
            return 1
        if state in ("first key", "next key") and char == '"':
            self._begin("key")
            return 0
        if state == "begin value":
            self._begin("value")
            return 0
        if state in ("first key", "next") and char == "}":
            self.is_done = self.name is not None
            self.has_failed = not self.is_done
            return int(self.is_done)
        self.has_failed = True
        return 0

    def _begin(self, state: str) -> None:
        self._state, self._raw, self._value = state, "", JsonValue()

    def _feed_value(self, text: str) -> int:
        count = self._value.feed(text)
        piece = text[:count]
        is_arguments = self._state == "value" and self._key in _ARGUMENTS
        if is_arguments:
            self.arguments += piece
        else:
            self._raw += piece
        if self._value.is_done:
            self._end_value()
        return count

    def _end_value(self) -> None:
        if self._state == "key" or self._key in _NAMES:
            try:
                value = json.loads(self._raw)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, str) or (self._state != "key" and not value):
                self.has_failed = True
                return
            if self._state == "key":
                self._key = value
            elif self.name is None:
                self.name = value
        self._state = "colon" if self._state == "key" else "next"
